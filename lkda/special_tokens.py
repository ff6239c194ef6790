"""Which token begins a document and which end one, in lkda's own tokenizers and in those made elsewhere; and the target
that is no token."""

from __future__ import annotations

import re

from tokenizers import Tokenizer

# Begins every document in lkda's own tokenizers, and so ends the one before it.
END_OF_TEXT = "<|endoftext|>"
# The target at a position where nothing is predicted. It is what torch's losses ignore unless told otherwise.
IGNORE_INDEX = -100
# Names of begin and end tokens, most usual first, without case and without signs other than the slash: "<s>" is s,
# "[BOS]" and "<bos>" are bos, "<|begin_of_text|>" is beginoftext, "</s>" is /s, "<|im_end|>" is imend.
_BEGINS = ("s", "bos", "bostoken", "sos", "beginoftext", "startoftext", "beginofsentence", "beginofdocument", "cls")
_ENDS = ("/s", "eos", "eostoken", "endoftext", "endofsentence", "endofdocument", "eot", "eotid", "eod", "imend", "sep")


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of the tokens that the tokenizer marks as special, by name."""
    found = tokenizer.get_added_tokens_decoder().items()
    return {token.content: int(number) for number, token in sorted(found) if token.special}


def document_start(tokenizer: Tokenizer) -> int | None:
    """The token that stands before every document, and so ends the one before it.

    It is END_OF_TEXT where the vocabulary has it; else the special token that the tokenizer calls its begin (<s>,
    [BOS], <|begin_of_text|>, ...); else the one that it calls its end (</s>, [EOS], <|im_end|>, ...). The names alone
    decide: a tokenizer.json does not say which token begins a text, and a post-processor is dropped when a model is
    loaded.

    Returns: its id; None where there is no such token. Documents are then kept apart by their positions alone.
    """
    token = tokenizer.token_to_id(END_OF_TEXT)
    if token is not None:
        return int(token)
    by_word = _by_word(tokenizer)
    return next((by_word[word] for word in (*_BEGINS, *_ENDS) if word in by_word), None)


def document_ends(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens after which a document is over: the one that begins the next, and another tokenizer's end tokens."""
    by_word, start = _by_word(tokenizer), document_start(tokenizer)
    return frozenset([*(by_word[word] for word in _ENDS if word in by_word), *([] if start is None else [start])])


def _by_word(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of the special tokens by their names' letters and slash."""
    return {re.sub(r"[^a-z/]", "", name.lower()): number for name, number in special_tokens(tokenizer).items()}
