"""The directory of flash-linear-attention: names and shapes of KDAForCausalLM. Its kernels run on a GPU alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lkda
from tests.formats.models import model, tokenizer


def exported(directory: Path, **options: object):
    ours = model(("kda", "kda"), kda=options)
    lkda.export(ours, tokenizer(), directory, format="fla")
    return (
        ours.state_dict(),
        load_file(directory / "model.safetensors"),
        json.loads((directory / "config.json").read_text()),
    )


def test_names_and_shapes(tmp_path: Path) -> None:
    ours, weights, config = exported(tmp_path / "out")
    layer = {name.removeprefix("model.layers.1."): tensor for name, tensor in weights.items() if ".layers.1." in name}
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.items()}
    assert shapes == {
        "attn_norm.weight": (32,),
        "mlp_norm.weight": (32,),
        **{f"attn.{x}_proj.weight": (32, 32) for x in "qkvo"},
        **{f"attn.{x}_conv1d.weight": (32, 1, 4) for x in "qkv"},
        "attn.f_proj.0.weight": (16, 32),
        "attn.f_proj.1.weight": (32, 16),
        "attn.g_proj.0.weight": (16, 32),
        "attn.g_proj.1.weight": (32, 16),
        "attn.g_proj.1.bias": (32,),
        "attn.b_proj.weight": (2, 32),
        "attn.A_log": (2,),
        "attn.dt_bias": (32,),
        "attn.o_norm.weight": (16,),
        "mlp.gate_proj.weight": (48, 32),
        "mlp.up_proj.weight": (48, 32),
        "mlp.down_proj.weight": (32, 48),
    }
    assert torch.equal(weights["model.embeddings.weight"], ours["embed_tokens.weight"])
    assert not weights["model.layers.0.attn.g_proj.1.bias"].any()
    assert (config["model_type"], config["safe_gate"], config["norm_eps"]) == ("kda", False, 1e-5)


def test_options_that_it_has(tmp_path: Path) -> None:
    _, _, config = exported(tmp_path / "a", gate_form="bounded", lower_bound=-4.0, negative_eigenvalues=True)
    assert (config["safe_gate"], config["lower_bound"], config["allow_neg_eigval"]) == (True, -4.0, True)
    ours, weights, _ = exported(tmp_path / "b", gate="head")
    written = weights["model.layers.0.attn.f_proj.1.weight"].view(2, 16, 16)
    for channel in range(16):
        assert torch.equal(written[:, channel], ours["blocks.0.mixer.f_b_proj.weight"])
    with pytest.raises(ValueError, match="KDA without a gate"):
        exported(tmp_path / "c", gate="none")
