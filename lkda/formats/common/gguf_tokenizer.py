"""Writes a byte-level BPE as metadata of GGUF."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from lkda.checks import InputError
from lkda.special_tokens import document_start

if TYPE_CHECKING:
    from gguf import GGUFWriter

# The pattern with which ByteLevel splits text.
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Raises ValueError for a tokenizer that encodes differently from llama.cpp's GPT-2 tokenizer."""
    content = json.loads(tokenizer.to_str())
    same_split = _splits_as_gpt2(content.get("pre_tokenizer") or {})
    if content["model"]["type"] != "BPE" or content.get("normalizer") is not None or not same_split:
        raise InputError(
            "format gguf writes a byte-level BPE that splits text as GPT-2 does, without a normaliser or a prefix "
            "space, as lkda's own tokenizers are; this model's tokenizer is another kind."
        )


def _splits_as_gpt2(before: Mapping[str, Any]) -> bool:
    """Whether a pre-tokenizer is GPT-2's, or lkda's, which differs from it only in a limit on the length of a word."""
    match before:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return bool(before.get("use_regex", True))
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return re.sub(r"\{1,\d+\}", "+", pattern) == _GPT2_WORDS
    return False


def add_tokenizer(writer: GGUFWriter, tokenizer: Tokenizer, *, rows: int) -> None:
    """Adds the tokens, the merges, and the token that begins and ends a document.

    Args:
        rows: of the embedding. Rows that the tokenizer does not use become unused tokens.
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
    token = document_start(tokenizer)
    writer.add_add_bos_token(token is not None)
    if token is not None:
        writer.add_bos_token_id(token)
        writer.add_eos_token_id(token)
        writer.add_pad_token_id(token)


def _merge(pair: Any) -> str:
    return pair if isinstance(pair, str) else " ".join(pair)
