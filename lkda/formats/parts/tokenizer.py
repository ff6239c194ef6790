"""The tokenizer as other tools expect it: told which token begins and ends a document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors

from lkda.formats.parts.writing import write_json

# Begins every document, and ends the one before it.
END_OF_TEXT = "<|endoftext|>"


def end_of_text(tokenizer: Tokenizer) -> int | None:
    """The token that begins and ends documents; None where the tokenizer has none."""
    token = tokenizer.token_to_id(END_OF_TEXT)
    return None if token is None else int(token)


def special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """The entries of config.json and generation_config.json that name special tokens."""
    token = end_of_text(tokenizer)
    return {"bos_token_id": token, "eos_token_id": token, "pad_token_id": token}


def write_tokenizer(directory: Path, tokenizer: Tokenizer, *, context: int | None) -> None:
    """tokenizer.json, tokenizer_config.json and generation_config.json.

    A text is encoded as models here see documents: END_OF_TEXT first.

    Args:
        context: length that the model was trained at; None where it is not known.
    """
    written = Tokenizer.from_str(tokenizer.to_str())
    token = end_of_text(tokenizer)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    if context is not None:
        config["model_max_length"] = context
    if token is not None:
        written.post_processor = processors.TemplateProcessing(
            single=f"{END_OF_TEXT} $A", pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B", special_tokens=[(END_OF_TEXT, token)]
        )
        config |= {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    written.save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", config)
    write_json(directory / "generation_config.json", special_ids(tokenizer))
