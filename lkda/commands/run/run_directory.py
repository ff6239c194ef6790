"""The run directory, which records a run: its files, and the lock of the process that writes them."""

from __future__ import annotations

import fcntl
import io
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from tokenizers import Tokenizer

from lkda.checks import InputError, refusing_damage
from lkda.commands.settings.paths import data_with_absolute_paths
from lkda.data.fingerprint import of_tokenizer
from lkda.io import write_atomically
from lkda.metrics_file import read_metrics
from lkda.old_names import translated
from lkda.records import check_yaml, read_record
from lkda.run_failure import FAILURE, OtherRunError
from lkda.tokenizer_loading import tokenizer_from_text
from lkda.training.checkpoint import newest_intact
from lkda.training.options import sequences_per_batch
from lkda.training.sharded_checkpoint import remove

_CONFIG = "config.yaml"
# Settings that change what a run computes. A resumed run must have the same values.
_FIXED = ("model", "mixer", "data", "optimizer", "scheduler", "seed", "init_from", "rope_base", "trainer")
# Settings in these groups that a resumed run may change: the length of the run, the place of the cache, the number of
# workers and what is printed. The groups outside _FIXED may change too: backend, compile, checkpointing, checkpoint,
# logger, callbacks and sample.
_FREE = {
    "data": ("cache_dir", "num_workers", "pin_memory"),
    "trainer": (
        *("max_steps", "max_tokens", "accelerator", "log_every_n_steps", "detect_anomaly", "profiler", "bad_steps"),
        *("deterministic", "enable_model_summary", "enable_progress_bar"),
        # Of the devices only the number of sequences that they train on together is fixed; see `_fixed`.
        *("devices", "num_nodes", "strategy", "global_batch", "context_parallel", "timeout_minutes"),
        # These have the same value in every run.
        *("max_epochs", "check_val_every_n_epoch", "num_sanity_val_steps", "use_distributed_sampler"),
    ),
}
# If the content of the data is known by its fingerprint, its path may change too.
PLACES = ("paths", "val_paths", "test_paths", "tokenizer_path", "directory")
# The settings that name a choice of one of these groups.
_NAMES = ("model.name", "mixer.name", "data._target_", "data.source", "data.name")
# How many settings that differ a message names.
MOST_SHOWN = 4
# Groups in every configuration of lkda. A config.yaml without them belongs to another program and is not overwritten.
_OURS = {"model", "mixer", "data", "trainer"}


