"""A text of 5 GB is tokenized in less than 1 GB of memory, from lines of JSON and from a single text file."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path

import numpy as np
import pytest

from lkda.commands.studies import large_text
from lkda.commands.studies.large_text import KINDS, main, tokenize, variations, write_text
from lkda.data.text.tokenizer import load_tokenizer
from lkda.data.text.tokens import TokensDataModule

# Bytes of text, and GB of memory.
SIZE, MEMORY = 5e9, 1.0


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_for_a_large_text(kind: str, tmp_path: Path) -> None:
    path, out = tmp_path / f"large.{kind}", tmp_path / "tokens"
    documents = write_text(path, SIZE)
    assert path.stat().st_size >= SIZE
    assert tokenize(path, out)["memory_gb"] < MEMORY
    arrays = [np.load(out / f"{name}.npy", mmap_mode="r") for name in ("train", "test", "validation")]
    start = load_tokenizer(out / "tokenizer.json").token_to_id("<|endoftext|>")
    begun = sum(int((array == start).sum()) for array in arrays)
    assert begun == (documents if kind == "jsonl" else 3)  # the parts of a single text are its splits
    data = TokensDataModule(paths=[str(out)], context=1024, batch_size=4)
    data.prepare()
    assert data.tokenizer is not None
    if kind == "txt":
        (last,) = deque(variations(SIZE), maxlen=1)
        assert data.tokenizer.decode(arrays[2][-100:].tolist()) in last


NAMES = {"jsonl": "JSON Lines", "txt": "one text file"}
# Each is a process that trains a tokenizer.
MEASURED = [pytest.param(["txt"], marks=pytest.mark.slow), pytest.param(["jsonl", "txt"], marks=pytest.mark.long)]


@pytest.mark.parametrize("kinds", MEASURED)
def test_the_table(kinds: list[str], tmp_path: Path) -> None:
    words = ["--gigabytes", "0.0002", "--folder", str(tmp_path / "folder"), "--out", str(tmp_path / "out")]
    main([*words, "--kinds", *kinds])
    found = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [row["text"] for row in found["rows"]] == [NAMES[kind] for kind in kinds]
    assert all(0.05 < float(row["largest memory in GB"]) < MEMORY for row in found["rows"])
    assert not list((tmp_path / "folder").iterdir())


@pytest.mark.parametrize("size", ["nan", "inf", "0", "-1"])
def test_a_size_that_is_no_size_is_refused(
    size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is written: a text of nan bytes has no end."""
    monkeypatch.setattr(large_text, "measure", lambda *given: pytest.fail("a text was begun"))
    with pytest.raises(SystemExit) as ending:
        main([f"--gigabytes={size}", "--folder", str(tmp_path / "folder"), "--out", str(tmp_path / "out")])
    assert ending.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: --gigabytes must be a finite number above 0, got {size}."
    assert not list(tmp_path.iterdir())
