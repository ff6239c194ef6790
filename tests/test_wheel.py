"""What `pip install lkda` brings works by itself, outside of a checkout."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lkda.ops.runtime import jit

ROOT = Path(__file__).parents[1]
SOURCES = ("lkda", "configs", "tasks", "pyproject.toml", "setup.py", "README.md", "LICENSE")


def run(command: list[str], where: Path, installed: Path | None = None) -> str:
    """Standard output of `command` in `where`, which sees the installed package before any other lkda."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if installed is not None:
        environment["PYTHONPATH"] = str(installed)
    done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def has_setuptools() -> bool:
    """Whether the environment has the setuptools that pyproject.toml asks for; else pip fetches one."""
    try:
        return int(importlib.metadata.version("setuptools").split(".")[0]) >= 77
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the checkout and nothing there is taken along."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    isolation = ["--no-build-isolation"] if has_setuptools() else []
    run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", *isolation, "-w", str(built), str(source)], built)
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), str(wheel)], folder)
    return folder


@pytest.mark.slow
def test_nothing_of_the_checkout_is_missing(wheel: Path) -> None:
    kinds = ("*.py", "*.cu", "*.cuh", "*.cpp", "*.h", "py.typed")
    wanted = {path.relative_to(ROOT) for kind in kinds for path in (ROOT / "lkda").rglob(kind)}
    wanted |= {"lkda" / path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml")}
    wanted |= {"lkda" / path.relative_to(ROOT) for path in (ROOT / "tasks").glob("*.*")}
    packed = {Path(name) for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == wanted


@pytest.mark.long
def test_the_command_trains_and_exports(installed: Path, corpus: Path, tmp_path: Path) -> None:
    lkda = str(installed / "bin" / "lkda")
    data = ["data=files", f"data.paths=[{corpus}]"]
    printed = run([lkda, "train", "debug=fast", *data, "trainer=cpu", "hydra.run.dir=run"], tmp_path, installed)
    assert "lkda generate ckpt=run/checkpoints/last.ckpt" in printed
    run([lkda, "export", "ckpt=run", "out=exported"], tmp_path, installed)
    code = (
        "import torch, lkda\n"
        "from lkda.shipped import CONFIGS, TASKS\n"
        f"home = {str(installed / 'lkda')!r}\n"
        "assert all(str(path).startswith(home) for path in (lkda.__file__, CONFIGS, TASKS))\n"
        "model, tokenizer = lkda.load('exported')\n"
        "tokens = torch.tensor([tokenizer.encode('the president').ids])\n"
        "print(list(model(tokens).shape) == [*tokens.shape, model.config['vocab_size']])\n"
    )
    assert run([sys.executable, "-c", code], tmp_path, installed).strip() == "True"
    assert {path.name for path in tmp_path.iterdir()} == {"run", "exported"}


@pytest.mark.skipif(jit._reason_no_compiler() is not None, reason=str(jit._reason_no_compiler()))
@pytest.mark.slow
def test_a_kernel_compiles(installed: Path, tmp_path: Path) -> None:
    code = (
        "import lkda\n"
        "from lkda.bench import resources\n"
        "used = resources.usage(('lkda.ops.simplified.cuda.core', 'sm_90a', 0))\n"
        "print(lkda.__file__, used.registers)\n"
    )
    path, registers = run([sys.executable, "-c", code], tmp_path, installed).split()
    assert Path(path).is_relative_to(installed)
    assert int(registers) > 0
