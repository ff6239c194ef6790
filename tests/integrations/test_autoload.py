"""LKDA_FLA registers lkda with FLA without a line of code. FLA itself is not needed here: modules stand for its own."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lkda
from lkda.integrations import autoload, fla


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A package `stand_in` with one module for each part, and the parts that are registered when."""
    folder = tmp_path / "stand_in"
    folder.mkdir()
    for name in ("__init__", *fla.PARTS):
        (folder / f"{name}.py").write_text("complete = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(autoload, "_COMPLETE", {f"stand_in.{part}": part for part in fla.PARTS})
    found = []

    def register(parts):
        assert sys.modules[f"stand_in.{parts[0]}"].complete
        found.append(parts)

    monkeypatch.setattr(autoload, "register", register)
    before = list(sys.meta_path)
    yield found
    sys.meta_path[:] = before
    for name in [name for name in sys.modules if name.startswith("stand_in")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("words", "parts"),
    [("1", ["kda", "norm"]), ("all", ["kda", "norm"]), ("norm, conv", ["norm"]), ("0", []), ("", [])],
)
def test_the_variable_chooses_what_an_import_registers(words, parts, stand_in, monkeypatch):
    monkeypatch.setenv("LKDA_FLA", words)
    autoload.autoload()
    for part in ("kda", "norm", "kda"):
        importlib.import_module(f"stand_in.{part}")
    assert stand_in == [(part,) for part in parts]


def test_a_second_call_changes_nothing(stand_in, monkeypatch):
    """PyTorch makes the first one."""
    monkeypatch.setenv("LKDA_FLA", "kda")
    autoload.autoload()
    autoload.autoload()
    importlib.import_module("stand_in.kda")
    assert stand_in == [("kda",)]


def test_an_unknown_part_is_named(stand_in, monkeypatch):
    monkeypatch.setenv("LKDA_FLA", "kda,gate")
    autoload.autoload()
    with pytest.raises(ValueError, match=r"LKDA_FLA: parts must be some of .*, swiglu, got \('kda', 'gate'\)"):
        importlib.import_module("stand_in.kda")


def test_pytorch_calls_it():
    project = tomllib.loads((Path(lkda.__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, function = project["entry-points"]["torch.backends"]["lkda"].partition(":")
    assert getattr(importlib.import_module(module), function) is autoload.autoload


def test_it_imports_neither_torch_nor_fla():
    """`import torch` calls it before torch is complete."""
    code = "import sys, lkda.integrations.autoload as a; a.autoload(); print({'torch', 'fla'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"LKDA_FLA": "1"}, check=True
    )
    assert done.stdout.strip() == "set()"


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "fla.backends", None)
    with pytest.raises(ValueError, match=r"needs flash-linear-attention 0.6 or later .*pip install 'flash-linear"):
        fla.register()
    with pytest.raises(ValueError, match="parts must be some of kda, conv, norm, swiglu, got 'kda'"):
        fla.register("kda")
