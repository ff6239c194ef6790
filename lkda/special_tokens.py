"""Finds the token that begins a document and the tokens that end one, in lkda's own tokenizers and in others."""

from __future__ import annotations

import re

from tokenizers import Tokenizer

# Stands at the beginning of every document in lkda's own tokenizers, and thereby ends the previous document.
END_OF_TEXT = "<|endoftext|>"
# Names of begin and end tokens, most common first, in lower case and without signs other than the slash: "<s>" is s,
# "[BOS]" and "<bos>" are bos, "<|begin_of_text|>" is beginoftext, "</s>" is /s, "<|im_end|>" is imend.
_BEGINS = ("s", "bos", "bostoken", "sos", "beginoftext", "startoftext", "beginofsentence", "beginofdocument", "cls")
_ENDS = ("/s", "eos", "eostoken", "endoftext", "endofsentence", "endofdocument", "eot", "eotid", "eod", "imend", "sep")


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of the tokens that the tokenizer marks as special, by name."""
    found = tokenizer.get_added_tokens_decoder().items()
    return {token.content: int(number) for number, token in sorted(found) if token.special}


def document_start(tokenizer: Tokenizer) -> int | None:
    """The token that stands before every document, and thereby ends the previous document.

    It is END_OF_TEXT if the vocabulary has it. Otherwise it is the special token that is named as a begin token (<s>,
    [BOS], <|begin_of_text|>, ...), or else the one that is named as an end token (</s>, [EOS], <|im_end|>, ...). Only
    the names decide: a tokenizer.json does not say which token begins a text, and its post-processor is dropped when a
    model is loaded.

    Returns: the token's id, or None if there is no such token. Documents are then separated only by their recorded
        positions.
    """
    token = tokenizer.token_to_id(END_OF_TEXT)
    if token is not None:
        return int(token)
    by_word = _by_word(tokenizer)
    return next((by_word[word] for word in (*_BEGINS, *_ENDS) if word in by_word), None)


def document_ends(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end a document: the token that begins the next document, and the tokenizer's end tokens, if
    any."""
    by_word, start = _by_word(tokenizer), document_start(tokenizer)
    return frozenset([*(by_word[word] for word in _ENDS if word in by_word), *([] if start is None else [start])])


def _by_word(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of the special tokens, by their names reduced to lower-case letters and the slash."""
    return {re.sub(r"[^a-z/]", "", name.lower()): number for name, number in special_tokens(tokenizer).items()}
