"""Files are whole or absent, and a broken one is recognised."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lkda.checks import PlainWarning
from lkda.io import write_atomically
from lkda.training.checkpoint import (
    AtomicCheckpointIO,
    newest_intact,
    point_to,
    read_checkpoint,
    step_files,
    step_path,
)


def content(step: int) -> dict[str, Any]:
    return {"lkda": {"format": 1, "step": step}, "state_dict": {"model.w": torch.arange(1000.0) + step}}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory with the checkpoints of steps 2, 4 and 10."""
    for step in (2, 4, 10):
        AtomicCheckpointIO().save_checkpoint(content(step), step_path(tmp_path, step))
    return tmp_path


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_checkpoint_comes_back(saved: Path) -> None:
    assert torch.equal(read_checkpoint(step_path(saved, 4))["state_dict"]["model.w"], torch.arange(1000.0) + 4)
    assert [path.name for path in step_files(saved)] == ["step_0000002.ckpt", "step_0000004.ckpt", "step_0000010.ckpt"]


def test_a_failed_save_leaves_the_old_file_and_no_other(saved: Path) -> None:
    before = step_path(saved, 4).read_bytes()
    with pytest.raises(AttributeError, match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"function": lambda: None}, step_path(saved, 4))
    assert step_path(saved, 4).read_bytes() == before
    assert len(list(saved.iterdir())) == 3


def test_names_point_to_the_same_file(saved: Path) -> None:
    point_to(step_path(saved, 4), saved / "last.ckpt")
    point_to(step_path(saved, 10), saved / "last.ckpt")
    step_path(saved, 10).unlink()
    assert read_checkpoint(saved / "last.ckpt")["lkda"]["step"] == 10


def test_a_name_that_points_there_already_leaves_no_other_file(saved: Path) -> None:
    """Renaming a link over another link to the same file does nothing, and the link would keep the file's bytes."""
    for _ in range(2):
        point_to(step_path(saved, 4), saved / "last.ckpt")
        assert len(list(saved.iterdir())) == 4
    assert (saved / "last.ckpt").samefile(step_path(saved, 4))


def test_a_file_system_without_links_gets_a_copy(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*arguments: object) -> None:
        raise PermissionError("operation not permitted")

    monkeypatch.setattr("os.link", no_links)
    point_to(step_path(saved, 4), saved / "last.ckpt")
    assert read_checkpoint(saved / "last.ckpt")["lkda"]["step"] == 4


def test_text_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_atomically(path, "old")
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_the_newest_intact_is_found(saved: Path) -> None:
    path, checkpoint = newest_intact(saved) or pytest.fail("nothing found")
    assert path == step_path(saved, 10)
    assert checkpoint["lkda"]["step"] == 10


def test_a_broken_newest_is_skipped_with_its_name(saved: Path) -> None:
    truncate(step_path(saved, 10))
    with pytest.warns(PlainWarning, match=r"skipping a broken checkpoint: .*step_0000010.ckpt is truncated"):
        path, _ = newest_intact(saved) or pytest.fail("nothing found")
    assert path == step_path(saved, 4)
    # It is set aside, so that it neither counts among those to keep nor is found again.
    assert step_files(saved) == [step_path(saved, 2), step_path(saved, 4)]
    assert (saved / "step_0000010.ckpt.broken").exists()


@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt", "mine.ckpt"])
def test_a_newer_one_under_another_name_is_found(name: str, saved: Path) -> None:
    step_path(saved, 10).rename(saved / name)
    path, checkpoint = newest_intact(saved) or pytest.fail("nothing found")
    assert checkpoint["lkda"]["step"] == 10
    assert path == step_path(saved, 10)  # which has its own name again
    assert path.samefile(saved / name)


def test_the_newest_of_what_is_left_is_found(saved: Path) -> None:
    step_path(saved, 4).rename(saved / "best.ckpt")
    step_path(saved, 10).rename(saved / "last.ckpt")
    step_path(saved, 2).unlink()
    truncate(saved / "last.ckpt")
    with pytest.warns(UserWarning, match=r"skipping a broken checkpoint: .*last.ckpt is truncated"):
        path, _ = newest_intact(saved) or pytest.fail("nothing found")
    assert path == step_path(saved, 4)
    assert (saved / "last.ckpt.broken").exists()


def test_an_older_best_does_not_hide_a_newer_step(saved: Path) -> None:
    step_path(saved, 2).rename(saved / "best.ckpt")
    path, _ = newest_intact(saved) or pytest.fail("nothing found")
    assert path == step_path(saved, 10)
    assert not step_path(saved, 2).exists()


def test_nothing_saved_and_nothing_readable_differ(tmp_path: Path, saved: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert newest_intact(tmp_path / "empty") is None
    for path in step_files(saved):
        truncate(path)
    with (
        pytest.warns(UserWarning, match="skipping"),
        pytest.raises(ValueError, match=r"none of the 3 checkpoints in .* can be read"),
    ):
        newest_intact(saved)


class Dangerous:
    """Runs code when it is unpickled the careless way."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("/tmp/lkda_was_here"),))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b""), "truncated or not a checkpoint"),
        (lambda path: path.write_text("hello"), "truncated or not a checkpoint"),
        (lambda path: torch.save({"lkda": {"format": 1}, "x": Dangerous()}, path), "truncated or not a checkpoint"),
        (lambda path: torch.save({"state_dict": {}}, path), "is not a checkpoint of lkda"),
        (lambda path: torch.save(torch.zeros(3), path), "is not a checkpoint of lkda"),
        (lambda path: torch.save({"lkda": {"format": 99}}, path), "has checkpoint format 99"),
        (lambda path: None, "there is no checkpoint at"),
    ],
    ids=["empty", "text", "code inside", "another's", "a tensor", "of the future", "missing"],
)
def test_what_is_no_checkpoint_is_named(make: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    make(path)
    with pytest.raises(ValueError, match=message) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)
    assert not Path("/tmp/lkda_was_here").exists()
