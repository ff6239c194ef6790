"""Training text in which passages are repeated, made from the training text of a prepared corpus.

    python scripts/prepare_data.py mix=english path=NOVELS
    python -m lkda.data.text.passages

The second command reads the corpus of data=english in the cache, and writes english_passages beside it. --help names
the options.

A model that is trained on it, beside the corpus, learns the recall that data=needle measures: a passage occurs, and
later its beginning occurs again, from which the rest can be named. Each document is a piece of training text into which
passages from elsewhere in that text are inserted, each at four random places. Half of a document's tokens are those of
passages. Documents have several lengths, with about as many tokens of each, because recall over short distances is
learnt first. The validation and the test text are not used. data=tokens reads the directory:
data.paths=[CORPUS,PASSAGES] data.weights=[0.5,0.5].
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from lkda.checks import InputError, check_count
from lkda.data.text.cache import building, expanded, publish
from lkda.data.text.token_file import writing_token_file
from lkda.data.text.tokenize import load_tokenized
from lkda.data.text.tokenizer import document_start
from lkda.io import default_cache_dir

PASSAGE = 32  # tokens of a passage, as those of data=needle by default (data.cue + data.answer)
TIMES = 4  # that a passage occurs in its document
EVERY = 2 * TIMES * PASSAGE  # tokens of a document for each of its passages


def document(token_ids: np.ndarray, *, start: int, length: int, passages: int, number: int) -> np.ndarray:
    """A document of `length` tokens, int64, the same for every call with the same arguments.

    Args:
        token_ids: the text, [N].
        start: the token that begins documents. It comes first, and is left out elsewhere.
        passages: how many passages are inserted, each TIMES times.
        number: the number of the document.
    """
    rng = np.random.default_rng((length, passages, number))

    def piece(count: int) -> np.ndarray:
        begin = int(rng.integers(len(token_ids) - 2 * count))
        found = token_ids[begin : begin + 2 * count]
        return found[found != start][:count]

    text = piece(length - 1 - TIMES * passages * PASSAGE)
    inserted = [piece(PASSAGE) for _ in range(passages)]
    places = np.sort(rng.integers(len(text) + 1, size=TIMES * passages))
    pieces = np.split(text, places)
    order = rng.permutation(np.repeat(np.arange(passages), TIMES))
    joined = [pieces[0], *(part for which, piece in zip(order, pieces[1:]) for part in (inserted[which], piece))]
    return np.concatenate([[start], *joined]).astype(np.int64)


def write_passages(
    corpus: Path, out: Path, *, lengths: Sequence[int], tokens: int, console: Console | None = None
) -> tuple[int, int]:
    """Write train.npy and the tokenizer of `corpus` into `out`, which is created atomically.

    Args:
        lengths: tokens of a document. There are about as many tokens of each length, in documents of random order.
        tokens: how many in all, at least the sum of the lengths.
        console: where progress is shown.
    Returns: the numbers of documents and of tokens.
    Raises: InputError if `out` exists, or if the corpus is missing, too short, or does not mark where documents begin.
    """
    for length in lengths:
        check_count("--lengths", length, least=EVERY)
    check_count("--tokens", tokens, least=sum(lengths))
    if out.exists():
        raise InputError(f"{out} exists already: give another --out, or remove it.")
    tokenized = load_tokenized(corpus, mix="english" if corpus.name == "english" else None)
    start = document_start(tokenized.tokenizer)
    if start is None:
        raise InputError(f"the tokenizer of {corpus} has no token that begins documents, which is needed here.")
    found = len(tokenized.train)
    if found < 4 * max(lengths):
        raise InputError(f"{corpus} has {found} tokens for training: give --lengths of at most {found // 4}.")
    order = np.random.default_rng(0).permutation(
        np.repeat(lengths, [tokens // len(lengths) // length or 1 for length in lengths])
    )
    with building(out) as scratch:
        built = scratch / "built"
        built.mkdir()
        (built / "tokenizer.json").write_bytes((corpus / "tokenizer.json").read_bytes())
        with writing_token_file(built / "train.npy", tokenized.train.dtype) as write:
            for number, length in enumerate(track(order, "documents", console=console, disable=console is None)):
                write(document(tokenized.train, start=start, length=length, passages=length // EVERY, number=number))
        publish(built, out, {})
    return len(order), int(order.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="a directory of scripts/prepare_data.py; default: english in the cache")
    parser.add_argument("--out", help="the directory to create; default: that of the corpus with _passages at the end")
    what = f"tokens of a document, {EVERY} or more"
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help=what)
    parser.add_argument("--tokens", type=int, default=2**25, help="of all documents")
    given = parser.parse_args()
    corpus = expanded(given.corpus) if given.corpus else default_cache_dir() / "english"
    out = expanded(given.out) if given.out else corpus.with_name(f"{corpus.name}_passages")
    console = Console()
    documents, tokens = write_passages(corpus, out, lengths=given.lengths, tokens=given.tokens, console=console)
    console.print(f"{documents:,} documents, {tokens:,} tokens, are in {out}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
