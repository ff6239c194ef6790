"""The end of a process whose GPU waits for another process."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lkda.training.callbacks import HangGuard

SECONDS, EVERY = 0.3, 0.01
NOTHING: Any = None


@pytest.fixture
def gave_up() -> threading.Event:
    return threading.Event()


@pytest.fixture
def guard(gave_up: threading.Event) -> Iterator[HangGuard]:
    """On a CPU, which has finished a backward pass as soon as it is launched."""
    made = HangGuard(SECONDS, gave_up.set, every=EVERY)
    made.watch(torch.device("cpu"))
    yield made
    made.teardown(NOTHING, NOTHING, "fit")


def test_a_device_that_finishes_nothing_more(guard: HangGuard, gave_up: threading.Event) -> None:
    guard.on_after_backward(NOTHING, NOTHING)
    time.sleep(0.05)
    assert not gave_up.is_set()
    guard.launched += 1  # and its count does not follow
    begun = time.monotonic()
    assert gave_up.wait(5)
    assert time.monotonic() - begun > SECONDS - 2 * EVERY


def test_a_host_that_launches_nothing_is_no_hang(guard: HangGuard, gave_up: threading.Event) -> None:
    """It compiles, or writes a checkpoint."""
    guard.on_after_backward(NOTHING, NOTHING)
    assert not gave_up.wait(2 * SECONDS)
    guard.on_validation_batch_end(NOTHING, NOTHING)
    assert not gave_up.wait(0.5 * SECONDS)


def test_a_device_that_is_behind_but_goes_on(guard: HangGuard, gave_up: threading.Event) -> None:
    guard.launched += 10
    for _ in range(10):
        assert not gave_up.wait(0.3 * SECONDS)
        guard._finished += 1


def test_one_process_is_not_watched(gave_up: threading.Event) -> None:
    guard = HangGuard(SECONDS, gave_up.set, every=EVERY)
    guard.on_after_backward(NOTHING, NOTHING)
    assert guard.launched == 0
