"""The pre-tokenizer of lkda's own tokenizers, which splits a text into words before byte pairs are merged."""

from __future__ import annotations

import functools
import json
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers

# Maximum number of characters of a word, a number, or a run of signs or white space. The time of BPE training grows
# with the square of a word's length. Horizontal rules and indentation in ordinary files are shorter than this.
LONGEST_WORD = 128
# GPT-2's pattern (the one in ByteLevel), with a maximum length for its four kinds of runs.
_WORDS = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}{1,N}| ?\p{N}{1,N}| ?[^\s\p{L}\p{N}]{1,N}|\s{1,N}(?!\S)|\s{1,N}").replace(
    "1,N", f"1,{LONGEST_WORD}"
)
# The pre-tokenizer of earlier versions: the same words, without a maximum length.
_UNBOUNDED = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def word_splitter() -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer of lkda's own tokenizers: GPT-2's words as bytes, none longer than LONGEST_WORD characters."""
    split = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def as_bounded(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a tokenizer.json, with the pre-tokenizer of earlier versions replaced by today's. The two differ
    only in runs of more than LONGEST_WORD characters."""
    return {**content, "pre_tokenizer": _bounded()} if content["pre_tokenizer"] == _UNBOUNDED else content


@functools.cache
def _bounded() -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = word_splitter()
    return dict(json.loads(tokenizer.to_str())["pre_tokenizer"])
