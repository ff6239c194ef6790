"""An embedding that is normalised or scaled is folded into the table of formats that only look it up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lkda
from lkda.formats.common.embedding import folded
from tests.formats.models import HYBRID, logits, model, tokenizer, tokens

OUTER = {
    "norm": {"embed_norm": True},
    "scale": {"embed_scale": 22.63},
    "both": {"embed_norm": True, "embed_scale": 3.0},
}
QK_NORM = {"softmax": {"qk_norm": True}}


@pytest.mark.parametrize("outer", OUTER.values(), ids=OUTER)
@pytest.mark.parametrize("pattern", [("kda", "kda"), ("mla",), ("softmax",), ("simplified",)], ids="_".join)
def test_folding_changes_no_bit(pattern: tuple[str, ...], outer: dict[str, object]) -> None:
    ours = model(pattern, scale=3, outer=outer)
    plain = folded(ours)
    assert torch.equal(logits(plain, tokens()), logits(ours, tokens()))
    assert plain.config["embed_norm"] is False
    assert plain.config["embed_scale"] == 1.0
    assert plain.lm_head.weight is not plain.embed_tokens.weight
    assert torch.equal(plain.lm_head.weight, ours.lm_head.weight)


def test_a_plain_embedding_is_left_alone() -> None:
    ours = model(("kda",))
    assert folded(ours) is ours


@pytest.mark.parametrize("pattern", [("kda", "kda"), ("softmax", "softmax"), HYBRID], ids="_".join)
def test_transformers_computes_the_same(pattern: tuple[str, ...], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.17")
    ours = model(pattern, scale=3, outer=OUTER["norm"], **QK_NORM)
    lkda.export(ours, tokenizer(), tmp_path / "out", format="hf")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if "softmax" in pattern else "KimiLinearForCausalLM")
    with torch.inference_mode():
        assert (theirs(tokens()).logits[0] - logits(ours, tokens())).abs().max() < 1e-4
    assert json.loads((tmp_path / "out/config.json").read_text())["lkda_folded_embedding"] is True
    back, _ = lkda.load(tmp_path / "out")
    assert torch.equal(logits(back, tokens()), logits(ours, tokens()))
    assert back.config["embed_norm"] is False
    assert back.config["tie_embeddings"] is False


def test_lkda_keeps_the_norm(tmp_path: Path) -> None:
    ours = model(("kda",), scale=3, outer=OUTER["both"])
    lkda.export(ours, tokenizer(), tmp_path / "out", format="lkda")
    back, _ = lkda.load(tmp_path / "out")
    assert back.config["embed_norm"] is True
    assert back.lm_head.weight is back.embed_tokens.weight
    assert torch.equal(logits(back, tokens()), logits(ours, tokens()))


def test_fla_and_gguf_hold_the_folded_table(tmp_path: Path) -> None:
    gguf, safetensors = pytest.importorskip("gguf"), pytest.importorskip("safetensors.torch")
    ours = model(("kda",), scale=3, outer=OUTER["norm"])
    with torch.inference_mode():
        table = ours.embed(torch.arange(ours.config["vocab_size"]))
    lkda.export(ours, tokenizer(), tmp_path / "fla", format="fla")
    weights = safetensors.load_file(tmp_path / "fla/model.safetensors")
    assert torch.equal(weights["model.embeddings.weight"], table)
    lkda.export(ours, tokenizer(), tmp_path / "gguf", format="gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "gguf/model-f32.gguf").tensors}
    assert torch.equal(torch.tensor(tensors["token_embd.weight"].data), table)
    assert torch.equal(torch.tensor(tensors["output.weight"].data), ours.lm_head.weight)


def test_a_qk_norm_is_qwen3_to_llama_cpp(tmp_path: Path) -> None:
    """Its rotation pairs channels half a head apart, as ours: q and k keep the order of their rows."""
    gguf = pytest.importorskip("gguf")
    ours = model(("softmax",), scale=3, **QK_NORM)
    lkda.export(ours, tokenizer(), tmp_path / "out", format="gguf")
    found = gguf.GGUFReader(tmp_path / "out/model-f32.gguf")
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in found.tensors}
    assert found.get_field("general.architecture").contents() == "qwen3"
    assert found.get_field("qwen3.attention.key_length").contents() == 16
    mixer = ours.state_dict()
    assert torch.equal(tensors["blk.0.attn_q.weight"], mixer["blocks.0.mixer.q_proj.weight"])
    assert torch.equal(tensors["blk.0.attn_k_norm.weight"], mixer["blocks.0.mixer.k_norm.weight"])
