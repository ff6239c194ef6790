"""What is written while training goes on is the state at the moment of saving, and no error is lost."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from lkda.training import checkpoint
from lkda.training.background import BackgroundWriter
from lkda.training.checkpoint import AtomicCheckpointIO, copy_to_cpu, read_checkpoint


def test_a_save_does_not_wait_and_later_steps_do_not_change_it(tmp_path: Path) -> None:
    writer, go_on = BackgroundWriter(), threading.Event()
    writer.submit(lambda: go_on.wait(30) and None)  # nothing after it can be written before `go_on`
    weight = torch.arange(8.0)
    content = {"lkda": {"format": 1, "step": 3, "best": {"loss": 1.0}}, "state_dict": {"w": weight, "tied": weight[:]}}
    AtomicCheckpointIO(writer).save_checkpoint(content, tmp_path / "a.ckpt")
    assert not (tmp_path / "a.ckpt").exists()
    weight.zero_()
    content["lkda"]["best"]["loss"] = 0.0  # type: ignore[index]
    go_on.set()
    writer.wait()
    saved = read_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(saved["state_dict"]["w"], torch.arange(8.0))
    assert saved["lkda"]["best"] == {"loss": 1.0}


def test_tied_weights_are_copied_once_and_types_are_kept() -> None:
    weight = torch.arange(6.0)
    state = OrderedDict(a=weight, b=weight[:], c=weight[1:], empty=torch.empty(0, 3), also=torch.empty(0, 5))
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    made = copy_to_cpu({"state": state, "rest": [(weight, 3)]})
    found = made["state"]
    assert type(found) is OrderedDict
    assert found._metadata == {"": {"version": 1}}  # type: ignore[attr-defined]
    assert found["a"] is found["b"] is made["rest"][0][0] is not weight
    assert found["a"].data_ptr() != weight.data_ptr()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert found["also"].shape == (0, 5)


def test_a_copy_is_freed_when_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not by the next garbage collection: until then a run would keep a second copy of its weights."""
    copies: list[weakref.ref[torch.Tensor]] = []

    def copying(content):
        made = copy_to_cpu(content)
        copies.extend(weakref.ref(tensor) for tensor in made["state_dict"].values())
        return made

    monkeypatch.setattr(checkpoint, "copy_to_cpu", copying)
    gc.collect()
    gc.disable()
    try:
        writer = BackgroundWriter()
        content = {"lkda": {"format": 1}, "state_dict": {"w": torch.zeros(8)}}
        AtomicCheckpointIO(writer).save_checkpoint(content, tmp_path / "a.ckpt")
        left: list[torch.Tensor | None] = []
        writer.submit(lambda: left.extend(copy() for copy in copies))  # as `return_freed_memory` comes after it
        writer.wait()
        assert left == [None]
    finally:
        gc.enable()


def test_the_first_error_is_raised_and_nothing_runs_after_it() -> None:
    writer, ran = BackgroundWriter(), []

    def full() -> None:
        raise OSError(28, "No space left on device", "a.ckpt")

    writer.submit(full)
    writer.submit(lambda: ran.append("after"))
    with pytest.raises(OSError, match=r"No space left on device: 'a\.ckpt'"):
        writer.wait()
    assert ran == []
    writer.wait()  # it is raised once
    writer.submit(lambda: ran.append("later"))
    writer.wait()
    assert ran == ["later"]


def test_a_failure_is_found_without_waiting() -> None:
    writer, go_on, failed = BackgroundWriter(), threading.Event(), threading.Event()

    def fail() -> None:
        go_on.wait(30)
        raise OSError(28, "No space left on device")

    writer.submit(fail)
    writer.raise_errors()  # it still runs
    writer._newest.add_done_callback(lambda _: failed.set())  # type: ignore[union-attr]
    go_on.set()
    assert failed.wait(30)
    with pytest.raises(OSError, match="No space left"):
        writer.raise_errors()