class RunFiles:
    """The paths of a run directory."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self.config = self.path / _CONFIG
        self.metrics = self.path / "metrics.csv"
        self.summary = self.path / "summary.json"
        self.samples = self.path / "samples.txt"
        self.tokenizer = self.path / "tokenizer.json"
        self.checkpoints = self.path / "checkpoints"

    def holds_run(self) -> bool:
        """Whether a run has done at least one step here: there is a checkpoint, or a row in metrics.csv."""
        if any(not path.name.startswith(".") for path in self.checkpoints.glob("*.ckpt*")):
            return True
        return self.metrics.exists() and self.metrics.read_bytes().count(b"\n") > 1


class RunDirectory(RunFiles):
    """A run directory, and the lock of the process that trains in it.

    Args:
        path: the directory, which is created if it does not exist.
    Raises: InputError if the directory cannot be written, OtherRunError if another process trains in it.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        there = [path for path in self._files() if path.exists()]
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.checkpoints):
                pass
        except OSError as error:
            raise InputError(f"cannot write the run directory {self.path}: {error.strerror}.") from error
        self._lock = os.open(self.checkpoints, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise OtherRunError(
                f"another process is training in {self.path}. Wait for it, or choose another hydra.run.dir."
            ) from error
        self._before = there

    @classmethod
    def unused(cls, path: str | Path) -> RunDirectory:
        """The directory, or the first of PATH_2, PATH_3, ... that no other run has: two runs that begin in the same
        second have the same default name."""
        candidate, number = Path(path), 1
        while True:
            with suppress(OtherRunError):
                run = cls(candidate)
                if not run._before and not run.holds_run():
                    return run
                run.release()
            number += 1
            candidate = Path(path).with_name(f"{Path(path).name}_{number}")

    def _files(self) -> tuple[Path, ...]:
        return self.config, self.metrics, self.summary, self.samples, self.tokenizer

    def release(self) -> None:
        """Release the lock, which otherwise ends with the process.

        If the run failed before its first step, the files that it wrote are removed, and the directory too if it is
        empty.
        """
        try:
            if not self.holds_run():
                for path in self._files():
                    if path not in self._before:
                        path.unlink(missing_ok=True)
            for folder in (self.checkpoints, self.path):
                with suppress(OSError):  # fails if the directory is not empty
                    folder.rmdir()
        finally:  # the directory may have become unreadable
            os.close(self._lock)

    def begin(self, config: Mapping[str, Any], *, resume: bool) -> tuple[Path, dict[str, Any]] | None:
        """Claim the directory for a run with the settings `config`, a plain dict.

        Returns: path and content of the newest intact checkpoint to resume from; None to start from step 0.
        Raises: OtherRunError if the directory holds a run and `resume` is false, or if that run has other settings;
            InputError if none of its checkpoints can be read, or if the config.yaml in it is not one of lkda's.
        """
        recorded = recorded_config(self.path)
        before = None if recorded is None else translated(recorded)
        if self.holds_run() and before is None:
            raise OtherRunError(
                f"{self.path} holds a run whose config.yaml is missing, so its settings are not known. Restore "
                "the file, or choose another hydra.run.dir."
            )
        if self.holds_run() and not resume:
            raise OtherRunError(
                f"{self.path} already holds a run. Continue it with resume=true, or choose another hydra.run.dir."
            )
        for left_over in self.checkpoints.glob(".*.tmp"):
            remove(left_over)
        if before is None or not self.holds_run():
            return None
        now = translated(config)  # adds the options that a model of another package does not state, as in `before`
        self._check_settings(before, now, free_places=True)
        saved = newest_intact(self.checkpoints)
        with refusing_damage(self.checkpoints):
            fingerprint = {} if saved is None else fingerprint_of(saved[1])
        self._check_settings(before, now, free_places=saved is None or "train" in fingerprint)
        return saved

    def _check_settings(self, before: Mapping[Any, Any], now: Mapping[str, Any], *, free_places: bool) -> None:
        changed = changed_settings(before, now, free_places=free_places)
        if changed:
            shown = "; ".join(changed[:MOST_SHOWN])
            raise OtherRunError(
                f"{self.path} holds a run with other settings ({shown}), so it cannot be resumed. "
                "Give the recorded settings, or choose another hydra.run.dir."
            )

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write config.yaml, the resolved configuration. The run begins again if it had failed."""
        (self.path / FAILURE).unlink(missing_ok=True)
        write_atomically(self.config, OmegaConf.to_yaml(OmegaConf.create(dict(config))))

    def write_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Write tokenizer.json."""
        write_atomically(self.tokenizer, tokenizer.to_str(pretty=True))

    def write_samples(self, text: str) -> None:
        """Write samples.txt, the text that was sampled at the end."""
        write_atomically(self.samples, text + "\n")

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, the result of the run."""
        write_atomically(self.summary, json.dumps(summary, indent=2) + "\n")

    def read_summary(self) -> dict[str, Any]:
        """The content of summary.json; {} if there is none."""
        return read_summary(self.summary)

    def rows(self) -> list[dict[str, str]]:
        """The rows of metrics.csv, in order, as text by column."""
        return read_metrics(self.metrics)


def recorded_config(run_dir: Path) -> dict[str, Any] | None:
    """The unchanged content of the config.yaml of a run directory; None if there is none.

    Raises: InputError if the file cannot be read, or if it is not a configuration of lkda.
    """
    path = run_dir / _CONFIG
    if not path.exists():
        return None
    found = read_yaml(path)
    if not isinstance(found, dict) or not found.keys() >= _OURS:
        raise InputError(f"{path} is not a configuration of lkda: choose another hydra.run.dir.")
    return {str(name): value for name, value in found.items()}


def read_yaml(path: Path) -> Any:
    """The values of a YAML file that may come from a stranger. Raises: InputError if it cannot be read."""
    try:
        text = read_record(path)
        check_yaml(text, source=path)
        return OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
    except (yaml.YAMLError, OSError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}.") from error


def read_summary(path: Path) -> dict[str, Any]:
    """The content of a run's summary.json; {} if there is none. Raises: ValueError if it cannot be read."""
    try:
        found = json.loads(read_record(path)) if path.exists() else {}
    except InputError:
        raise
    except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
        raise InputError(f"{path} is damaged: it is not JSON ({error}). Put it back, or move it away.") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is damaged: it holds no table of values. Put it back, or move it away.")
    return found


def fingerprint_of(checkpoint: Mapping[str, Any]) -> dict[str, str | None]:
    """The fingerprint of the data and the tokenizer that a checkpoint was trained with. A checkpoint of an earlier
    version without a fingerprint gives only that of its tokenizer, if it has one."""
    ours = checkpoint["lkda"]
    found = dict(ours["run"].get("fingerprint") or {})
    if ours["tokenizer"] is not None:
        found["tokenizer"] = of_tokenizer(tokenizer_of(ours["tokenizer"], source="the checkpoint"))
    return found


def tokenizer_of(text: str, *, source: object) -> Tokenizer:
    """The tokenizer that a checkpoint holds as JSON. Raises: InputError, naming `source`, if it is not one."""
    return tokenizer_from_text(text, problem=f"{source} is damaged: it holds no tokenizer")


def _fixed(config: Mapping[Any, Any], free_places: bool) -> dict[str, Any]:
    """The settings that a resumed run must not change, with absolute paths."""
    free = {**_FREE, "data": (*_FREE["data"], *(PLACES if free_places else ()))}
    absolute = data_with_absolute_paths(config.get("data") or {})
    found: dict[str, Any] = {**{key: config.get(key) for key in _FIXED}, "data": absolute}
    if "batch_size" in absolute:
        absolute["batch_size"] = sequences_per_batch(absolute["batch_size"], config.get("trainer") or {})
    for group, names in free.items():
        found[group] = {key: value for key, value in (found[group] or {}).items() if key not in names}
    if isinstance(found["init_from"], str):
        found["init_from"] = os.path.abspath(found["init_from"])
    return found


def changed_settings(before: Mapping[Any, Any], now: Mapping[Any, Any], *, free_places: bool) -> list[str]:
    """The settings that differ and that a resumed run must not change, each as `KEY: BEFORE is recorded, NOW is given`.

    Args:
        before, now: the content of config.yaml with the names of today, as it is recorded and as it would be written.
        free_places: whether the places of the data may differ.
    """
    changed = differences(_fixed(before, free_places), _fixed(now, free_places))
    # With another model, mixer or data set, many settings differ: its name says it all.
    named = [line for line in changed if line.partition(": ")[0] in _NAMES]
    return named or changed


def differences(before: Any, now: Any, key: str = "") -> list[str]:
    """Every value in which two nested dicts differ, as `key: BEFORE is recorded, NOW is given`."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return [] if before == now else [f"{key}: {before} is recorded, {now} is given"]
    found = []
    for name in [*before, *(name for name in now if name not in before)]:
        found += differences(before.get(name), now.get(name), f"{key}.{name}" if key else str(name))
    return found
