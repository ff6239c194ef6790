"""An exported directory that is not what it should be is refused with one message."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models

import lkda
from lkda.formats import names
from lkda.models.build import build_model

MIXER = {"pattern": ["kda"], "num_heads": 2}
CONFIG = {"vocab_size": 16, "d_model": 8, "num_layers": 2, "mlp_hidden": 12}


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    model = build_model({**CONFIG, "mixer": MIXER})
    lkda.export(model, Tokenizer(models.BPE()), tmp_path / "model")
    return tmp_path / "model"


def change_config(directory: Path, **change: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_round_trip(tie_embeddings: bool, tmp_path: Path) -> None:
    made = {**CONFIG, "tie_embeddings": tie_embeddings, "mixer": {"pattern": ["kda", "softmax"], "num_heads": 2}}
    model = build_model(made).eval()
    lkda.export(model, Tokenizer(models.BPE()), tmp_path / "model")
    loaded, _ = lkda.load(tmp_path / "model", backend="auto")
    tokens = torch.arange(12).view(1, 12)
    assert torch.equal(loaded(tokens), model(tokens))
    assert loaded.config == model.config
    assert (loaded.lm_head.weight is loaded.embed_tokens.weight) == tie_embeddings


@pytest.mark.parametrize("name", ["kda", "simplified"])
def test_without_convolutions_the_silu_is_kept(name: str, tmp_path: Path) -> None:
    # A directory of an earlier version that does not name the activation has none.
    model = build_model({**CONFIG, "mixer": {"pattern": [name], "num_heads": 2, name: {"conv_width": 0}}}).eval()
    lkda.export(model, Tokenizer(models.BPE()), tmp_path / "model")
    loaded, _ = lkda.load(tmp_path / "model")
    tokens = torch.arange(12).view(1, 12)
    assert torch.equal(loaded(tokens), model(tokens))
    assert loaded.config["mixer"][name]["activation"] == "silu"


def test_rotary_positions_of_mla_are_kept(tmp_path: Path) -> None:
    """And a directory of an earlier version, which does not name them, has none."""
    tokens, mixer = torch.arange(12).view(1, 12), {"pattern": ["mla"], "num_heads": 2}
    for base in (100.0, None):
        model = build_model({**CONFIG, "mixer": mixer | {"mla": {} if base is None else {"rope_base": base}}}).eval()
        lkda.export(model, Tokenizer(models.BPE()), tmp_path / str(base))
        loaded, _ = lkda.load(tmp_path / str(base))
        assert torch.equal(loaded(tokens), model(tokens))
        assert loaded.config["mixer"]["mla"]["rope_base"] == base


def test_the_config_is_plain_and_without_a_backend(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    assert config["model_type"] == "lkda"
    assert config["model"]["d_model"] == 8
    assert "backend" not in config["model"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "config.json").unlink(), r"is no exported model: it has no config.json"),
        (lambda d: (d / "tokenizer.json").unlink(), r"is no exported model: it has no tokenizer.json"),
        (lambda d: (d / "config.json").write_text("{"), r"config.json is not JSON"),
        (
            lambda d: change_config(d, model_type="gpt2"),
            r"says model_type 'gpt2'; lkda reads kimi_linear, llama, qwen3, lkda",
        ),
        (lambda d: change_config(d, format=2), r"does not say format 1"),
        (
            lambda d: change_config(d, model={**CONFIG, "num_layers": 10**9, "mixer": MIXER}),
            r"of 2 layers, .* 1000000000",
        ),
        (lambda d: (d / "model.safetensors").write_bytes(b"\x00" * 40), r"truncated or no safetensors file"),
        (
            lambda d: change_config(d, model={**CONFIG, "d_model": 4, "tie_embeddings": True, "mixer": MIXER}),
            r"another",
        ),
        (lambda d: change_config(d, model={"d_model": 8}), r"missing here: vocab_size, num_layers, mixer"),
        (lambda d: (d / "tokenizer.json").write_text("{}"), r"tokenizer.json is not a tokenizer"),
    ],
)
def test_a_spoilt_directory_is_refused(spoil: Callable[[Path], object], message: str, exported: Path) -> None:
    spoil(exported)
    with pytest.raises(ValueError, match=message):
        lkda.load(exported)


def test_formats_are_found_by_name(tmp_path: Path) -> None:
    assert "lkda" in names()
    model = build_model({**CONFIG, "mixer": MIXER})
    with pytest.raises(ValueError, match=r"format must be one of .*lkda.*, got 'zip'"):
        lkda.export(model, Tokenizer(models.BPE()), tmp_path / "x", format="zip")
    assert not (tmp_path / "x").exists()


def test_an_empty_directory_that_a_link_points_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    lkda.export(build_model({**CONFIG, "mixer": MIXER}), Tokenizer(models.BPE()), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "model.safetensors").exists()
