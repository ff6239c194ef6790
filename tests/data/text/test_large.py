"""A text of 5 GB is tokenized in less than 1 GB of memory, from lines of JSON and from a single text file."""

from __future__ import annotations

import json
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
from tests.commands.small import ROOT

# Gigabytes of text, and of memory.
TEXT, MEMORY = 5.0, 1.0
# A process of its own, which prints its largest memory in kB.
MEASURED = """
import resource, runpy, sys
sys.argv = ["prepare_data.py", *sys.argv[1:]]
runpy.run_path("scripts/prepare_data.py", run_name="__main__")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
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
    path, documents, last = tmp_path / f"large.{kind}", 0, ""
    with open(path, "w", encoding="utf-8") as file:
        for last in variations(TEXT * 1e9):
            file.write(json.dumps({"text": last}) + "\n" if kind == "jsonl" else last)
            documents += 1
    command = [sys.executable, "-c", MEASURED, f"paths=[{path}]", f"out={tmp_path}/tokens"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    used = int(done.stdout.split()[-1]) * 1024 / 1e9
    assert used < MEMORY, f"{used:.2f} GB"
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
