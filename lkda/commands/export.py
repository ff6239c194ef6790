"""Write a trained model into a directory that other programs can load."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

import lkda
from lkda.checks import check_values
from lkda.commands.run.checkpoint_loading import TrainedModel, config_of_run, load_trained
from lkda.commands.run.run_directory import read_summary
from lkda.commands.settings.config import resolve
from lkda.formats import check_export, find_format
from lkda.metrics_file import read_metrics
from lkda.perplexity import perplexity


def export(config: DictConfig) -> Path:
    """Export `ckpt` to `out` in `format`, with a model card that describes the run.

    Args:
        config: composed from configs/export.yaml.
    Returns: the directory.
    Raises:
        InputError: for an unknown format or dtype, an unusable checkpoint, a model that the format cannot express, or a
            directory that is not empty or cannot be written.
    """
    check_values(resolve(config), {"ckpt": Path, "out": Path, "format": str, "dtype": str | None})
    module = find_format(config.format)
    trained = load_trained(config.ckpt)
    dtype = check_export(trained.model.config, format=config.format, dtype=config.dtype)
    out = Path(config.out)
    logging.getLogger("gguf").setLevel(logging.WARNING)  # it would report a temporary path
    lkda.export(
        trained.model, trained.tokenizer, out, format=config.format, dtype=config.dtype, run=record_of_run(trained)
    )
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    console.print(f"{trained.path} -> {out} ({config.format})")
    usage = module.usage(str(out), dtype=dtype).splitlines()
    console.print("in Python:\n" + "".join(f"  {line}\n" for line in usage))
    return out


def record_of_run(trained: TrainedModel) -> dict[str, Any]:
    """What the model card says about the training. For an exported directory, only the configuration from its card.

    The results are those of the checkpoint's own step.
    """
    config = config_of_run(trained)
    if trained.step is None:
        return {"config": config}
    metadata = trained.run
    training = {
        "data": metadata["data"],
        "steps": trained.step,
        "tokens": trained.step * metadata["tokens_per_step"],
        "context": metadata["context"],
        "seed": metadata["seed"],
    }
    directory = trained.path.parent.parent
    summary = read_summary(directory / "summary.json")
    for name in ("learning_rate", "precision", "device", "git_commit"):
        training[name.replace("_", " ")] = summary.get(name)
    training |= {f"{name} version": version for name, version in summary.get("versions", {}).items()}
    return {"training": training, "results": _measured(directory / "metrics.csv", trained), "config": config}


def _measured(metrics: Path, trained: TrainedModel) -> dict[str, Any]:
    """The results of the validation at the checkpoint's step; {} if there was none."""
    rows = [row for row in read_metrics(metrics) if row["val/loss"] and int(row["step"]) == trained.step]
    if not rows:
        return {}
    loss = float(rows[-1]["val/loss"])
    return {
        "validation loss (nats per token)": loss,
        "validation perplexity": perplexity(loss),
        "validation bits per byte": float(rows[-1]["val/bits_per_byte"]),
        "unigram entropy of the validation text (nats per token)": trained.run["unigram_entropy"],
    }
