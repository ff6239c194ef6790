"""Writes the tokenizer as other tools expect it, with the tokens that begin and end a document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors

from lkda.formats.common.writing import write_json, write_tokenizer_json
from lkda.special_tokens import document_start


def special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """The entries of config.json and generation_config.json that name special tokens."""
    token = document_start(tokenizer)
    return {"bos_token_id": token, "eos_token_id": token, "pad_token_id": token}


def write_tokenizer(directory: Path, tokenizer: Tokenizer, *, context: int | None) -> None:
    """Writes tokenizer.json, tokenizer_config.json and generation_config.json.

    A text is encoded as in training, with the token that begins a document in front.

    Args:
        context: the context of training; None where it is not known.
    """
    written = Tokenizer.from_str(tokenizer.to_str())
    token = document_start(tokenizer)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    if context is not None:
        config["model_max_length"] = context
    if token is not None:
        name = tokenizer.id_to_token(token)
        written.post_processor = processors.TemplateProcessing(
            single=[name, "$A"], pair=[name, "$A", name, "$B"], special_tokens=[(name, token)]
        )
        config |= {"bos_token": name, "eos_token": name, "pad_token": name}
    write_tokenizer_json(directory, written)
    write_json(directory / "tokenizer_config.json", config)
    write_json(directory / "generation_config.json", special_ids(tokenizer))
