"""A disk that is full while a command writes: one line that names the file, nothing new left, the old files as they
were."""

from __future__ import annotations

import resource
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import lkda.commands.evaluate as evaluate_command
from lkda.commands.compare import compare
from lkda.commands.train import train
from tests.commands.small import ROOT, composed, small_run

BENCHMARK = ("device=cpu", "shapes=[1x16x1x16]", "dtypes=[fp32]", "backends=[chunk]", "modes=[fwd]", "replays=[eager]")


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Until the end, whatever writes a byte beyond `size` into a file meets the system's error, in C or in Python."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def files(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "one"
    train(composed("train", *small_run(corpus, "trainer.max_steps=3", "sample.max_new_tokens=0")), directory)
    return directory


def error_of(
    script: str, words: list[str], size: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """What the script ends with on such a disk: one line."""
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(SystemExit) as ending, largest_file(size):
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    assert ending.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1, lines
    assert "Traceback" not in lines[0]
    return lines[0]


@pytest.mark.parametrize("size", [300, 5_000])  # of what `datasets` keeps, and of the tokens
def test_the_cache(
    size: int, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*small_run(corpus), f"data.cache_dir={tmp_path}/cache", f"hydra.run.dir={tmp_path}/run"]
    line = error_of("train.py", words, size, monkeypatch, capsys)
    assert line.startswith(
        f"error: cannot write the cache {tmp_path}/cache/corpora: File too large. Set data.cache_dir"
    )
    assert not files(tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_result_of_evaluate(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write_on_it(*arguments: Any) -> None:
        with largest_file(100):  # not before: the model's tokenizer is written down for the data to read
            write(*arguments)

    write = evaluate_command._write
    monkeypatch.setattr(evaluate_command, "_write", write_on_it)
    out = tmp_path / "result.json"
    out.write_text("the old one")
    line = error_of("evaluate.py", [f"ckpt={run}", f"out={out}", "accelerator=cpu"], 1_000_000, monkeypatch, capsys)
    assert line == f"error: {out}: File too large."
    assert files(tmp_path) == {out: b"the old one"}


@pytest.mark.sample(2)
@pytest.mark.parametrize(("form", "size"), [("lkda", 1_000), ("hf", 1_000), ("lkda", 50_000), ("gguf", 50_000)])
def test_an_export(
    form: str, size: int, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "exported"
    line = error_of("export.py", [f"ckpt={run}", f"out={out}", f"format={form}"], size, monkeypatch, capsys)
    assert line.startswith(f"error: {out}: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_a_comparison(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "comparison"
    compare(composed("compare", f"runs={run}", f"out={out}", "title=before"))
    before = files(tmp_path)
    capsys.readouterr()
    line = error_of("compare.py", [f"runs={run}", f"out={out}", "title=after"], 20_000, monkeypatch, capsys)
    assert line == f"error: out={out} cannot be written: File too large."
    assert files(tmp_path) == before


@pytest.mark.long
def test_a_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What was measured is kept; of what is made of it, all or nothing is new."""
    out = tmp_path / "benchmark"
    line = error_of("benchmark.py", [*BENCHMARK, "milliseconds=1", f"out={out}"], 20_000, monkeypatch, capsys)
    assert line.startswith(f"error: {out}/")
    assert line.endswith(": File too large.")
    assert list(files(tmp_path)) == [out / "benchmark.json"]
