"""Checkpoints: written whole or not at all, read as tensors and plain values only.

A file is Lightning's checkpoint plus `checkpoint["lkda"]`, which makes it self-contained:
    {"format": 1, "model": the dict of `build_model`, "tokenizer": JSON text, "run": plain values that describe the run}
where the tokenizer is None for a model of tokens that are no text.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lkda.checks import InputError
from lkda.io import replace_file, replacing

FORMAT = 1
_STEP = re.compile(r"step_(\d+)\.ckpt")


def step_path(directory: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies. No `=` in the name: Hydra's command line cannot take one."""
    return directory / f"step_{step:07d}.ckpt"


def step_files(directory: Path) -> list[Path]:
    """The step checkpoints of `directory`, oldest first."""
    found = [(int(match[1]), path) for path in directory.glob("*.ckpt") if (match := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint writer, through a temporary file, fsync and a rename."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # what torch's writer makes of an OSError
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from error
                raise


def point_to(target: Path, link: Path) -> None:
    """Make `link` another name of the file `target`, atomically; a copy where the file system has no hard links."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(target, temporary)
    except OSError:
        with replacing(link) as file, open(target, "rb") as source:
            shutil.copyfileobj(source, file)
        return
    replace_file(temporary, link)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint of ours onto the CPU with `weights_only=True`: nothing in the file is executed.

    Raises:
        InputError: the file is missing, truncated, not a checkpoint, or not one of lkda.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no checkpoint at {path}.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types here (RuntimeError, EOFError, UnpicklingError, KeyError, ...)
        raise InputError(
            f"{path} is truncated or not a checkpoint ({type(error).__name__} while reading it)."
        ) from error
    if not isinstance(checkpoint, Mapping) or "lkda" not in checkpoint:
        raise InputError(f"{path} is not a checkpoint of lkda: it lacks the entry 'lkda' that scripts/train.py writes.")
    if checkpoint["lkda"]["format"] != FORMAT:
        raise InputError(
            f"{path} has checkpoint format {checkpoint['lkda']['format']}, this version of lkda reads {FORMAT}."
        )
    return dict(checkpoint)


def newest_intact(directory: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint of `directory` with the most steps that can be read: its path and content; None where there is
    none.

    The newest intact step checkpoint is looked for first; then last.ckpt, best.ckpt and any other that is a file of its
    own, which may be newer, or all that is left. What is found is given its step's name again where it has lost it. A
    broken one is passed over and set aside under the name *.broken, with a warning that names it.

    Raises:
        InputError: checkpoints are there, and none can be read.
    """
    directory = Path(directory)
    steps = step_files(directory)
    others = [
        path
        for path in sorted(directory.glob("*.ckpt"))
        if path not in steps and not any(path.samefile(step) for step in steps)
    ]
    found: tuple[Path, dict[str, Any]] | None = None
    broken = []
    for path in [*reversed(steps), *others]:
        if found is not None and path in steps:
            continue
        try:
            checkpoint = read_checkpoint(path)
        except ValueError as error:
            warnings.warn(f"skipping a broken checkpoint: {error}", stacklevel=2)
            broken.append(path)
            continue
        if found is None or checkpoint["lkda"]["step"] > found[1]["lkda"]["step"]:
            found = path, checkpoint
    if found is None:
        if broken:
            raise InputError(
                f"none of the {len(broken)} checkpoints in {directory} can be read. Delete them to start afresh."
            )
        return None
    for path in broken:
        path.rename(path.with_name(path.name + ".broken"))
    path, checkpoint = found
    own = step_path(directory, checkpoint["lkda"]["step"])
    if not own.exists():
        point_to(path, own)
    return own, checkpoint
