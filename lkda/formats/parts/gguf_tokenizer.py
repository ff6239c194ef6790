"""A byte-level BPE as GGUF metadata."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from lkda.formats.parts.tokenizer import end_of_text

if TYPE_CHECKING:
    from gguf import GGUFWriter


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Raise ValueError for a tokenizer that llama.cpp's GPT-2 one does not spell alike."""
    content = json.loads(tokenizer.to_str())
    before = content.get("pre_tokenizer") or {}
    alike = before.get("type") == "ByteLevel" and not before.get("add_prefix_space") and before.get("use_regex", True)
    if content["model"]["type"] != "BPE" or content.get("normalizer") is not None or not alike:
        raise ValueError(
            "format gguf writes a byte-level BPE that splits text as GPT-2 does, without a normaliser or a prefix "
            "space, as lkda's own tokenizers are; this model's tokenizer is another kind."
        )


def add_tokenizer(writer: GGUFWriter, tokenizer: Tokenizer, *, rows: int) -> None:
    """Tokens, merges, and which token begins and ends a document.

    Args:
        rows: of the embedding; those that the tokenizer does not use are written as unused tokens.
    """
    from gguf import TokenType

    content = json.loads(tokenizer.to_str())
    special = {added["id"] for added in content["added_tokens"] if added["special"]}
    spelled = {index: token for token, index in tokenizer.get_vocab().items()}
    tokens = [spelled.get(i, f"[PAD{i}]") for i in range(rows)]
    kinds = [
        TokenType.UNUSED if i not in spelled else TokenType.CONTROL if i in special else TokenType.NORMAL
        for i in range(rows)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([_merge(pair) for pair in content["model"]["merges"]])
    token = end_of_text(tokenizer)
    writer.add_add_bos_token(token is not None)
    if token is not None:
        writer.add_bos_token_id(token)
        writer.add_eos_token_id(token)
        writer.add_pad_token_id(token)


def _merge(pair: Any) -> str:
    return pair if isinstance(pair, str) else " ".join(pair)
