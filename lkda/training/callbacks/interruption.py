"""Ctrl-C, SIGTERM and SIGUSR1 stop a run after the current step is finished and saved."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# SIGUSR1 is the warning that Slurm sends before the time limit of a job (`sbatch --signal=USR1@120`).
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


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
        """The exit code that a shell reports for a process ended by this signal: 130 for Ctrl-C, 143 for SIGTERM,
        138 for SIGUSR1."""
        return 128 + self.signum


class StopRequest:
    """A context in which the first of SIGNALS is stored in `signum`. A second one ends the process at once, unless the
    first is SIGUSR1: the SIGTERM that follows a warning must not stop the writing of the checkpoint.

    Enter it before `Trainer.fit`, which composes its own SIGTERM handler with the one it finds.

    Args:
        group: of all processes of the run, on the CPU, for `agreed`; None for a run of one process.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}
        self._group = group
        self._asked: tuple[Tensor, dist.Work] | None = None

    def take_over(self) -> None:
        """Install the handlers in place of Lightning's. Those would call a collective inside a signal handler. Under
        Slurm they would save and requeue in a way of their own."""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def agreed(self, *, due: bool = False) -> tuple[int | None, bool]:
        """The signal that any process has received, and whether any has called this with `due`. Every process must call
        it at the end of each step. All get the same answer at the same step: the one to the question of the step
        before, so that no process waits here.

        Args:
            due: whether this process wants a checkpoint.
        """
        if self._group is None:
            return self.signum, due
        signum, was_due = self.finish()
        question = torch.tensor([self.signum or 0, int(due and not was_due)])
        work = dist.all_reduce(question, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._asked = question, work
        return signum, was_due

    def finish(self) -> tuple[int | None, bool]:
        """The answer to the last question, if there is one."""
        if self._asked is None:
            return None, False
        question, work = self._asked
        self._asked = None
        work.wait()
        signum, due = question.tolist()
        return signum or None, bool(due)

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum not in (None, signal.SIGUSR1):
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        self.signum = signum
