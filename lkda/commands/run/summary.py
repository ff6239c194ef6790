"""summary.json: the result of a run, with the settings that are needed to compare it with other runs."""

from __future__ import annotations

import platform
import statistics
import subprocess
from pathlib import Path
from typing import Any

import lightning
import torch

import lkda
from lkda.commands.run.fit import Outcome
from lkda.commands.run.prepared_run import PreparedRun
from lkda.commands.run.run_directory import RunDirectory
from lkda.device import in_threads
from lkda.models.lm import LanguageModel
from lkda.perplexity import perplexity
from lkda.training.accuracy import by_subset
from lkda.training.callbacks import DivergedError, InterruptedRunError


def summarize(run: RunDirectory, model: LanguageModel, prepared: PreparedRun, outcome: Outcome) -> dict[str, Any]:
    """The content of summary.json. The measurements come from metrics.csv, so that they cover all parts of a resumed
    run.

    Args:
        model: the trained model.
        outcome: how the training ended.
    """
    ending = outcome.ending
    status = {InterruptedRunError: "interrupted", DivergedError: "diverged"}.get(type(ending), "finished")
    # The last step. It cannot be read from metrics.csv, which has only a row every few steps.
    step = max(prepared.first_step, prepared.total_steps) if ending is None else ending.step
    metadata, plan, rows = prepared.metadata, prepared.plan, run.rows()
    latest = {name: float(value) for row in rows for name, value in row.items() if value}
    loss = latest.get("val/loss")
    return {
        "status": status,
        "val/loss": loss,
        "val/perplexity": perplexity(loss) if not metadata["val_subsets"] else None,
        "val/bits_per_byte": latest.get("val/bits_per_byte"),
        "unigram_entropy": metadata["unigram_entropy"],
        **_of_test(metadata["test"], rows, step),
        **_of_training(rows, latest, step=step, tokens=step * metadata["tokens_per_step"]),
        **_of_model(model, metadata["context"]),
        **{name: metadata[name] for name in ("mixer", "model", "data", "context", "seed", "fingerprint")},
        "backend": " ".join(dict.fromkeys(plan.backends.values())) or None,
        "device": _device(plan.device, count=plan.trainer.world_size),
        "devices": plan.trainer.world_size,
        "strategy": plan.trainer.strategy,
        "precision": plan.trainer.precision,
        "checkpointing": plan.checkpointing,
        "learning_rate": metadata["learning_rate"],
        "skipped_steps": outcome.skipped_steps,
        "checkpoints": outcome.checkpoints,
        "checkpoint_seconds": outcome.checkpoint_seconds,
        "git_commit": git_commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "lkda": lkda.__version__,
        },
        **_by_subset(metadata["val_subsets"], latest, model),
    }


def _of_training(rows: list[dict[str, str]], latest: dict[str, float], *, step: int, tokens: int) -> dict[str, Any]:
    """How far the training went, how fast, and in how much memory.

    Args:
        latest: the last value in each column of the rows.
    """
    seconds = latest.get("seconds", 0.0)
    speeds = {name: _values(rows, name) for name in ("tokens_per_s", "tflops_per_s", "mfu")}
    return {
        "steps": step,
        "tokens": tokens,
        "seconds": seconds,
        **{name: statistics.median(values) if values else None for name, values in speeds.items()},
        # A run that is shorter than the warm-up has no row with a speed.
        **({} if speeds["tokens_per_s"] else {"tokens_per_s": tokens / seconds if seconds else None}),
        "peak_memory_gib": max(_values(rows, "peak_memory_gib"), default=None),
        "clipped_share": _clipped_share(rows),
    }


def _values(rows: list[dict[str, str]], name: str) -> list[float]:
    return [float(row[name]) for row in rows if row.get(name)]


def _of_model(model: LanguageModel, context: int) -> dict[str, Any]:
    return {
        "params": model.num_parameters(embedding=True),
        "params_non_embedding": model.num_parameters(embedding=False),
        "state_bytes": model.state_bytes(context),
        "flops_per_token": model.flops_per_token(context),
        "state_dtype": _state_dtype(model),
    }


def _device(device: torch.device, *, count: int) -> str:
    """The device in words, such as "4 x NVIDIA H100 80GB HBM3". Runs on other devices cannot be compared in speed."""
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else f"cpu, {in_threads(torch.get_num_threads())}"
    return name if count == 1 else f"{count} x {name}"


def _of_test(test: dict[str, Any] | None, rows: list[dict[str, str]], step: int) -> dict[str, Any]:
    """The results on the test split after the last step; {} if there is no test split or the run stopped early."""
    measured = [row for row in rows if int(row["step"]) == step and row.get("test/loss")]
    if test is None or not measured:
        return {}
    loss = float(measured[-1]["test/loss"])
    return {
        "test/loss": loss,
        "test/perplexity": perplexity(loss),
        "test/bits_per_byte": float(measured[-1]["test/bits_per_byte"]),
        "test_unigram_entropy": test["unigram_entropy"],
        "test_tokens": test["tokens"],
    }


def _clipped_share(rows: list[dict[str, str]]) -> float | None:
    """The share of steps whose gradient was clipped. A row of metrics.csv has the share since the previous such row."""
    shares = [(int(row["step"]), float(row["train/clipped_share"])) for row in rows if row.get("train/clipped_share")]
    steps = [step for step, _ in shares]
    weights = [step - before for before, step in zip([0, *steps], steps)]
    return sum(weight * share for weight, (_, share) in zip(weights, shares)) / steps[-1] if steps else None


def _state_dtype(model: LanguageModel) -> str | None:
    """The data type in which KDA layers store their states between calls; None if the model has no KDA layers."""
    words = [mixer.state_dtype for mixer in model.mixers() if hasattr(mixer, "state_dtype")]
    if not words:
        return None
    double = model.embed_tokens.weight.dtype == torch.float64
    return "float64" if double and words[0] == "float32" else str(words[0])


def _by_subset(subsets: list[dict[str, int]], latest: dict[str, float], model: LanguageModel) -> dict[str, Any]:
    """The mean accuracies, and for each validation subset its accuracies and the bytes of a state at its length."""
    if not subsets:
        return {}
    rows = [
        record | {"state_bytes": model.state_bytes(record["subset"]["length"])} for record in by_subset(subsets, latest)
    ]
    means = {name: latest.get(name) for name in ("val/accuracy", "val/sequence_accuracy")}
    return {**means, "val_subsets": rows}


def git_commit() -> str | None:
    """The commit of the running source tree, with `+changes` if there are uncommitted changes; None outside git."""
    here = Path(lkda.__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"],
            cwd=here,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:  # git is not installed
        return None
    return described.stdout.strip() or None
