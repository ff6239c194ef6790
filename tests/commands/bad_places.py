"""A run, and files that are not what a command expects."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from lkda.commands.train import train
from tests.commands.small import composed, small_run


@dataclass(frozen=True)
class Places:
    tmp: Path
    run: Path


@pytest.fixture(scope="session")
def places(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Places:
    """A run, and next to it every kind of file that is not what it should be."""
    tmp = tmp_path_factory.mktemp("places")
    run = tmp_path_factory.mktemp("runs") / "run"
    train(composed("train", *small_run(corpus)), run)
    (tmp / "empty.txt").write_text("")
    (tmp / "blank.txt").write_text(" \n\n")
    (tmp / "short.txt").write_text("a few words")
    (tmp / "latin1.txt").write_bytes("déjà vu, and more".encode("latin-1"))
    (tmp / "mixed.jsonl").write_text('{"text": "a b c"}\n{"text": 6}\n')
    Tokenizer(WordLevel({"a": 0})).save(str(tmp / "one_word.json"))
    (tmp / "folder").mkdir()
    (tmp / "gguf").mkdir()
    (tmp / "gguf" / "model-float32.gguf").write_bytes(b"GGUF")
    (tmp / "loop.txt").symlink_to("loop.txt")
    (tmp / "set").mkdir()
    (tmp / "set" / "train.jsonl").write_text('{"text": "a document of a few words"}\n' * 40)
    (tmp / "foreign").mkdir()
    (tmp / "foreign" / "config.yaml").write_text("port: 8080\n")
    (tmp / "tokens").mkdir()
    (tmp / "tokens" / "tokenizer.json").write_bytes((run / "tokenizer.json").read_bytes())
    for name in ("train", "validation"):
        np.save(tmp / "tokens" / f"{name}.npy", np.arange(250, dtype=np.uint16))
    last = run / "checkpoints" / "last.ckpt"
    (tmp / "truncated.ckpt").write_bytes(last.read_bytes()[:5000])
    (tmp / "alone.ckpt").write_bytes(last.read_bytes())
    (tmp / "no_last" / "checkpoints").mkdir(parents=True)
    (tmp / "no_last" / "checkpoints" / "best.ckpt").write_bytes(last.read_bytes())
    torch.save({"model": torch.zeros(3)}, tmp / "foreign.ckpt")
    other = torch.load(last, weights_only=True)
    other["lkda"]["model"]["d_model"] = 64
    torch.save(other, tmp / "other.ckpt")
    return Places(tmp, run)
