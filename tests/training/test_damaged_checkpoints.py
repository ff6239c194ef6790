"""A truncated or changed checkpoint, of one file or of a part for each device, is never taken for a whole one."""

from __future__ import annotations

import errno
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from lkda.checks import InputError
from lkda.training.checkpoint import AtomicCheckpointIO, newest_intact, point_to, read_checkpoint, step_path
from lkda.training.sharded_checkpoint import REST, _save, remove

FLIPS = 60


def content(step: int) -> dict[str, Any]:
    torch.manual_seed(step)
    return {
        "lkda": {"format": 1, "step": step, "best": {"step": step, "loss": 1.0}},
        "state_dict": {"model.w": torch.randn(40, 5), "model.b": torch.randn(7)},
    }


def write_file(step: int, path: Path) -> None:
    AtomicCheckpointIO().save_checkpoint(content(step), path)


def write_parts(step: int, path: Path, *, save: str | None = "one") -> None:
    """As two processes of trainer=fsdp write it, each with half of the rows of model.w. Without an id of the saving it
    is one of an earlier version."""
    path.mkdir()
    whole = content(step)
    rows = whole["state_dict"].pop("model.w")
    whole["state_dict"]["model.w"] = None
    for part, piece in enumerate(rows.chunk(2)):
        pieces = [(["state_dict", "model.w"], piece.clone())]
        found = pieces if save is None else {"save": save, "part": part, "pieces": pieces}
        _save(found, path / f"part_{part:05d}_of_00002.pt", path)
    _save(whole if save is None else {**whole, "lkda_save": save}, path / REST, path)


def write_earlier(step: int, path: Path) -> None:
    write_parts(step, path, save=None)


KINDS = {"a file": write_file, "a directory": write_parts}


def test_one_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    write_earlier(1, tmp_path / "one")
    assert same(read_checkpoint(tmp_path / "one"), content(1))


@pytest.mark.parametrize("kind", ["another part", "another saving", "an earlier version", "another rest"])
def test_parts_that_do_not_belong_together_are_refused(kind: str, tmp_path: Path) -> None:
    """Each file is whole, but a copy of the directory was interrupted, or mixed with another one."""
    path, other = step_path(tmp_path, 1), tmp_path / "other"
    write_parts(1, path)
    write_parts(2, other, save=None if kind == "an earlier version" else "two")
    first, second = "part_00000_of_00002.pt", "part_00001_of_00002.pt"
    assert same(read_checkpoint(path), content(1))
    if kind == "another part":
        shutil.copy(path / first, path / second)
    else:
        name = REST if kind == "another rest" else second
        shutil.copy(other / name, path / name)
    with pytest.raises(InputError, match=r"step_0000001.ckpt is damaged: the files part_\*.pt do not fit together"):
        read_checkpoint(path)


