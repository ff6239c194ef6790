"""Trains and loads tokenizers through the library `tokenizers`, and converts text to tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer, decoders, models, pre_tokenizers, trainers

from lkda.checks import InputError
from lkda.data.words import LONGEST_WORD, word_splitter
from lkda.special_tokens import END_OF_TEXT, document_start, special_tokens
from lkda.tokenizer_loading import refusing_panics, tokenizer_from_file

__all__ = [
    "END_OF_TEXT",
    "LONGEST_WORD",
    "SMALLEST_VOCABULARY",
    "check_vocab_size",
    "decode_tokens",
    "document_start",
    "encode_text",
    "encode_texts",
    "first_unknown",
    "load_tokenizer",
    "train_tokenizer",
    "unknown_token",
    "vocabulary_rows",
    "word_splitter",
]

# The 256 bytes and END_OF_TEXT. With them, every text can be tokenized.
SMALLEST_VOCABULARY = 257


def check_vocab_size(vocab_size: int, *, option: str = "data.vocab_size") -> None:
    """Raises InputError, naming the option, for a vocabulary that cannot hold every byte."""
    if vocab_size < SMALLEST_VOCABULARY:
        raise InputError(
            f"{option} must be at least {SMALLEST_VOCABULARY} (256 bytes and {END_OF_TEXT}), got {vocab_size}."
        )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab_size` tokens. END_OF_TEXT is token 0.

    Raises: InputError for a vocabulary that cannot hold every byte.
    """
    check_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = word_splitter()
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
    """Load a tokenizer.json, with its truncation and padding turned off.

    Raises: InputError if it is missing or broken, or could make texts very long.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        inside = path / "tokenizer.json"
        advice = str(inside) if inside.is_file() else "the path of a tokenizer.json"
        raise InputError(f"there is no tokenizer at {path}, which {what}: give {advice}.")
    return tokenizer_from_file(path)


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """The token ids of a text, without special tokens: "<|endoftext|>" in a text is thirteen ordinary characters."""
    with _special_tokens_as_text(tokenizer):
        encoding = tokenizer.encode(text, add_special_tokens=False)
    return _without_special(tokenizer, [text], [encoding])[0].ids


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Encoding]:
    """Encode many texts in parallel, as `encode_text` does. Without offsets, which would take as long again."""
    with _special_tokens_as_text(tokenizer):
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return _without_special(tokenizer, texts, encodings)


def decode_tokens(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """The text of tokens, without special tokens."""
    with refusing_panics():
        text: str = tokenizer.decode(token_ids, skip_special_tokens=True)
    return text


def first_unknown(tokenizer: Tokenizer, text: str) -> str:
    """The part of a text that the first token for unknown text stands for. The text must have one."""
    unknown = unknown_token(tokenizer)
    assert unknown is not None
    with _special_tokens_as_text(tokenizer):
        (encoding,) = _without_special(tokenizer, [text], [tokenizer.encode(text, add_special_tokens=False)])
    begin, end = encoding.offsets[encoding.ids.index(unknown)]
    return text[begin:end]


@contextmanager
def _special_tokens_as_text(tokenizer: Tokenizer) -> Iterator[None]:
    """A context in which special tokens are not recognized in text, which a tokenizer file cannot ask for, and in which
    a panic of the library becomes an InputError."""
    with refusing_panics():
        before = tokenizer.encode_special_tokens
        tokenizer.encode_special_tokens = True
        try:
            yield
        finally:
            tokenizer.encode_special_tokens = before


@refusing_panics()
def _without_special(tokenizer: Tokenizer, texts: Sequence[str], encodings: list[Encoding]) -> list[Encoding]:
    """`encodings`, or new ones if the tokenizer's model itself (a WordLevel or a Unigram model) found a special token
    in a text.

    The token for unknown text may stay, because it shows that the text has something unknown.
    """
    start = document_start(tokenizer)
    special = {*special_tokens(tokenizer).values(), *([] if start is None else [start])}
    found = {token for encoding in encodings for token in special.intersection(encoding.ids)}
    if not found:
        return encodings
    unknown = unknown_token(tokenizer)
    if found == {unknown}:
        return encodings
    names = {str(tokenizer.id_to_token(token)) for token in special if token != unknown}
    # Put characters that occur in no text before the names, so that no text can contain these names.
    mark = "\U0010ffff"
    while any(mark in text for text in texts):
        mark += "\U0010ffff"
    renamed = _with_marked_names(tokenizer, names, mark)
    with _special_tokens_as_text(renamed):
        return renamed.encode_batch(texts, add_special_tokens=False)


def _with_marked_names(tokenizer: Tokenizer, names: set[str], mark: str) -> Tokenizer:
    """A copy of the tokenizer with `mark` before the names of some tokens. The ids stay the same."""

    def marked(name: str) -> str:
        return mark + name if name in names else name

    content: dict[str, Any] = json.loads(tokenizer.to_str())
    model = content["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {marked(name): token for name, token in model["vocab"].items()}
    else:
        model["vocab"] = [[marked(name), score] for name, score in model["vocab"]]
    if "merges" in model:
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if names.isdisjoint((*pair, "".join(pair)))]
    for added in content["added_tokens"]:
        added["content"] = marked(added["content"])
    content["post_processor"] = None  # it names special tokens
    return Tokenizer.from_str(json.dumps(content))


def vocabulary_rows(tokenizer: Tokenizer) -> int:
    """The number of embedding rows that are needed: the largest token id plus 1, because there may be gaps between
    ids."""
    return 1 + max(tokenizer.get_vocab().values())


def unknown_token(tokenizer: Tokenizer) -> int | None:
    """The id of the token for text outside the vocabulary. None if the tokenizer has none, or uses it to begin
    documents."""
    model = json.loads(tokenizer.to_str())["model"]
    if model.get("unk_id") is not None:
        return int(model["unk_id"])
    name = model.get("unk_token")
    token = tokenizer.token_to_id(name) if name else None
    return None if token == document_start(tokenizer) else token
