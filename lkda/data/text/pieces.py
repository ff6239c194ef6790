"""Text to tokens in pieces, so that the memory does not grow with the length of a document."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import PreTokenizer

from lkda.checks import InputError
from lkda.data.text.documents import Text, blocks_of
from lkda.data.text.tokenizer import document_start, encode_texts, first_unknown
from lkda.tokenizer_loading import refusing_panics

# Characters that are tokenized at a time. Meanwhile `tokenizers` needs a few hundred bytes of memory per character.
_AT_ONCE = 2**21
_PIECE = 2**18
# Positions where a long document may be split: byte-level BPE never merges a word with a space after it.
_SEAM = re.compile(r"(?<=\S) (?=\S)")


def pieces_of(document: Text, splitter: PreTokenizer | None) -> Iterator[str]:
    """The text in pieces of about _PIECE characters, whose tokens are together those of the whole text.

    Args:
        splitter: the tokenizer's pre-tokenizer, if no normalizer changes the text before. It finds the positions where
            a text without spaces may be split.
    """
    text, begin = "", 0
    for block in blocks_of(document):
        text, begin = text[begin:] + block, 0
        while (end := _piece_end(text, begin, splitter)) is not None:
            yield text[begin:end]
            begin = end
    if begin < len(text):
        yield text[begin:]


@refusing_panics()
def _piece_end(text: str, begin: int, splitter: PreTokenizer | None) -> int | None:
    """The end of the piece that begins at `begin`. None if the text has no such end, or does not show it yet."""
    if begin + _PIECE >= len(text):
        return None
    seam = _SEAM.search(text, begin + _PIECE, begin + 2 * _PIECE)
    if seam:
        return seam.start()
    if begin + 2 * _PIECE > len(text):  # a longer text may have a seam there
        return None
    words = splitter.pre_tokenize_str(text[begin : begin + _PIECE]) if splitter is not None else []
    if splitter is not None and len(words) > 2:
        word, (place, _) = words[-2]  # not the last one, which may be incomplete
        again = splitter.pre_tokenize_str(text[begin + place : begin + _PIECE])
        if again[0][0] == word:  # the word is the same at the beginning of a text; some splitters put a space before it
            return begin + place
    seam = _SEAM.search(text, begin + 2 * _PIECE)
    return seam.start() if seam else None


def batches_of(documents: Iterable[Text], tokenizer: Tokenizer) -> Iterator[list[tuple[bool, str]]]:
    """Batches of about _AT_ONCE characters: (whether a document begins here, piece) for each piece."""
    splitter = tokenizer.pre_tokenizer if tokenizer.normalizer is None else None
    batch, size = [], 0
    for document in documents:
        for n, piece in enumerate(pieces_of(document, splitter)):
            batch.append((n == 0, piece))
            size += len(piece)
            if size >= _AT_ONCE:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def encode_batch(
    tokenizer: Tokenizer, batch: Sequence[tuple[bool, str]], *, unknown: int | None, dtype: np.dtype
) -> tuple[np.ndarray, list[int]]:
    """The token ids of a batch of pieces, and the positions where documents begin.

    Args:
        unknown: the token for unknown text, if there is one.
    Raises: InputError for text outside the vocabulary.
    """
    start = document_start(tokenizer)
    first = [] if start is None else [start]
    parts, places, count = [], [], 0
    encodings = encode_texts(tokenizer, [piece for _, piece in batch])
    for (begins, piece), encoding in zip(batch, encodings):
        ids = encoding.ids
        if unknown is not None and unknown in ids:
            raise InputError(
                f"the tokenizer of data.tokenizer_path has no token for {first_unknown(tokenizer, piece)!r}, which is "
                "in the text; give a tokenizer that has every byte, or leave data.tokenizer_path out."
            )
        if begins:
            places.append(count)
        parts.append(np.array([*first, *ids] if begins else ids, dtype=dtype))
        count += len(parts[-1])
    return np.concatenate(parts), places
