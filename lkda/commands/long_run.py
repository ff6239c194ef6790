"""Train a very small model for many steps, and measure whether memory and the time of a step stay the same.

    python -m lkda.commands.long_run --steps 20000 --out outputs/long_run

Writes long_run.json and, from it, long_run.png and table.json. The arguments key=value are settings of
scripts/train.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from omegaconf import open_dict

from lkda.commands.command_line import readable_errors
from lkda.commands.shipped import CONFIGS
from lkda.commands.train import train
from lkda.io import write_atomically
from lkda.report.studies.long_run import KIND, redraw
from lkda.training.callbacks.steps import ends_step

BLOCKS = 40  # of which each gives one row
FIXED = 20  # times that the fixed calculation is measured for a row
SETTINGS = ("debug=fast", "data=random", "trainer=cpu", "callbacks=none", "sample.max_new_tokens=0")


class GrowthMeter(L.Callback):
    """Appends a row every `every` steps to `rows`.

    Args:
        every: optimizer steps.
        rows: each gets step, cpu_seconds_per_step (the mean since the row before, with all that belongs to a run:
            validations, rows and checkpoints; what else the machine computes does not count), fixed_cpu_seconds (of a
            calculation that is always the same, measured between the steps: other work on the machine makes both
            slower), steps_per_fixed (the first as a multiple of the second), resident_bytes of the process, and
            objects, the number of Python's objects that the garbage collector knows.
    """

    def __init__(self, every: int, rows: list[dict[str, float]]) -> None:
        self.every = every
        self.rows = rows
        self._since = 0.0
        self._fixed: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since = time.process_time()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not ends_step(trainer, batch_idx):
            return
        if trainer.global_step % max(1, self.every // FIXED) == 0:
            self._fixed.append(fixed_calculation())
        if trainer.global_step % self.every:
            return
        seconds = (time.process_time() - self._since - sum(self._fixed)) / self.every
        fixed = statistics.fmean(self._fixed)
        gc.collect()
        row = {"step": trainer.global_step, "cpu_seconds_per_step": seconds, "fixed_cpu_seconds": fixed}
        row |= {
            "steps_per_fixed": seconds / fixed,
            "resident_bytes": resident_bytes(),
            "objects": len(gc.get_objects()),
        }
        self.rows.append(row)
        self._fixed.clear()
        self._since = time.process_time()


def fixed_calculation() -> float:
    """The CPU time in seconds of a calculation like that of a step: many small operations, forward and backward."""
    begun = time.process_time()
    with torch.enable_grad():
        x = torch.ones(64, 32, requires_grad=True)
        for _ in range(20):
            (x @ x.T).relu().sum().backward()
    return time.process_time() - begun


def resident_bytes() -> int:
    """The memory of this process that is in use, in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def measure(steps: int, *overrides: str) -> list[dict[str, float]]:
    """Train, in a directory that is removed afterwards. Returns the rows of `GrowthMeter`."""
    every = max(1, steps // BLOCKS)
    lengths = (
        f"trainer.max_steps={steps}",
        f"trainer.val_check_interval={every}",
        f"checkpoint.every_n_steps={every}",
        "trainer.log_every_n_steps=10",
    )
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", overrides=[*SETTINGS, *lengths, *overrides])
    rows: list[dict[str, float]] = []
    _METERS[id(rows)] = GrowthMeter(every, rows)
    with open_dict(config):
        config.callbacks.growth = {"_target_": f"{__name__}.meter", "number": id(rows)}
    try:
        with tempfile.TemporaryDirectory() as folder:
            train(config, Path(folder) / "run")
    finally:
        del _METERS[id(rows)]
    return rows


_METERS: dict[int, GrowthMeter] = {}


def meter(number: int) -> GrowthMeter:
    """The meter of that number. Hydra makes callbacks from names and plain values."""
    return _METERS[number]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000, help="optimizer steps")
    parser.add_argument("--out", type=Path, required=True, help="directory for the results")
    parser.add_argument("overrides", nargs="*", help="settings of scripts/train.py")
    given = parser.parse_args(arguments)
    with readable_errors():
        rows = measure(given.steps, *given.overrides)
        header = {"device": "cpu", "processor": platform.machine(), "threads": torch.get_num_threads()}
        found = {"kind": KIND, "header": {**header, "torch": torch.__version__, "steps": given.steps}, "rows": rows}
        given.out.mkdir(parents=True, exist_ok=True)
        write_atomically(given.out / "long_run.json", json.dumps(found, indent=1) + "\n")
        redraw(given.out / "long_run.json")


if __name__ == "__main__":
    main()
