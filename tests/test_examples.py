"""The scripts in examples/ do what they say. tests/documentation runs them as a reader would."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

import lkda
from tests.formats.models import model, tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"


def main_of(name: str) -> Any:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


@pytest.mark.slow
def test_a_model_with_kda_layers_learns_to_copy() -> None:
    assert main_of("kda_in_pytorch")() > 0.8


def test_a_carried_state_continues_packed_sequences() -> None:
    assert main_of("packed_sequences")() < 1e-6


def test_an_exported_model_continues_a_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lkda.export(model(("kda",)), tokenizer(), tmp_path / "exported")
    text = main_of("generate")(str(tmp_path / "exported"), "The people")
    assert text.startswith("The people")
    assert len(text) > len("The people")
    assert capsys.readouterr().out == text + "\n"


def test_a_directory_without_a_model_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["generate.py", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as ending:
        runpy.run_path(str(EXAMPLES / "generate.py"), run_name="__main__")
    assert str(ending.value.code).startswith(f"error: {tmp_path}/nowhere does not exist: give a directory that ")
