"""Where a trained model comes from: a checkpoint, a run directory, or an exported directory."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from tokenizers import Tokenizer

from lkda.checks import InputError
from lkda.commands.run_directory import fingerprint_of
from lkda.formats import load, recorded_config
from lkda.formats.common.building import build_with_weights
from lkda.models.lm import LanguageModel
from lkda.old_names import current_model_config, translated
from lkda.training.checkpoint import read_checkpoint


@dataclass(frozen=True)
class TrainedModel:
    """A model with its tokenizer, where it has one, and the metadata of its run where they are known.

    Attributes:
        model: on the CPU, in eval mode.
        vocabulary: the tokenizer it was trained with; None where its tokens are no text.
        run: plain values (mixer, data, bytes_per_token, ...), {} for an exported directory.
        path: the file or directory that was read.
        step: of the run, None for an exported directory.
        fingerprint: of the data that it was trained on, {} where it is not known.
    """

    model: LanguageModel
    vocabulary: Tokenizer | None
    path: Path
    run: dict[str, Any] = field(default_factory=dict)
    step: int | None = None
    fingerprint: dict[str, str | None] = field(default_factory=dict)

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises ValueError where the model's tokens are no text."""
        if self.vocabulary is None:
            raise InputError(
                f"{self.path} was trained on {self.run['data']}, whose tokens are no text; this needs a model of text."
            )
        return self.vocabulary


def load_trained(path: str | Path, *, backend: str = "auto") -> TrainedModel:
    """Read a checkpoint file, a run directory (its last checkpoint) or an exported directory.

    Args:
        path: of it.
        backend: of the ops.
    Raises:
        ValueError: nothing is there, or it is truncated, of another kind, or holds another model's weights.
    """
    if not isinstance(path, str | Path) or not str(path):
        raise InputError(f"ckpt must be a path (one of digits alone needs quotes), got {path!r}.")
    path = Path(path)
    if path.is_dir() and (path / "config.json").exists():
        model, tokenizer = load(path, backend=backend)
        return TrainedModel(model, tokenizer, path)
    if path.is_dir():
        path = _last_of_run(path)
    checkpoint = read_checkpoint(path)
    ours = checkpoint["lkda"]
    prefix = "model."
    weights = {
        name.removeprefix(prefix): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(prefix)
    }
    model = build_with_weights(current_model_config(ours["model"]), weights, source=path, backend=backend)
    vocabulary = None if ours["tokenizer"] is None else Tokenizer.from_str(ours["tokenizer"])
    return TrainedModel(model, vocabulary, path, ours["run"], ours["step"], fingerprint_of(checkpoint))


def _last_of_run(directory: Path) -> Path:
    """Raises ValueError, naming the others, where a run directory has checkpoints and none of them is the last."""
    last = directory / "checkpoints" / "last.ckpt"
    others = sorted(path.name for path in last.parent.glob("*.ckpt"))
    if others and not last.exists():
        raise InputError(
            f"there is no checkpoint at {last}; beside it there is {', '.join(others)}: give one as ckpt=."
        )
    return last


def config_of_run(trained: TrainedModel) -> dict[str, Any]:
    """The configuration of the run that a model comes from, {} where it is not known.

    It stands in the config.yaml of the run in whose directory a checkpoint lies, and in the card of an exported
    directory. Raises: ValueError where what stands there cannot be read.
    """
    if trained.step is None:
        return translated(recorded_config(trained.path))
    path = trained.path.parent.parent / "config.yaml"
    found = OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else {}
    assert isinstance(found, dict)
    return translated({str(name): value for name, value in found.items()})
