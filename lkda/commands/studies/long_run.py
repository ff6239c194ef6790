"""Train for many steps, or for some minutes, and measure whether memory and the time of a step stay the same.

    python -m lkda.commands.studies.long_run --steps 20000 --out outputs/long_run
    python -m lkda.commands.studies.long_run --minutes 20 --out outputs/long_run_gpu model=small data.context=2048

With --steps, a very small model trains on the CPU. With --minutes, the settings are those of scripts/train.py with
data=random, so that the device is a GPU if there is one.

Writes long_run.json and, from it, long_run.png and table.json. All are written anew at each of the 40 rows, so that
what was measured is kept if the command is stopped. The arguments key=value are settings of scripts/train.py.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import platform
import resource
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from omegaconf import open_dict

from lkda.checks import InputError, check_count
from lkda.commands.command_line.errors import readable_errors
from lkda.commands.train import train
from lkda.io import write_atomically
from lkda.report.studies.long_run import KIND, redraw
from lkda.shipped import CONFIGS
from lkda.training.callbacks.steps import ends_step

Rows = list[dict[str, float]]

BLOCKS = 40  # of which each gives one row
FIXED = 20  # times that the fixed calculation is measured for a row
LEAST_MINUTES = 0.01
SETTINGS = ("data=random", "callbacks=none", "sample.max_new_tokens=0")
OF_STEPS = ("debug=fast", "trainer=cpu", "trainer.log_every_n_steps=10")
_STOPPED = 128 + signal.SIGTERM
# More steps than any such run has.
_ENDLESS = 10**9


class GrowthMeter(L.Callback):
    """Appends a row to `rows` after every `every` steps, or `seconds`.

    Args:
        keep: is called after each row.
        every: optimizer steps between two rows; None: by time.
        seconds: between two rows. The run is stopped, and saved, after BLOCKS of them.

    Each row has step, resident_bytes of the process, and objects, the number of Python's objects that the garbage
    collector knows. On a GPU it has seconds_per_step (the mean since the row before, with all that belongs to a run:
    validations, rows and checkpoints) and device_bytes, the memory that the process has reserved there. On a CPU it has
    cpu_seconds_per_step (as seconds_per_step, but what else the machine computes does not count), fixed_cpu_seconds (of
    a calculation that is always the same, measured between the steps: other work on the machine makes both slower), and
    steps_per_fixed (the first as a multiple of the second).
    """

    def __init__(
        self, rows: Rows, keep: Callable[[], None], *, every: int | None = None, seconds: float | None = None
    ) -> None:
        self.rows, self.keep, self.every, self.seconds = rows, keep, every, seconds
        self._fixed: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(trainer)

    def _begin(self, trainer: L.Trainer) -> None:
        """Begin to measure the next row."""
        self._step, self._wall, self._cpu = trainer.global_step, time.monotonic(), time.process_time()
        self._fixed.clear()

    def _share(self, trainer: L.Trainer) -> float:
        """How much of the time to the next row has passed; 1: all of it."""
        if self.every is not None:
            return (trainer.global_step - self._step) / self.every
        assert self.seconds is not None
        return (time.monotonic() - self._wall) / self.seconds

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not ends_step(trainer, batch_idx):
            return
        share, on_gpu = self._share(trainer), pl_module.device.type == "cuda"
        if not on_gpu and FIXED * share >= len(self._fixed) + 1:
            self._fixed.append(fixed_calculation())
        if share < 1:
            return
        measured = self._on_gpu(trainer) if on_gpu else self._on_cpu(trainer)
        gc.collect()
        row = {"step": trainer.global_step, **measured}
        self.rows.append(row | {"resident_bytes": resident_bytes(), "objects": len(gc.get_objects())})
        self.keep()
        self._begin(trainer)
        if self.every is None and len(self.rows) == BLOCKS:
            os.kill(os.getpid(), signal.SIGTERM)

    def _on_gpu(self, trainer: L.Trainer) -> dict[str, float]:
        torch.cuda.synchronize()  # the steps that the device still computes belong to this row
        seconds = (time.monotonic() - self._wall) / (trainer.global_step - self._step)
        return {"seconds_per_step": seconds, "device_bytes": torch.cuda.memory_reserved()}

    def _on_cpu(self, trainer: L.Trainer) -> dict[str, float]:
        steps = trainer.global_step - self._step
        seconds = (time.process_time() - self._cpu - sum(self._fixed)) / steps
        fixed = statistics.fmean(self._fixed)
        return {"cpu_seconds_per_step": seconds, "fixed_cpu_seconds": fixed, "steps_per_fixed": seconds / fixed}


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


def measure(
    *overrides: str,
    steps: int | None = None,
    minutes: float | None = None,
    keep: Callable[[Rows], None] = lambda rows: None,
) -> Rows:
    """Train, in a directory that is removed afterwards, without printing. Returns the rows of `GrowthMeter`.

    Args:
        steps: optimizer steps of a very small model on the CPU; None: the run ends after `minutes`.
        keep: is called with all rows after each new one.
    """
    every, seconds = None, None
    if steps is not None:
        every = max(1, steps // BLOCKS)
        lengths = [*OF_STEPS, f"trainer.max_steps={steps}", f"trainer.val_check_interval={every}"]
        lengths.append(f"checkpoint.every_n_steps={every}")
    else:
        assert minutes is not None
        seconds = 60 * minutes / BLOCKS
        lengths = [f"trainer.max_steps={_ENDLESS}", f"checkpoint.every_minutes={minutes / BLOCKS}"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", overrides=[*SETTINGS, *lengths, *overrides])
    rows: Rows = []
    _METERS[id(rows)] = GrowthMeter(rows, lambda: keep(rows), every=every, seconds=seconds)
    with open_dict(config):
        config.callbacks.growth = {"_target_": f"{__name__}.meter", "number": id(rows)}
    try:
        # What a run prints at its end are commands for its directory.
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
            train(config, Path(folder) / "run")
    except SystemExit as ending:
        if ending.code != _STOPPED or minutes is None or len(rows) < BLOCKS:
            raise
    finally:
        del _METERS[id(rows)]
    return rows


_METERS: dict[int, GrowthMeter] = {}


def meter(number: int) -> GrowthMeter:
    """The meter of that number. Hydra makes callbacks from names and plain values."""
    return _METERS[number]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="optimizer steps; default: 20000")
    parser.add_argument("--minutes", type=float, help="minutes of training, in place of --steps")
    parser.add_argument("--out", type=Path, required=True, help="directory for the results")
    parser.add_argument("overrides", nargs="*", help="settings of scripts/train.py")
    given = parser.parse_intermixed_args(arguments)
    with readable_errors():
        if given.steps is not None and given.minutes is not None:
            raise InputError("--steps and --minutes both say how long the run is: give only one of them.")
        if given.minutes is not None and not LEAST_MINUTES <= given.minutes < float("inf"):
            raise InputError(f"--minutes must be {LEAST_MINUTES} or more, got {given.minutes}.")
        steps = 20_000 if given.steps is None and given.minutes is None else given.steps
        if steps is not None:
            check_count("--steps", steps, least=4)
        given.out.mkdir(parents=True, exist_ok=True)
        path = given.out / "long_run.json"
        rows: Rows = []

        def keep(found: Rows) -> None:
            rows[:] = found
            header = _header(rows, minutes=given.minutes, settings=given.overrides)
            write_atomically(path, json.dumps({"kind": KIND, "header": header, "rows": rows}, indent=1) + "\n")
            if len(rows) >= 4:  # a quarter has a row
                redraw(path)

        try:
            measure(*given.overrides, steps=steps, minutes=given.minutes, keep=keep)
        finally:  # also if the command is stopped
            if rows:
                print(f"{path} has {len(rows)} row{'s' * (len(rows) != 1)}, up to step {rows[-1]['step']}.")


def _header(rows: Rows, *, minutes: float | None, settings: Sequence[str]) -> dict[str, Any]:
    of_gpu = "device_bytes" in rows[-1]
    return {
        "device": torch.cuda.get_device_name() if of_gpu else "cpu",
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "steps": rows[-1]["step"],
        "minutes": minutes,
        "settings": list(settings),
    }


if __name__ == "__main__":
    main()