def files_of(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else [path]


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    tensors = expected["state_dict"]
    return found["lkda"] == expected["lkda"] and all(torch.equal(found["state_dict"][n], tensors[n]) for n in tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_is_found(kind: str, tmp_path: Path) -> None:
    """Wherever it is: the file is refused, or the bit is one that nothing is read from."""
    path = step_path(tmp_path, 1)
    KINDS[kind](1, path)
    draw, refused = random.Random(0), 0
    for number in range(FLIPS):
        file = draw.choice(files_of(path))
        whole = file.read_bytes()
        place = draw.randrange(len(whole))
        flipped = bytearray(whole)
        flipped[place] ^= 1 << draw.randrange(8)
        file.write_bytes(flipped)
        try:
            assert same(read_checkpoint(path), content(1)), f"bit of byte {place} of {file.name}, flip {number}"
        except InputError:
            refused += 1
        file.write_bytes(whole)
    assert same(read_checkpoint(path), content(1))
    assert refused > FLIPS // 4


@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_of_a_tensor_counts(kind: str, tmp_path: Path) -> None:
    path = step_path(tmp_path, 1)
    KINDS[kind](1, path)
    number = content(1)["state_dict"]["model.w"][0, 0].numpy().tobytes()
    (file,) = (file for file in files_of(path) if number in file.read_bytes())
    flipped = bytearray(file.read_bytes())
    flipped[flipped.index(number)] ^= 1
    file.write_bytes(flipped)
    with pytest.raises(InputError, match=rf"{file.name} is truncated or not a .*BadZipFile"):
        read_checkpoint(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_one_is_found(kind: str, tmp_path: Path) -> None:
    path = step_path(tmp_path, 1)
    KINDS[kind](1, path)
    for file in files_of(path):
        whole = file.read_bytes()
        for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:size])
            with pytest.raises(InputError, match=r"is truncated or not a "):
                read_checkpoint(path)
        file.unlink()
        with pytest.raises(InputError, match=r"is not complete|there is no checkpoint"):
            read_checkpoint(path)
        file.write_bytes(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_the_one_before_is_used_and_no_link_is_left_to_the_broken_one(kind: str, tmp_path: Path) -> None:
    for step in (2, 4):
        KINDS[kind](step, step_path(tmp_path, step))
    for name in ("last.ckpt", "best.ckpt"):
        point_to(step_path(tmp_path, 4), tmp_path / name)
    file = files_of(step_path(tmp_path, 4))[-1]
    with open(file, "r+b") as opened:
        opened.truncate(file.stat().st_size // 2)
    with pytest.warns(UserWarning, match=r"skipping a broken checkpoint: .*step_0000004\.ckpt"):
        path, checkpoint = newest_intact(tmp_path) or pytest.fail("nothing found")
    assert path == step_path(tmp_path, 2)
    assert same(checkpoint, content(2))
    assert {path.name for path in tmp_path.iterdir()} == {"step_0000002.ckpt", "step_0000004.ckpt.broken"}
    remove(tmp_path / "step_0000004.ckpt.broken")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
        (MemoryError(), "there is not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "there is not enough memory"),
    ],
    ids=["protected", "handles", "memory", "memory of torch"],
)
def test_one_that_may_be_whole_is_not_set_aside(
    kind: str, error: Exception, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not damaged: the run must not go back to the one before because this process cannot read it."""
    for step in (2, 4):
        KINDS[kind](step, step_path(tmp_path, step))
    before = sorted(tmp_path.rglob("*"))

    def fails(*arguments: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(torch, "load", fails)
    with pytest.raises(InputError, match=rf"step_0000004\.ckpt\S* cannot be read: {reason}\.$"):
        newest_intact(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.undo()
    path, _ = newest_intact(tmp_path) or pytest.fail("nothing found")
    assert path == step_path(tmp_path, 4)


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_the_same_step_may_be_damaged_twice(first: str, second: str, tmp_path: Path) -> None:
    """The run went on from the step before and wrote this one again, perhaps on other devices: it is damaged again."""
    write_file(2, step_path(tmp_path, 2))
    for kind in (first, second):
        KINDS[kind](4, step_path(tmp_path, 4))
        files_of(step_path(tmp_path, 4))[-1].write_bytes(b"")
        with pytest.warns(UserWarning, match="skipping a broken checkpoint"):
            path, _ = newest_intact(tmp_path) or pytest.fail("nothing found")
        assert path == step_path(tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"step_0000002.ckpt", "step_0000004.ckpt.broken"}


def test_a_compressed_file_is_refused_before_it_fills_memory(tmp_path: Path) -> None:
    write_file(1, tmp_path / "whole.ckpt")
    bomb = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(tmp_path / "whole.ckpt") as whole, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as made:
        for name in whole.namelist():
            made.writestr(name, whole.read(name) + bytes(10_000_000) * ("/data/" in name))
    assert bomb.stat().st_size < 1_000_000
    with pytest.raises(InputError, match=r"bomb\.ckpt is truncated or not a checkpoint"):
        read_checkpoint(bomb)


def test_entries_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    """Many names for the same bytes also make memory out of nothing."""
    write_file(1, tmp_path / "whole.ckpt")
    with zipfile.ZipFile(tmp_path / "whole.ckpt") as whole:
        largest = max(whole.infolist(), key=lambda entry: entry.file_size)
    many = tmp_path / "many.ckpt"
    shutil.copy(tmp_path / "whole.ckpt", many)
    with zipfile.ZipFile(many, "a") as archive:
        for _ in range(50):
            archive.filelist.append(largest)
        archive._didModify = True  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"many\.ckpt is truncated or not a checkpoint"):
        read_checkpoint(many)
