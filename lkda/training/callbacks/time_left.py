"""How long a run still takes, estimated from its own first steps."""

from __future__ import annotations

import lightning as L

# A run that takes longer is told with what number of steps it would take about so long.
SHORT_RUN = 120.0
# Of the time of a training batch, until a validation has been timed: a forward, without the backward of twice its work.
VALIDATION_PART = 1 / 3


class TimeLeft:
    """Estimates the seconds that are left: steps at the latest speed, and validations at the latest, both in seconds.

    Attributes:
        step_seconds: of an optimiser step; None before it is known.
        validation_seconds: of a validation; where None, it is taken from its number of batches.
    """

    def __init__(self) -> None:
        self.step_seconds: float | None = None
        self.validation_seconds: float | None = None

    def seconds(self, trainer: L.Trainer) -> float | None:
        """What is left of the run, or None before a step has been timed. Writing checkpoints is not counted."""
        if self.step_seconds is None:
            return None
        validation = self.validation_seconds
        if validation is None:
            batch_seconds = self.step_seconds / trainer.accumulate_grad_batches
            validation = VALIDATION_PART * batch_seconds * sum(trainer.num_val_batches)
        return (trainer.max_steps - trainer.global_step) * self.step_seconds + validations_left(trainer) * validation


def validations_left(trainer: L.Trainer) -> int:
    """How many validations come after this step: one every so many steps, and one at the end."""
    assert isinstance(trainer.val_check_batch, int)
    every = trainer.val_check_batch // trainer.accumulate_grad_batches
    done, last = trainer.global_step, trainer.max_steps
    return last // every - done // every + (last % every > 0)


def duration(seconds: float) -> str:
    """40 s, 2 min, 5 min 30 s, 3 h 20 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s".removesuffix(" 0 s")
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def announcement(
    *, step: int, max_steps: int, validations: int, seconds: float, step_seconds: float, tokens_per_step: int
) -> str:
    """The line that says how long the run takes from here, and where that is long, how to make it shorter.

    Args:
        step: the steps done.
        validations, seconds: that are left.
        step_seconds, tokens_per_step: of a training step, which the estimate is made from.
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
