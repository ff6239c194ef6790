"""A text of 5 GB is tokenized in less than 1 GB of memory, from lines of JSON and from a single text file."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lkda.data.text.files import sotu_sources
from lkda.data.text.tokenizer import load_tokenizer
from lkda.data.text.tokens import TokensDataModule

# Gigabytes of text, and of memory.
TEXT, MEMORY = 5.0, 1.0
MEASURED = """
import resource, runpy, sys
sys.argv = ["prepare_data.py", *sys.argv[1:]]
runpy.run_path("scripts/prepare_data.py", run_name="__main__")
"""


def variations(size: float) -> Iterator[str]:
    """The State of the Union addresses again and again, with a number in each sentence that is another every time."""
    speeches = [path.read_text(encoding="utf-8") for path in sotu_sources().train]
    written = count = 0
    while written < size:
        for speech in speeches:
            text = ".".join(f"{sentence} {count * 7919 % 1_000_003}" for sentence in speech.split("."))
            count += 1
            written += len(text.encode())
            yield text
            if written >= size:
                return


@pytest.mark.long
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_a_text_of_5_gb_needs_less_than_1_gb_of_memory(tmp_path: Path, kind: str) -> None:
    path, documents = tmp_path / f"large.{kind}", 0
    with open(path, "w", encoding="utf-8") as file:
        for documents, text in enumerate(variations(TEXT * 1e9), 1):
            file.write(json.dumps({"text": text}) + "\n" if kind == "jsonl" else text)
            last = text
    command = [sys.executable, "-c", MEASURED, f"paths=[{path}]", f"out={tmp_path}/tokens"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    assert used == before * 1024 / 1e9 or used < MEMORY, f"{used:.2f} GB"
    arrays = [np.load(tmp_path / "tokens" / f"{name}.npy", mmap_mode="r") for name in ("train", "test", "validation")]
    start = load_tokenizer(tmp_path / "tokens" / "tokenizer.json").token_to_id("<|endoftext|>")
    assert sum(int((array == start).sum()) for array in arrays) == (documents if kind == "jsonl" else 3)
    data = TokensDataModule(paths=[str(tmp_path / "tokens")], context=1024, batch_size=4)
    data.prepare()
    assert data.tokenizer is not None
    if kind == "txt":
        assert data.tokenizer.decode(arrays[2][-100:].tolist()) in last
    shutil.rmtree(tmp_path / "tokens")
    path.unlink()
