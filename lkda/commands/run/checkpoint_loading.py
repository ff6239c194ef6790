"""Loads a trained model from a checkpoint, a run directory, or an exported directory."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lkda.checks import InputError, refusing_damage
from lkda.commands.command_line.overrides import override
from lkda.commands.run.run_directory import fingerprint_of, read_yaml, tokenizer_of
from lkda.formats import load, recorded_config
from lkda.formats.common.building import build_with_weights
from lkda.formats.common.reading import without_config
from lkda.models.lm import LanguageModel
from lkda.old_names import current_model_config, translated
from lkda.training.checkpoint import read_checkpoint
from lkda.training.sharded_checkpoint import is_sharded

_WHAT_CKPT_TAKES = "Give the directory of a run, a file in its checkpoints/, or an exported directory (lkda or hf)."


@dataclass(frozen=True)
class TrainedModel:
    """A model, its tokenizer (if it was trained on text) and the metadata of its run (if they are known).

    Attributes:
        model: on the CPU, in eval mode.
        vocabulary: the tokenizer that the model was trained with. None if its tokens are not text.
        run: plain values that describe the run (mixer, data, bytes_per_token, ...); {} for an exported directory.
        path: the file or directory that was read.
        step: the optimizer step of the checkpoint; None for an exported directory.
        fingerprint: of the data that the model was trained on; {} if it is not known.
    """

    model: LanguageModel
    vocabulary: Tokenizer | None
    path: Path
    run: dict[str, Any] = field(default_factory=dict)
    step: int | None = None
    fingerprint: dict[str, str | None] = field(default_factory=dict)

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises InputError if the model's tokens are not text."""
        if self.vocabulary is None:
            raise InputError(
                f"this needs a model of text, but {self.path} was trained on {self.run['data']}, whose tokens are not "
                "text: give another ckpt."
            )
        return self.vocabulary


def load_trained(path: str | Path, *, backend: str = "auto") -> TrainedModel:
    """Read a checkpoint file, a run directory (its last checkpoint) or an exported directory.

    Args:
        path: the file or directory.
        backend: of the operators, as in configs/train.yaml.
    Raises: InputError if there is no such file or directory, or if it is truncated, of another kind, or holds the
        weights of another model.
    """
    if not isinstance(path, str | Path) or not str(path):
        raise InputError(f"ckpt must be a path (quote it if it is a number), got {path!r}.")
    path = Path(path)
    if path.is_dir() and (path / "config.json").exists():
        model, tokenizer = load(path, backend=backend)
        return TrainedModel(model, tokenizer, path)
    if path.is_dir() and not is_sharded(path):
        path = _last_of_run(path)
    checkpoint = read_checkpoint(path, advice=_instead_of(path))
    with refusing_damage(path):
        ours = checkpoint["lkda"]
        prefix = "model."
        weights = {
            name.removeprefix(prefix): tensor
            for name, tensor in checkpoint["state_dict"].items()
            if name.startswith(prefix)
        }
        model = build_with_weights(current_model_config(ours["model"]), weights, source=path, backend=backend)
        vocabulary = None if ours["tokenizer"] is None else tokenizer_of(ours["tokenizer"], source=path)
        return TrainedModel(model, vocabulary, path, ours["run"], ours["step"], fingerprint_of(checkpoint))


def _instead_of(path: Path) -> str:
    """What to give instead of `path` if it cannot be read as a checkpoint, as a sentence. Of a run, it is another
    checkpoint: last.ckpt and best.ckpt may be the same file as one of the steps."""
    if not path.exists() or path.suffix != ".ckpt" or path.parent.name != "checkpoints":
        return _WHAT_CKPT_TAKES
    others = sorted(other for other in path.parent.glob("*.ckpt") if other.exists() and not other.samefile(path))
    if others:
        return f"If it is damaged, give another checkpoint of the run: {override('ckpt', str(others[-1]))}"
    return f"If it is damaged, train the run again: there is no other checkpoint in {path.parent}."


def _last_of_run(directory: Path) -> Path:
    """Raises ValueError, naming the other checkpoints, where none of them is the last."""
    last = directory / "checkpoints" / "last.ckpt"
    others = sorted(path.name for path in last.parent.glob("*.ckpt"))
    if last.exists():
        return last
    if others:
        raise InputError(
            f"there is no checkpoint at {last}; beside it there is {', '.join(others)}: give one as ckpt=."
        )
    if any(directory.glob("*.gguf")):
        raise InputError(without_config(directory))
    raise InputError(
        f"there is no checkpoint at {last}, and {directory} is no exported directory that lkda reads: it has no "
        f"config.json. {_WHAT_CKPT_TAKES}"
    )


def config_of_run(trained: TrainedModel) -> dict[str, Any]:
    """The configuration of the run that a model comes from; {} if it is not known.

    For a checkpoint it is read from the config.yaml of its run directory, for an exported directory from the model
    card.

    Raises: InputError if the recorded configuration cannot be read.
    """
    if trained.step is None:
        return translated(recorded_config(trained.path))
    path = trained.path.parent.parent / "config.yaml"
    found = read_yaml(path) if path.is_file() else {}
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no settings.")
    return translated({str(name): value for name, value in found.items()})
