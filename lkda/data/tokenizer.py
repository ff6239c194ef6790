"""Byte-level BPE, trained and read through `tokenizers`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

# Begins every document, and ends the one before it.
END_OF_TEXT = "<|endoftext|>"
# The 256 bytes and END_OF_TEXT: with them no text is out of vocabulary.
SMALLEST_VOCABULARY = 257
# What other tokenizers call the tokens that begin and end a document; a tokenizer.json does not say which they are.
_BEGINS_AND_ENDS = ("<s>", "<bos>", "[BOS]", "<|begin_of_text|>", "</s>", "<eos>", "[EOS]", "<|end_of_text|>")


def check_vocab_size(vocab_size: int) -> None:
    """Raises ValueError for a vocabulary that cannot hold every byte."""
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"data.vocab_size must be at least {SMALLEST_VOCABULARY} (256 bytes and {END_OF_TEXT}), got {vocab_size}."
        )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` tokens, END_OF_TEXT being token 0.

    Raises: ValueError for a vocabulary that cannot hold every byte.
    """
    check_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a tokenizer.json, without the truncation and padding that it may ask for.

    Raises: ValueError where it is missing, broken, or lacks END_OF_TEXT.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no tokenizer at {path}.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{path} is not a tokenizer.json ({error}).") from error
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise ValueError(f"the tokenizer {path} has no token {END_OF_TEXT}, which begins every document.")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of `text` alone. A special token that is spelled in it is text like any other."""
    before = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True
    try:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)
    finally:
        tokenizer.encode_special_tokens = before


def document_start(tokenizer: Tokenizer) -> int | None:
    """The token that begins a document: END_OF_TEXT, else what a tokenizer made elsewhere calls its begin or end,
    by the usual names; None where it has none."""
    own = tokenizer.token_to_id(END_OF_TEXT)
    if own is not None:
        return int(own)
    added = tokenizer.get_added_tokens_decoder().items()
    special = {token.content: number for number, token in added if token.special}
    return next((special[name] for name in _BEGINS_AND_ENDS if name in special), None)


def vocabulary_rows(tokenizer: Tokenizer) -> int:
    """Rows that an embedding needs: one more than the largest token, for there may be gaps between tokens."""
    return 1 + max(tokenizer.get_vocab().values())


def unknown_token(tokenizer: Tokenizer) -> int | None:
    """The token that stands for text outside the vocabulary, if the tokenizer has one and it means nothing else."""
    model = json.loads(tokenizer.to_str())["model"]
    if model.get("unk_id") is not None:
        return int(model["unk_id"])
    name = model.get("unk_token")
    return tokenizer.token_to_id(name) if name and name != END_OF_TEXT else None
