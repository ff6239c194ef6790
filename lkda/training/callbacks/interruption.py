"""Ctrl-C and SIGTERM stop a run after the current step is finished and saved."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InterruptedRunError(RuntimeError):
    """The run was stopped by a signal, and its state is saved.

    Args:
        signum: the number of the signal.
        step: the optimizer step that was saved.
    """

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}")
        self.signum = signum
        self.step = step

    @property
    def exit_code(self) -> int:
        """The exit code that a shell reports for a process ended by this signal: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.signum


class StopRequest:
    """A context in which the first SIGINT or SIGTERM is stored in `signum`. A second one ends the process at once.

    Enter it before `Trainer.fit`, which composes its own SIGTERM handler with the one it finds.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        self.signum = signum
