"""The runs that `lkda.commands.studies.scaling` measures: their settings, their order, and which run side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

SHORT, LONG = 2**16, 2**18  # tokens of a sequence on each GPU
# A run for the longest context has this share of the memory, as 256K tokens predict it; a smaller one if it fails.
_SHARES = (0.94, 0.84, 0.72)
_STEP_OF_LENGTHS = 2**14
_RANDOM = ("data=random", "data.val_batches=1", "trainer.global_batch=false", "trainer.log_every_n_steps=5")
_BLOCK = ("checkpointing=block", "trainer.log_every_n_steps=1")
_SETTINGS = {
    "base": ("model=base", *_RANDOM, "data.batch_size=8", "data.context=2048"),
    "large": (
        *("model=base", "model.name=1.3B", "model.d_model=2048", "model.num_heads=16", "model.mlp_hidden=5504"),
        *("optimizer.lr=3e-4", *_RANDOM, "data.batch_size=8", "data.context=2048"),
    ),
    "context": ("model=small", *_RANDOM, "data.batch_size=1"),
    "longest": ("model=small", *_RANDOM, "data.batch_size=1"),
    "agreement": (
        *("mixer=kda_softmax_3to1", "model=tiny", "data.context=512", "data.batch_size=8", "sample.max_new_tokens=0"),
        "trainer.log_every_n_steps=1",
    ),
}
_STEPS = {"base": 60, "large": 30, "context": 30, "longest": 6, "agreement": 200}
# A log is not a terminal, in which a bar would be redrawn.
_QUIET = ("callbacks=none",)


@dataclass(frozen=True)
class Case:
    """A run that makes one row.

    Attributes:
        part: one of PARTS.
        how: single, ddp, fsdp or context_parallel.
        tokens: the tokens of a sequence on each GPU, in the parts context and longest; None elsewhere.
    """

    part: str
    how: str
    gpus: int
    tokens: int | None = None

    @property
    def name(self) -> str:
        """Of the row, its run directory and its log."""
        return "_".join(str(word) for word in (self.part, self.how, self.gpus, self.tokens) if word is not None)

    @property
    def shares_gpus(self) -> bool:
        """Whether others may run on its GPUs at the same time, because no speed is measured."""
        return self.part == "agreement"

    def refusal_on_cpu(self, overrides: Sequence[str]) -> str | None:
        """Why a machine without GPUs does not run it; None if it does.

        The processes of a CPU share its memory, and the system kills them without a message when it is full.

        Args:
            overrides: of this part, after those of the case.
        """
        if self.tokens is None or any(word.startswith("data.context=") for word in overrides):
            return None
        return (
            f"it needs GPUs: {self.tokens:,} tokens on each device can fill the memory of a machine without GPUs. "
            f"Give {self.part}:data.context=N for a short sequence, or leave the part {self.part} out of --parts"
        )

    def overrides(self) -> list[str]:
        """Of scripts/train.py."""
        steps = _STEPS["longest" if self.tokens is not None and self.tokens >= LONG else self.part]
        words = [*_SETTINGS[self.part], f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}", *_QUIET]
        if self.tokens is not None:
            words.append(f"data.context={self.gpus * self.tokens}")
            words += _BLOCK if self.tokens >= LONG else ()
        if self.how != "single":
            strategy = "ddp" if self.how == "context_parallel" else self.how
            words += [f"trainer={strategy}", f"trainer.devices={self.gpus}"]
        return words + [f"trainer.context_parallel={self.gpus}"] * (self.how == "context_parallel")


def first_cases(parts: Sequence[str], counts: Sequence[int]) -> list[Case]:
    """The cases that are measured before those of `longest`, in this order: by number of GPUs, so that runs on few GPUs
    fill the machine."""
    found = []
    for n in sorted(counts):
        if "base" in parts:
            found += [Case("base", how, n) for how in (["single"] if n == 1 else ["ddp", "fsdp"])]
        if "large" in parts:
            found.append(Case("large", "single" if n == 1 else "fsdp", n))
        if "context" in parts:
            found += [Case("context", _divided(n), n, tokens) for tokens in ((LONG, SHORT) if n == 1 else (LONG,))]
    if "agreement" in parts:
        hows = ("ddp", "fsdp", "context_parallel")
        found += [Case("agreement", "single", 1), *(Case("agreement", how, n) for n in counts if n > 1 for how in hows)]
    return found


def last_cases(parts: Sequence[str], counts: Sequence[int]) -> list[Case]:
    """The cases that are measured after all others."""
    return [Case("context", _divided(n), n, SHORT) for n in sorted(counts) if n > 1 and "context" in parts]


def _divided(gpus: int) -> str:
    return "single" if gpus == 1 else "context_parallel"


def longest_cases(rows: Sequence[Row], counts: Sequence[int], *, memory_gib: float) -> list[Case]:
    """For each number of GPUs the next length to try: none where a row says how long it may be, where all were tried,
    or where 256K tokens on each GPU were not measured.

    Args:
        memory_gib: the memory of a GPU.
    """
    found = []
    for n in counts:
        of_n = [row for row in rows if row["gpus"] == n]
        tried = [row for row in of_n if row["part"] == "longest"]
        of_context = [row for row in of_n if row["part"] == "context" and row["tokens"] == LONG]
        peaks = [row["peak_memory_gib"] for row in of_context if row.get("peak_memory_gib") is not None]
        if any("reason" not in row for row in tried) or len(tried) == len(_SHARES) or not peaks:
            continue
        tokens = _SHARES[len(tried)] * memory_gib / peaks[0] * LONG
        found.append(Case("longest", _divided(n), n, int(tokens) // _STEP_OF_LENGTHS * _STEP_OF_LENGTHS))
    return found


def side_by_side(cases: Sequence[Case], gpus: int) -> Iterator[list[Case]]:
    """The cases, in order, as groups that run at the same time on that many GPUs."""
    group: list[Case] = []
    for case in cases:
        shared = case.shares_gpus and all(other.shares_gpus for other in group)
        if group and not shared and (case.shares_gpus or sum(other.gpus for other in group) + case.gpus > gpus):
            yield group
            group = []
        group.append(case)
    if group:
        yield group
