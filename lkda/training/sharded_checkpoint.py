"""Checkpoints of models whose devices share the weights: a directory in which each process writes a file of its own.

    step_0000100.ckpt/
        rest.pt               the checkpoint without the tensors that are shared, and "lkda_save", an id of this saving
        part_00000_of_00002.pt, part_00001_of_00002.pt
            {"save": the same id, "part": 0 or 1, "pieces": [(where, piece), ...]}: `where` is the place in the
            checkpoint, such as ["state_dict", "model.norm.weight"], and `piece` the process's rows of the tensor. The
            pieces in order are the whole tensor.

The id tells files of one saving from those of another, which a copy that was interrupted may have mixed. An earlier
version wrote no id, and of a part only its pieces. All files are read with `weights_only=True`: no code in them is
executed.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from lkda.checks import InputError
from lkda.io import named, replace_file, replacing
from lkda.training.torch_file import read_torch_file

REST = "rest.pt"
_SAVE = "lkda_save"
_PART = re.compile(r"part_(\d+)_of_(\d+)\.pt")
Where = list[Any]


def is_sharded(path: Path) -> bool:
    """Whether the path is a checkpoint of this kind."""
    return path.is_dir() and (path / REST).is_file()


def divided(value: Any, parts: list[tuple[Where, Tensor]], where: tuple[Any, ...] = ()) -> Any:
    """A copy of nested dicts and lists without the shared tensors. The place and this device's rows of each of them are
    appended to `parts`."""
    if isinstance(value, DTensor):
        assert value.placements == (Shard(0),), f"{where} is not shared by rows"
        parts.append(([*where], value.to_local().detach().cpu()))
        return None
    if isinstance(value, dict):
        return {key: divided(entry, parts, (*where, key)) for key, entry in value.items()}
    if isinstance(value, list):
        return [divided(entry, parts, (*where, number)) for number, entry in enumerate(value)]
    return value


def temporary_of(path: Path) -> Path:
    """The directory in which a checkpoint is written before it is complete."""
    return path.with_name(f".{path.name}.tmp")


def write_part(checkpoint: dict[str, Any], path: Path, *, rank: int, count: int, save: str) -> None:
    """Write this process's file, and on the first process the rest. `complete` makes the checkpoint visible.

    Args:
        path: of the checkpoint.
        rank, count: of the processes.
        save: an id, the same on all processes, and another one for each saving.
    Raises: OSError, naming `path`, if the files cannot be written.
    """
    folder = temporary_of(path)
    folder.mkdir(parents=True, exist_ok=True)
    pieces: list[tuple[Where, Tensor]] = []
    rest = divided(checkpoint, pieces)
    _save({"save": save, "part": rank, "pieces": pieces}, folder / f"part_{rank:05d}_of_{count:05d}.pt", path)
    if rank == 0:
        _save({**rest, _SAVE: save}, folder / REST, path)


def _save(value: Any, file: Path, path: Path) -> None:
    try:
        with replacing(file) as opened:
            torch.save(value, opened)
    except OSError as error:
        raise named(error, path) from error
    except RuntimeError as error:  # torch's writer turns an OSError into this type
        if isinstance(error.__context__, OSError):
            raise named(error.__context__, path) from error
        raise


def complete(path: Path) -> None:
    """Make a checkpoint visible after all processes have written their part."""
    if path.exists():
        remove(path)
    replace_file(temporary_of(path), path)


def remove(path: Path) -> None:
    """Delete a checkpoint: a file, a link or a directory. It disappears at once, also if the process is killed."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    dying = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.rename(dying)
    shutil.rmtree(dying)


def read_sharded(path: Path, *, rank: int = 0, count: int = 1) -> dict[str, Any]:
    """Read a checkpoint of this kind onto the CPU.

    Args:
        rank, count: the process that reads, if `count` processes share the tensors. It gets its rows of each shared
            tensor, as `torch.chunk` divides them. By default it gets whole tensors.
    Raises: InputError if a file is missing or damaged.
    """
    numbers = [_PART.fullmatch(file.name) for file in path.iterdir()]
    found = sorted((int(match[1]), int(match[2])) for match in numbers if match)
    if not found or found != [(part, len(found)) for part in range(len(found))]:
        raise InputError(f"{path} is not complete: it has {len(found)} of its files part_*.pt.")
    files = [path / REST, *(path / f"part_{part:05d}_of_{parts:05d}.pt" for part, parts in found)]
    # The first process has read all of it before the others, each of which needs only its rows.
    checkpoint, *parts = [read_torch_file(file, what="a part of a checkpoint", mmap=count > 1) for file in files]
    try:
        save = checkpoint.pop(_SAVE, None)
        for pieces in zip(*(_pieces(part, save, number) for number, part in enumerate(parts)), strict=True):
            where = pieces[0][0]
            assert all(place == where for place, _ in pieces)
            _put(checkpoint, where, _rows([piece for _, piece in pieces], rank, count))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError, RuntimeError) as error:
        raise InputError(f"{path} is damaged: the files part_*.pt do not fit together.") from error
    return checkpoint  # whose kind read_checkpoint looks at


def _pieces(part: Any, save: str | None, number: int) -> list[tuple[Where, Tensor]]:
    """The pieces of the part of that number. Raises AssertionError if it is of another saving, or another part."""
    if save is None:  # of an earlier version
        assert isinstance(part, list)
        return part
    assert part["save"] == save
    assert part["part"] == number
    pieces: list[tuple[Where, Tensor]] = part["pieces"]
    return pieces


def _rows(pieces: list[Tensor], rank: int, count: int) -> Tensor:
    """The rows of one of `count` processes of the tensor whose rows are those of `pieces` in order."""
    size = sum(len(piece) for piece in pieces)
    first, last = rows_of(size, rank, count)
    chosen, start = [], 0
    for piece in pieces:
        chosen.append(piece[max(0, first - start) : max(0, last - start)])
        start += len(piece)
    return torch.cat(chosen)


def rows_of(size: int, rank: int, count: int) -> tuple[int, int]:
    """The first row, and the one after the last, that a process has of a tensor of `size` rows."""
    each = -(-size // count)
    return min(size, rank * each), min(size, (rank + 1) * each)


def _put(value: Any, where: Where, tensor: Tensor) -> None:
    *path, last = where
    for key in path:
        value = value[key]
    value[last] = tensor
