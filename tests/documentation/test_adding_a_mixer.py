"""The mixer of docs/guides/adding_a_mixer.md keeps the contract and trains, with the two files as they are printed."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

import lkda
from lkda.bench import decode
from lkda.bench.decode import decode_row
from lkda.commands.train import train
from lkda.models import mixers
from lkda.models.decoder import Sampling
from tests.documentation.commands import ROOT
from tests.generation.test_generate import byte_tokenizer, model_of
from tests.models import test_mixers as contract

PAGE = ROOT / "docs" / "guides" / "adding_a_mixer.md"
NAME = "running_mean"


def block(language: str) -> str:
    """The first block of a language in the page."""
    found = re.search(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The class among the mixers, and a copy of configs/ with its file."""
    (tmp_path / "mixers").mkdir()
    (tmp_path / "mixers" / f"{NAME}.py").write_text(block("python"), encoding="utf-8")
    monkeypatch.setattr(mixers, "__path__", [*mixers.__path__, str(tmp_path / "mixers")])
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "configs" / "mixer" / f"{NAME}.yaml").write_text(block("yaml"), encoding="utf-8")
    yield tmp_path
    sys.modules.pop(f"{mixers.__name__}.{NAME}", None)


def test_it_keeps_the_contract(added: Path) -> None:
    checks = [name for name in vars(contract.TestEveryMixer) if name.startswith("test_")]
    assert len(checks) > 4
    for name in checks:
        getattr(contract.TestEveryMixer(), name)([NAME])


def test_it_generates(added: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In batches of any size, in a session that is saved, and as the benchmark of decoding runs it."""
    model, tokenizer = model_of([NAME]), byte_tokenizer()
    options = {"max_new_tokens": 20, "temperature": 0, "ignore_eos": True}
    found = lkda.generate(model, tokenizer, ["ab", "cde"], **options)
    assert lkda.generate(model, tokenizer, ["ab", "cde"], batch_size=2, **options) == found
    session = lkda.Session(model, tokenizer)
    session.read("ab")
    session.save(added / "session")
    options = {"max_new_tokens": 5, "seed": 1}
    again = lkda.Session.load(added / "session", model, tokenizer).generate(**options)
    assert session.generate(**options) == again
    monkeypatch.setattr(decode, "SECONDS", 0.01)
    monkeypatch.setattr(decode, "copy_gb_per_s", lambda device: 10.0)
    assert decode_row(model.bfloat16(), 2, 256, Sampling(0.0))["tokens_per_s"] > 0


@pytest.mark.slow
def test_it_trains(added: Path, corpus: Path) -> None:
    overrides = [f"mixer={NAME}", "debug=fast", "data=files", f"data.paths=[{corpus}]", "trainer=cpu"]
    with initialize_config_dir(str(added / "configs"), version_base="1.3"):
        config = compose("train", overrides=overrides)
    assert f"python scripts/train.py mixer={NAME} debug=fast" in PAGE.read_text(encoding="utf-8")
    train(config, run_dir=added / "run")
    assert (added / "run" / "checkpoints" / "last.ckpt").exists()
