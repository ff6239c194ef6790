"""Checkpoints: written atomically, and read as tensors and plain values only.

A file is Lightning's checkpoint plus `checkpoint["lkda"]`, which makes it self-contained:
    {"format": 1, "model": the dict of `build_model`, "tokenizer": JSON text, "run": plain values that describe the run}
The tokenizer is None if the model's tokens are not text. If devices share the weights, a checkpoint of the same content
is a directory; see `lkda.training.sharded_checkpoint`.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor

from lkda.checks import InputError, PlainWarning
from lkda.io import replace_file, replacing
from lkda.training.background import BackgroundWriter
from lkda.training.sharded_checkpoint import is_sharded, read_sharded, remove
from lkda.training.torch_file import UnreadableError, read_torch_file

FORMAT = 1
_ENTRIES = {"step": int, "model": Mapping, "tokenizer": str | None, "run": Mapping, "best": Mapping}
_STEP = re.compile(r"step_(\d+)\.ckpt")


def step_path(directory: Path, step: int) -> Path:
    """The path of the checkpoint of `step`. The name has no `=`, which Hydra's command line would not accept."""
    return directory / f"step_{step:07d}.ckpt"


def step_files(directory: Path) -> list[Path]:
    """The step checkpoints of `directory`, oldest first."""
    found = [(int(match[1]), path) for path in directory.glob("*.ckpt") if (match := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint writer, made atomic by a temporary file, fsync and a rename. It reads every checkpoint of
    lkda.

    Args:
        writer: writes the file while training goes on. `save_checkpoint` then only copies the content into the memory
            of the CPU. None: the file is written when `save_checkpoint` returns.
    """

    def __init__(self, writer: BackgroundWriter | None = None) -> None:
        super().__init__()
        self._writer = writer

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(path)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if self._writer is None:
            _write(checkpoint, Path(path))
            return
        copied = copy_to_cpu(checkpoint)
        self._writer.submit(lambda: _write(copied, Path(path)))


def _write(checkpoint: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # torch's writer turns an OSError into this type
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def copy_to_cpu(value: Any) -> Any:
    """A copy of nested dicts, lists and tuples that later training steps do not change. Its tensors are on the CPU.
    Tensors that are the same memory, such as tied weights, are copied once."""
    copies: dict[tuple[Any, ...], Tensor] = {}

    def copied(entry: Any) -> Any:
        if isinstance(entry, Tensor):
            place = (entry.device, entry.data_ptr(), entry.dtype, entry.shape, entry.stride())
            if place not in copies or not entry.numel():
                copies[place] = entry.detach().to("cpu", copy=True)
            return copies[place]
        if isinstance(entry, dict):
            made = copy.copy(entry)  # of the same type, with its attributes, such as the _metadata of a state_dict
            made.update({name: copied(part) for name, part in entry.items()})
            return made
        if type(entry) in (list, tuple):
            return type(entry)(copied(part) for part in entry)
        return entry

    try:
        return copied(value)
    finally:
        copies.clear()  # `copied` refers to itself, so it and `copies` stay until the next garbage collection


def point_to(target: Path, link: Path) -> None:
    """Make `link` a hard link to the file `target`, atomically. It is a copy if the file system has no hard links. If
    `target` is a directory, the link is a symbolic one."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    if target.is_dir():
        temporary.symlink_to(target.name)
        if link.is_dir() and not link.is_symlink():
            remove(link)
        replace_file(temporary, link)
        return
    try:
        os.link(target, temporary)
    except OSError:
        with replacing(link) as file, open(target, "rb") as source:
            shutil.copyfileobj(source, file)
        return
    replace_file(temporary, link)
    temporary.unlink(missing_ok=True)  # it stays if `link` was one to this file already, and would keep its bytes


def delete_old(directory: Path, *, keep: int) -> None:
    """Delete all step checkpoints but the newest `keep`, and those to which last.ckpt and best.ckpt are symbolic
    links."""
    named = {link.resolve() for link in directory.glob("*.ckpt") if link.is_symlink()}
    for old in step_files(directory)[:-keep]:
        if old.resolve() not in named:
            remove(old)


def read_checkpoint(path: str | Path, *, rank: int = 0, count: int = 1, advice: str = "") -> dict[str, Any]:
    """Load a checkpoint of lkda onto the CPU with `weights_only=True`: no code in the file is executed.

    Args:
        rank, count: the process that reads, if `count` processes share the tensors. It may then get only its rows of a
            tensor; see `read_sharded`. By default all tensors are whole.
        advice: what to give instead of a path that is no checkpoint, a sentence for the message.
    Raises: InputError if the file is missing or truncated, or is not a checkpoint of lkda.
    """
    path = Path(path)
    if not path.is_file() and not is_sharded(path):
        raise InputError(f"there is no checkpoint at {path}. {advice}".rstrip())
    if path.is_dir():
        checkpoint = read_sharded(path, rank=rank, count=count)
    else:
        checkpoint = read_torch_file(path, what="a checkpoint", mmap=count > 1, advice=advice)
    if not isinstance(checkpoint, Mapping) or not isinstance(checkpoint.get("lkda"), Mapping):
        what = f"{path} is not a checkpoint of lkda: it has no entry 'lkda', which scripts/train.py writes."
        raise InputError(f"{what} {advice}".rstrip())
    ours = checkpoint["lkda"]
    if type(ours.get("format")) is not int or ours["format"] != FORMAT:
        raise InputError(
            f"{path} has checkpoint format {ours.get('format')!r}, but this version of lkda reads {FORMAT}."
        )
    for name, kind in _ENTRIES.items():
        if name in ours and not isinstance(ours[name], kind):
            raise InputError(f"{path} is damaged: its entry lkda.{name} is a {type(ours[name]).__name__}.")
    return dict(checkpoint)


def newest_intact(directory: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """The readable checkpoint of `directory` with the most steps: its path and content. None if there is no checkpoint.

    The newest intact step checkpoint is looked for first. Then last.ckpt, best.ckpt and other files are read if they
    are not links to step checkpoints: they may be newer, or the only ones left. If the step checkpoint of the result is
    missing, a link with its name is created. A broken checkpoint is renamed to *.broken, with a warning that names it,
    and the links to it are deleted.

    Raises: InputError if there are checkpoints but none of them can be read; UnreadableError if one that would be used
        may be whole, but cannot be read by this process.
    """
    directory = Path(directory)
    steps = step_files(directory)
    others = [
        path
        for path in sorted(directory.glob("*.ckpt"))
        if path not in steps and path.exists() and not any(path.samefile(step) for step in steps)
    ]
    found: tuple[Path, dict[str, Any]] | None = None
    broken = []
    for path in [*reversed(steps), *others]:
        if found is not None and path in steps:
            continue
        try:
            checkpoint = read_checkpoint(path)
        except UnreadableError:
            raise
        except ValueError as error:
            warnings.warn(f"skipping a broken checkpoint: {error}", PlainWarning, stacklevel=2)
            broken.append(path)
            continue
        if found is None or checkpoint["lkda"]["step"] > found[1]["lkda"]["step"]:
            found = path, checkpoint
    if found is None:
        if broken:
            raise InputError(
                f"none of the {len(broken)} checkpoints in {directory} can be read. Delete them to start from step 0."
            )
        return None
    for path in broken:
        _set_aside(path)
    path, checkpoint = found
    own = step_path(directory, checkpoint["lkda"]["step"])
    if not own.exists():
        point_to(path, own)
    return own, checkpoint


def _set_aside(broken: Path) -> None:
    """Rename a broken checkpoint to *.broken, and delete the links to it: last.ckpt and best.ckpt must be readable. One
    of that name, of an earlier time, is replaced."""
    names = (link for link in broken.parent.glob("*.ckpt") if link.name != broken.name and link.exists())
    links = [link for link in names if link.samefile(broken)]
    aside = broken.with_name(broken.name + ".broken")
    if aside.is_symlink() or aside.exists():
        remove(aside)  # no file takes the place of a directory, and no directory that of anything
    broken.rename(aside)
    for link in links:
        link.unlink()
