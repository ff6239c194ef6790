"""Directories from anywhere: one clear message, and nothing in them is run."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

import lkda
from tests.formats.models import HYBRID, model, tokenizer


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def lay_trap(directory: Path) -> None:
    """A pickle of weights, and Python that config.json asks to be imported."""
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(directory / "ran")))
    (directory / "modeling_trap.py").write_text(f"open({str(directory / 'ran')!r}, 'w')")
    config = json.loads((directory / "config.json").read_text())
    named = {"auto_map": {"AutoModelForCausalLM": "modeling_trap.Trap"}}
    (directory / "config.json").write_text(json.dumps({**config, **named}))


@pytest.fixture(params=["lkda", "hf"])
def exported(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    lkda.export(model(HYBRID), tokenizer(), tmp_path / "out", format=request.param)
    return tmp_path / "out"


def test_a_trap_beside_the_weights_is_not_sprung(exported: Path) -> None:
    lay_trap(exported)
    lkda.load(exported)
    assert not (exported / "ran").exists()


def test_a_pickle_is_refused_unread(exported: Path) -> None:
    lay_trap(exported)
    (exported / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"as a pickle \(pytorch_model.bin\), which runs code when it is read"):
        lkda.load(exported)
    assert not (exported / "ran").exists()


def test_a_pickle_under_the_name_of_safetensors(exported: Path) -> None:
    (exported / "model.safetensors").write_bytes(pickle.dumps(Trap(exported / "ran")))
    with pytest.raises(ValueError, match=r"truncated or no safetensors file"):
        lkda.load(exported)
    assert not (exported / "ran").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "config.json").unlink(), r"has no config.json"),
        (lambda d: (d / "model.safetensors").unlink(), r"has no model.safetensors"),
        (lambda d: (d / "tokenizer.json").unlink(), r"has no tokenizer.json"),
        (lambda d: (d / "config.json").write_text("[1]"), r"holds a list, expected an object"),
        (lambda d: (d / "config.json").write_bytes(b"\xff\xfe"), r"config.json is not JSON"),
        (lambda d: (d / "tokenizer.json").write_text("{}"), r"is not a tokenizer"),
        (lambda d: truncate(d / "model.safetensors"), r"truncated or no safetensors file"),
        (lambda d: drop_a_tensor(d / "model.safetensors"), r"is missing, expected \(48, 32\)"),
    ],
)
def test_a_spoilt_directory(spoil: Callable[[Path], object], message: str, exported: Path) -> None:
    spoil(exported)
    with pytest.raises(ValueError, match=message):
        lkda.load(exported)


def test_a_pattern_of_a_million_names(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    if config["model_type"] != "lkda":
        pytest.skip("only lkda's own config.json holds a pattern")
    config["model"]["mixer"]["pattern"] = ["kda"] * 10**6
    (exported / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"mixer.pattern holds 1,000,000 names, expected at most 16,384"):
        lkda.load(exported)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def drop_a_tensor(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(path)
    name = next(name for name in weights if name.endswith("2.mlp.up_proj.weight"))
    save_file({key: tensor for key, tensor in weights.items() if key != name}, path)


@pytest.mark.parametrize("named", ["../other.safetensors", "absent.safetensors"])
def test_shards_outside_or_absent(named: str, exported: Path, tmp_path: Path) -> None:
    (exported / "model.safetensors").rename(tmp_path / "other.safetensors")
    (exported / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": named}}))
    with pytest.raises(ValueError, match=r"is incomplete: .* which is not there"):
        lkda.load(exported)


@pytest.mark.parametrize("word", ["kda", "gpt2", None])
def test_an_unknown_model_type(word: str | None, exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps({**config, "model_type": word}))
    with pytest.raises(ValueError, match=rf"says model_type {word!r}; lkda reads kimi_linear, llama, qwen3, lkda"):
        lkda.load(exported)
