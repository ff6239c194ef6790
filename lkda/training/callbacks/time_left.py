"""Estimates the remaining time of a run from its own first steps."""

from __future__ import annotations

import lightning as L

# Seconds. For a longer run, the message says how many steps would take about this long.
SHORT_RUN = 120.0
# Time of a validation batch as a part of a training batch's, until a validation has been timed: the backward pass takes
# twice the work of the forward pass.
VALIDATION_PART = 1 / 3


class TimeLeft:
    """Estimates the remaining seconds from the latest time of a step and of a validation.

    Attributes:
        step_seconds: seconds of an optimizer step; None before it is known.
        validation_seconds: seconds of a validation. If None, they are estimated from its number of batches.
    """

    def __init__(self) -> None:
        self.step_seconds: float | None = None
        self.validation_seconds: float | None = None

    def seconds(self, trainer: L.Trainer) -> float | None:
        """The remaining seconds of the run, without the writing of checkpoints. None before a step has been timed."""
        if self.step_seconds is None:
            return None
        validation = self.validation_seconds
        if validation is None:
            batch_seconds = self.step_seconds / trainer.accumulate_grad_batches
            validation = VALIDATION_PART * batch_seconds * sum(trainer.num_val_batches)
        return (trainer.max_steps - trainer.global_step) * self.step_seconds + validations_left(trainer) * validation


def validations_left(trainer: L.Trainer) -> int:
    """The number of validations after this step: one at every interval, and one at the end."""
    assert isinstance(trainer.val_check_batch, int)
    every = trainer.val_check_batch // trainer.accumulate_grad_batches
    done, last = trainer.global_step, trainer.max_steps
    return last // every - done // every + (last % every > 0)


def duration(seconds: float) -> str:
    """A duration in words: 40 s, 2 min, 5 min 30 s, 3 h 20 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s".removesuffix(" 0 s")
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def announcement(
    *, step: int, max_steps: int, validations: int, seconds: float, step_seconds: float, tokens_per_step: int
) -> str:
    """The line that says how long the rest of the run will take. If that is long, it also says how to shorten the run.

    Args:
        step: the number of steps done.
        validations, seconds: the remaining validations, and the estimated remaining seconds.
        step_seconds, tokens_per_step: seconds and tokens of a training step.
    """
    left = max_steps - step
    line = (
        f"about {duration(seconds)} to go: {left:,} steps at {tokens_per_step / step_seconds:,.0f} tokens/s, "
        f"{validations} validation{'s' * (validations != 1)}."
    )
    if seconds <= SHORT_RUN:
        return line
    fewer = step + max(1, int(left * SHORT_RUN / seconds))
    return (
        f"{line} For a shorter run: trainer.max_steps={fewer} (or trainer.max_tokens={fewer * tokens_per_step}) takes "
        f"about {duration(SHORT_RUN)}; a smaller model.d_model, model.num_layers or data.context makes steps faster."
    )
