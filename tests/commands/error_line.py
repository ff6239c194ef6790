"""The line that a script ends with, if it is given something that it cannot use."""

from __future__ import annotations

import runpy
import sys

import pytest
import torch

from tests.commands.small import ROOT


def error_line(
    script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """The one line that the script ends with, on a machine without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as ending:
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    printed = capsys.readouterr().err.strip()
    assert ending.value.code == 2, printed
    assert printed.startswith("error: "), printed
    assert "\n" not in printed
    return printed
