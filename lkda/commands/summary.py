"""summary.json: the result of a run, with what is needed to compare it with another."""

from __future__ import annotations

import math
import platform
import statistics
import subprocess
from pathlib import Path
from typing import Any

import lightning
import torch

import lkda
from lkda.commands.run_directory import RunDirectory
from lkda.models.lm import LanguageModel
from lkda.training.accuracy import METRICS, column


def summarize(
    run: RunDirectory,
    model: LanguageModel,
    settings: dict[str, Any],
    facts: dict[str, Any],
    *,
    status: str,
    step: int,
    device: torch.device,
    backends: dict[str, str],
) -> dict[str, Any]:
    """What summary.json holds; what was measured comes from metrics.csv, so that a resumed run sums up as a whole.

    Args:
        settings: with trainer.precision as it ran, not `auto`.
        status: finished, interrupted or diverged.
        step: the last one; metrics.csv has a row every few steps only.
        facts: of the run, as in its checkpoints.
        backends: that ran, by operator.
    """
    context = facts["context"]
    latest = {name: values[-1] for name in run.columns() if (values := run.column(name))}
    tokens, seconds = step * facts["tokens_per_step"], latest.get("seconds", 0.0)
    speeds = run.column("tokens_per_s")
    loss = latest.get("val/loss")
    return {
        "status": status,
        "val/loss": loss,
        "val/perplexity": _perplexity(loss) if not facts["parts"] else None,
        "val/bits_per_byte": latest.get("val/bits_per_byte"),
        "unigram_entropy": facts["unigram_entropy"],
        **_of_test(facts.get("test"), run, step),
        "tokens": tokens,
        # A run shorter than the warm-up has no row with a speed.
        "tokens_per_s": statistics.median(speeds) if speeds else (tokens / seconds if seconds else None),
        "params": model.num_parameters(embedding=True),
        "params_non_embedding": model.num_parameters(embedding=False),
        "state_bytes": model.state_bytes(context),
        "flops_per_token": model.flops_per_token(context),
        "mixer": facts["mixer"],
        "model": facts["model"],
        "data": facts["data"],
        "context": context,
        "backend": " ".join(dict.fromkeys(backends.values())),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
        "precision": settings["trainer"]["precision"],
        "state_dtype": _state_dtype(model),
        "seed": facts["seed"],
        "fingerprint": facts["fingerprint"],
        "steps": step,
        "seconds": seconds,
        "clipped_share": _clipped_share(run),
        "learning_rate": settings["optimizer"]["lr"],
        "git_commit": git_commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "lkda": lkda.__version__,
        },
        **_by_part(facts["parts"], latest, model),
    }


def _of_test(test: dict[str, Any] | None, run: RunDirectory, step: int) -> dict[str, Any]:
    """What was measured on the test split after the last step; nothing where there is no split, or the run stopped
    before."""
    rows = [row for row in run.rows() if int(row["step"]) == step and row.get("test/loss")]
    if test is None or not rows:
        return {}
    loss = float(rows[-1]["test/loss"])
    return {
        "test/loss": loss,
        "test/perplexity": _perplexity(loss),
        "test/bits_per_byte": float(rows[-1]["test/bits_per_byte"]),
        "test_unigram_entropy": test["unigram_entropy"],
        "test_tokens": test["tokens"],
    }


def _clipped_share(run: RunDirectory) -> float | None:
    """Of all steps, those whose gradient was clipped; a row of metrics.csv speaks of the steps since the row before."""
    rows = [
        (int(row["step"]), float(row["train/clipped_share"])) for row in run.rows() if row.get("train/clipped_share")
    ]
    steps = [step for step, _ in rows]
    weights = [step - before for before, step in zip([0, *steps], steps)]
    return sum(weight * share for weight, (_, share) in zip(weights, rows)) / steps[-1] if steps else None


def _state_dtype(model: LanguageModel) -> str | None:
    """The type that the KDA layers keep their states in from call to call; None where there are no such layers."""
    words = [mixer.state_dtype for mixer in model.mixers() if hasattr(mixer, "state_dtype")]
    if not words:
        return None
    double = model.embed_tokens.weight.dtype == torch.float64
    return "float64" if double and words[0] == "float32" else str(words[0])


def _perplexity(loss: float | None) -> float | None:
    return math.exp(loss) if loss is not None and loss < 700 else None  # a float ends at exp(709)


def _by_part(parts: list[dict[str, int]], latest: dict[str, float], model: LanguageModel) -> dict[str, Any]:
    """Accuracies in the mean and of each part of the validation, with the state's bytes at its length."""
    if not parts:
        return {}
    rows = [
        {name: value for name, value in part.items() if name != "examples"}
        | {metric: latest[column(metric, part)] for metric in METRICS if column(metric, part) in latest}
        | {"state_bytes": model.state_bytes(part["length"])}
        for part in parts
    ]
    means = {name: latest.get(name) for name in ("val/accuracy", "val/sequence_accuracy")}
    return {**means, "parts": rows}


def git_commit() -> str | None:
    """The commit of the source tree that runs, with `+changes` where it has uncommitted ones; None outside git."""
    here = Path(lkda.__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"],
            cwd=here,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:  # no git on this machine
        return None
    return described.stdout.strip() or None
