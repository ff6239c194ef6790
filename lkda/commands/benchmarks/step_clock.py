"""Measures training steps while a loop runs them: seconds to the end of the first, tokens/s, memory, and a profile."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.profiler import profile

from lkda.bench.step_profile import breakdown, events_of, profiler
from lkda.training.device_time import Moment

BLOCK_STEPS = 10  # the speed is the median over blocks of this many steps
PROFILED_STEPS = 5


@dataclass(frozen=True)
class Steps:
    """How many optimizer steps are measured.

    Attributes:
        warmup: steps before the measurement, a multiple of BLOCK_STEPS. The first of them is timed by itself.
        timed: steps that are timed, a multiple of BLOCK_STEPS. 0 ends the measurement after the first step.
        profiled: steps that are profiled after these; 0: none.
    """

    warmup: int
    timed: int
    profiled: int

    @property
    def last(self) -> int:
        """The step at which everything is measured."""
        return self.warmup + self.timed + self.profiled if self.timed else 1


class StepClock:
    """Call `after` at the end of each optimizer step, until it returns True; then `row` holds the measurements.

    The clock starts when it is made. It waits for the device after the first step and after the last, but not between
    blocks of steps, because a training does not wait either.

    Args:
        tokens_per_step: tokens of an optimizer step.

    Attributes:
        row: first_step_s, and if steps are timed tokens_per_s, step_ms, noise (the relative distance of the fastest
            from the slowest block), on a GPU reserved_gib and allocated_gib (their peaks), and "profile", see
            `step_profile.breakdown`. If the profile fails, "profile_reason" says why.
    """

    def __init__(self, steps: Steps, *, tokens_per_step: int, device: torch.device) -> None:
        self.steps, self.tokens_per_step, self.device = steps, tokens_per_step, device
        self.row: dict[str, Any] = {}
        self._started = time.perf_counter()
        self._moments: list[Moment] = []  # the end of the warm-up, and of each block
        self._profile: profile | None = None

    def after(self, step: int) -> bool:
        """Note that `step` (from 1) has ended. Returns whether everything is measured."""
        steps = self.steps
        timed_until = steps.warmup + steps.timed
        if step == 1:
            self.row["first_step_s"] = round(self._now() - self._started, 3)
        if steps.timed and steps.warmup <= step <= timed_until and step % BLOCK_STEPS == 0:
            self._moments.append(Moment(self.device))
        if steps.timed and step == timed_until:
            self._end_of_timing()
            if steps.profiled:
                self._attempt(self._start_profile)
        if steps.profiled and step == timed_until + steps.profiled:
            self._attempt(self._end_profile)
        return step >= steps.last

    def _now(self) -> float:
        """The time when the device has done all its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _end_of_timing(self) -> None:
        blocks = [after.seconds_since(before) for before, after in pairwise(self._moments)]
        seconds = statistics.median(blocks)
        self.row["step_ms"] = seconds / BLOCK_STEPS * 1000
        self.row["tokens_per_s"] = BLOCK_STEPS * self.tokens_per_step / seconds
        self.row["noise"] = round((max(blocks) - min(blocks)) / seconds, 4)
        if self.device.type == "cuda":
            self.row["reserved_gib"] = torch.cuda.max_memory_reserved(self.device) / 2**30
            self.row["allocated_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30

    def _start_profile(self) -> None:
        self._profile = profiler(self.device)
        self._profile.start()

    def _end_profile(self) -> None:
        if self._profile is None:
            return
        self._now()
        self._profile.stop()
        events = events_of(self._profile, self.device)
        self.row["profile"] = breakdown(events, steps=self.steps.profiled, step_ms=self.row["step_ms"])

    def _attempt(self, part: Callable[[], None]) -> None:
        """A profiler that fails must not cost the times that are already measured."""
        try:
            part()
        except Exception as error:  # of the profiler's libraries: of any type
            self._profile = None
            self.row["profile_reason"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
