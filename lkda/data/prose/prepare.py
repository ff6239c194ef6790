"""Prepares a corpus from a mix of sources: collects and tokenizes their documents, and removes held-out text from the
training text.

Each step of each source is kept in the cache when it is complete. A corpus that was interrupted therefore goes on with
the step that was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress
from tokenizers import Tokenizer

from lkda.checks import InputError
from lkda.data.fingerprint import of_tokenizer
from lkda.data.progress import patient_progress
from lkda.data.prose.collect import SPLITS, TEST_REMAINDER, Collected, collect, copy_collected_licences
from lkda.data.prose.decontaminate import WINDOW, decontaminate
from lkda.data.prose.sources import Source
from lkda.data.text.cache import building, metadata_of, publish
from lkda.data.text.token_file import parts_of, writing_token_file
from lkda.data.text.tokenize import train_on, write_token_file
from lkda.data.text.tokenizer import check_vocab_size, load_tokenizer

OF_BEFORE = "_without_test"  # suffix of the renamed directory of a corpus without a test split


def prepare_mix(
    directory: Path,
    *,
    sources: Mapping[Source, int | None],
    vocab_size: int,
    cache_dir: Path,
    paths: Mapping[str, Path] | None = None,
    tokenizer_path: Path | None = None,
) -> dict[str, Any]:
    """Collect and tokenize the texts of `sources`, and drop held-out text from the training text.

    The result is train.npy, validation.npy, test.npy, tokenizer.json, manifest.json and the packages' licences in
    `directory`, which is created atomically. A corpus of an earlier version without a test split is renamed and kept,
    for the runs that were trained on it.

    Args:
        directory: the directory to create.
        sources: the sources, with the largest number of megabytes of each (None: all).
        vocab_size: of the byte-level BPE that is trained on the training documents, before any are dropped.
        cache_dir: where the steps of each source are kept.
        paths: the files of local sources, by name.
        tokenizer_path: a byte-level tokenizer.json to use instead of training one.
    Returns: the manifest.
    Raises: InputError if a package cannot be downloaded or holds no text, or if the directory exists already.
    """
    check_vocab_size(vocab_size, option="vocab_size")
    given = load_tokenizer(tokenizer_path) if tokenizer_path is not None else None
    aside = directory.with_name(f"{directory.name}{OF_BEFORE}")
    earlier = is_without_test(directory)
    if (directory.exists() and not earlier) or (earlier and aside.exists()):
        there = aside if earlier else directory
        raise InputError(f"{there} exists already: give another out, or remove it.")
    with building(directory) as scratch, patient_progress() as progress:
        built = scratch / "built"
        built.mkdir()
        collected = _collect(sources, paths or {}, cache_dir, progress)
        tokenizer = given or _tokenizer(collected, vocab_size, cache_dir, progress)
        (built / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        tokenized = [_tokenize(own, tokenizer, cache_dir, progress) for own in collected]
        manifest = _assemble(built, collected, tokenized, tokenizer, vocab_size, progress)
        if earlier:
            directory.rename(aside)
        publish(built, directory, {f"{name}_bytes": manifest[f"{name}_bytes"] for name in ("validation", "test")})
    for entry in tokenized:
        shutil.rmtree(entry, ignore_errors=True)
    return manifest


def _say(step: str, progress: Progress) -> None:
    """Print the step that begins where there is no terminal, and so no progress bar."""
    if not progress.console.is_terminal:
        progress.console.print(step, soft_wrap=True, markup=False, highlight=False)


def is_without_test(directory: Path) -> bool:
    """Whether the directory holds a corpus of an earlier version, without a test split."""
    metadata = metadata_of(directory)
    return metadata is not None and "test_bytes" not in metadata


def _collect(
    sources: Mapping[Source, int | None], paths: Mapping[str, Path], cache_dir: Path, progress: Progress
) -> list[Collected]:
    collected = []
    task = progress.add_task("collecting sources", total=len(sources))
    for source, megabytes in sources.items():
        _say(f"collecting {source.name}", progress)
        path = paths.get(source.name)
        collected.append(collect(source, megabytes=megabytes, path=path, cache_dir=cache_dir, progress=progress))
        progress.advance(task)
    progress.remove_task(task)
    if not any(own.manifest["test_documents"] for own in collected):
        raise InputError(
            f"at least one source must have {TEST_REMAINDER + 1} documents to make a test split: name more sources."
        )
    return collected


def _tokenizer(collected: Sequence[Collected], vocab_size: int, cache_dir: Path, progress: Progress) -> Tokenizer:
    """The tokenizer that is trained on the training documents of all sources. It is kept in the cache."""
    names = json.dumps([vocab_size, [own.directory.name for own in collected]])
    entry = cache_dir / "sources" / f"tokenizer_{hashlib.sha256(names.encode()).hexdigest()[:16]}"
    with building(entry) as scratch:
        if metadata_of(entry) is None:
            built = scratch / "built"
            built.mkdir()
            size = sum(own.manifest["train_bytes"] for own in collected)
            _say(f"training a tokenizer of {vocab_size} tokens on {size / 1e6:.0f} MB", progress)
            documents = chain.from_iterable(own.texts("train") for own in collected)
            tokenizer = train_on(documents, vocab_size=vocab_size, size=size, progress=progress)
            (built / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
            publish(built, entry, {})
    return load_tokenizer(entry / "tokenizer.json")


def _tokenize(collected: Collected, tokenizer: Tokenizer, cache_dir: Path, progress: Progress) -> Path:
    """The directory of the token files of a source, one for each split, which is kept until the corpus is complete."""
    entry = cache_dir / "sources" / f"{collected.directory.name}_{of_tokenizer(tokenizer)[:16]}"
    with building(entry) as scratch:
        if metadata_of(entry) is None:
            built = scratch / "built"
            built.mkdir()
            _say(f"tokenizing {collected.source.name}", progress)
            for name in SPLITS:
                write_token_file(built / f"{name}.npy", tokenizer, collected.texts(name), progress)
            publish(built, entry, {})
    return entry


def _assemble(
    built: Path,
    collected: Sequence[Collected],
    tokenized: Sequence[Path],
    tokenizer: Tokenizer,
    vocab_size: int,
    progress: Progress,
) -> dict[str, Any]:
    """Write the token files of all sources together, the licences, and manifest.json. Returns the manifest."""
    _say("removing the held-out text from the training text", progress)
    places = {name: _concatenate(built / f"{name}.npy", tokenized, name) for name in SPLITS[1:]}
    found = decontaminate(
        [entry / "train.npy" for entry in tokenized],
        {name: built / f"{name}.npy" for name in SPLITS[1:]},
        built / "train.npy",
        tokenizer=tokenizer,
        progress=progress,
    )
    listed, begin = [], 0
    for n, own in enumerate(collected):
        end = begin + found.sources[n].tokens
        tokens = {"train": [begin, end], **{name: places[name][n] for name in SPLITS[1:]}}
        listed.append({**own.manifest, "dropped_bytes": found.sources[n].dropped_bytes, "tokens": tokens})
        begin = end
        copy_collected_licences(own, built / "licences")
    sizes = {f"{name}_bytes": sum(own.manifest[f"{name}_bytes"] for own in collected) for name in SPLITS[1:]}
    dropped = {"window_tokens": WINDOW, "before": found.before, "after": found.after}
    dropped |= {"dropped_bytes": found.dropped_bytes, "train_bytes": found.train_bytes}
    manifest = {"vocab_size": vocab_size, "sources": listed, **sizes, "decontamination": dropped}
    (built / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def _concatenate(path: Path, tokenized: Sequence[Path], name: str) -> list[list[int]]:
    """Write the tokens of a split of all sources. Returns [begin, end) of each source."""
    places, begin = [], 0
    arrays = [np.load(entry / f"{name}.npy", mmap_mode="r") for entry in tokenized]
    with writing_token_file(path, arrays[0].dtype) as write:
        for array in arrays:
            for part in parts_of(array):
                write(part)
            places.append([begin, begin + len(array)])
            begin += len(array)
    return places
