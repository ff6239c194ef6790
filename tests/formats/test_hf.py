"""transformers loads what we write and computes our logits; what it reads comes back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lkda
from lkda.formats.common.layers import options_of
from lkda.models.generate import generate
from tests.formats.models import HYBRID, TEXT, logits, model, tokenizer, tokens

transformers = pytest.importorskip("transformers", minversion="5.17")

PATTERNS = [("kda", "kda"), ("mla", "mla"), HYBRID, ("softmax", "softmax")]


def names(pattern: tuple[str, ...]) -> str:
    return "_".join(pattern)


def theirs(directory: Path, **options: object):
    """Their model, every weight of it read from the directory, and every one there read."""
    made, info = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **options)
    assert not any(info.values()), info
    return made


@pytest.mark.sample(3)
@pytest.mark.parametrize(("head_dim", "scale"), [(32, 1.0), (64, 3.0), (128, 3.0)])
@pytest.mark.parametrize("pattern", PATTERNS, ids=names)
def test_logits_of_500_tokens(pattern: tuple[str, ...], head_dim: int, scale: float, tmp_path: Path) -> None:
    ours = model(pattern, head_dim=head_dim, scale=scale)
    lkda.export(ours, tokenizer(), tmp_path / "out", format="hf")
    x, loaded = tokens(), theirs(tmp_path / "out")
    assert type(loaded).__name__ == ("LlamaForCausalLM" if "softmax" in pattern else "KimiLinearForCausalLM")
    assert loaded.dtype == torch.float32
    with torch.inference_mode():
        got = loaded(x).logits[0]
    want = logits(ours, x)
    assert want.std() > 0.1
    assert (got - want).abs().max() < 1e-4
    back, _ = lkda.load(tmp_path / "out")
    assert torch.equal(logits(back, x), want)


@pytest.mark.parametrize("pattern", PATTERNS, ids=names)
def test_generation_with_a_cache(pattern: tuple[str, ...], tmp_path: Path) -> None:
    ours = model(pattern, scale=3)
    lkda.export(ours, tokenizer(), tmp_path / "out", format="hf")
    x, loaded = tokens(20), theirs(tmp_path / "out")
    loaded.generation_config.eos_token_id = None
    got = loaded.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=40, do_sample=False, use_cache=True)
    assert got[0, 20:].tolist() == list(generate(ours, x, max_new_tokens=40, temperature=0))


def test_the_tokenizer_begins_a_document(tmp_path: Path) -> None:
    own = tokenizer()
    lkda.export(model(HYBRID), own, tmp_path / "out", format="hf")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded(TEXT).input_ids == [0, *own.encode(TEXT).ids]
    assert loaded.decode(own.encode(TEXT).ids) == TEXT
    endless = "x" * 1000 + " " * 1000 + "-" * 1000
    assert loaded(endless).input_ids == [0, *own.encode(endless).ids]
    assert (loaded.bos_token, loaded.eos_token) == ("<|endoftext|>", "<|endoftext|>")
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id == generation.bos_token_id == 0
    _, back = lkda.load(tmp_path / "out")
    assert back.encode(TEXT).ids == own.encode(TEXT).ids


@pytest.mark.parametrize("pattern", PATTERNS, ids=names)
def test_a_model_comes_back_as_it_went(pattern: tuple[str, ...], tmp_path: Path) -> None:
    """Without the layer that was added, and with the head tied to the embedding."""
    ours = model(pattern)
    lkda.export(ours, tokenizer(), tmp_path / "out", format="hf")
    back, _ = lkda.load(tmp_path / "out")
    assert back.num_parameters() == ours.num_parameters()
    assert back.lm_head.weight is back.embed_tokens.weight
    for name, weight in ours.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight), name
    assert {key: back.config[key] for key in ("num_layers", "d_model", "context", "norm_eps")} == {
        key: ours.config[key] for key in ("num_layers", "d_model", "context", "norm_eps")
    }
    assert back.config["mixer"]["name"] == "_".join(dict.fromkeys(pattern))


@pytest.mark.parametrize("pattern", [HYBRID, ("softmax",)], ids=names)
def test_bfloat16_weights(pattern: tuple[str, ...], tmp_path: Path) -> None:
    ours = model(pattern, scale=3)
    lkda.export(ours, tokenizer(), tmp_path / "out", format="hf", dtype="bfloat16")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    assert theirs(tmp_path / "out").dtype == torch.bfloat16
    back, _ = lkda.load(tmp_path / "out")
    for name, weight in ours.state_dict().items():
        exact = name.endswith(("A_log", "dt_bias"))
        torch.testing.assert_close(back.state_dict()[name], weight, rtol=0 if exact else 2**-8, atol=0)


def test_an_mla_model_with_another_eps_is_read_back(tmp_path: Path) -> None:
    # The layer of KDA that is added to such a model has an eps of its own, and is dropped again.
    ours = model(("mla", "mla"), scale=3, outer={"norm_eps": 1e-6})
    lkda.export(ours, tokenizer(), tmp_path / "out", format="hf")
    back, _ = lkda.load(tmp_path / "out")
    assert torch.equal(logits(back, tokens()), logits(ours, tokens()))


def test_another_eps_of_the_latents_norm_is_refused(tmp_path: Path) -> None:
    """transformers fixes it. llama.cpp takes it from the file."""
    ours = model(("mla", "kda"), mla={"norm_eps": 1e-3})
    with pytest.raises(
        ValueError, match=r"format hf cannot express MLA whose norm_eps is not 1e-06; gguf and lkda can"
    ):
        lkda.export(ours, tokenizer(), tmp_path / "out", format="hf")


def kimi_made_elsewhere(directory: Path, *, shards: bool = False, **changes: object) -> None:
    """A directory with other sizes than ours have by default, in the layout of Kimi Linear's own, bfloat16."""
    ours = model(HYBRID, mla={"kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10})
    lkda.export(ours, tokenizer(), directory, format="hf", dtype="bfloat16")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))
    if shards:
        from safetensors.torch import load_file, save_file

        weights = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        where = {name: files[i % 2] for i, name in enumerate(sorted(weights))}
        for file in files:
            save_file({name: weights[name] for name in where if where[name] == file}, directory / file)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


@pytest.mark.parametrize("shards", [False, True])
def test_a_kimi_linear_made_elsewhere(shards: bool, tmp_path: Path) -> None:
    kimi_made_elsewhere(tmp_path / "out", shards=shards)
    loaded, _ = lkda.load(tmp_path / "out")
    assert options_of(loaded.config, "mla")["rope_base"] is None
    with torch.inference_mode():
        want = theirs(tmp_path / "out", dtype=torch.float32)(tokens(100)).logits[0]
    assert (logits(loaded, tokens(100)) - want).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 8, "first_k_dense_replace": 1}, r"has mixture-of-experts layers \(8 experts\)"),
        ({"q_lora_rank": 16}, r"q_lora_rank is 16; a model of lkda has None here"),
        ({"mla_use_nope": False}, r"mla_use_nope is False"),
        ({"hidden_act": "gelu"}, r"hidden_act is 'gelu'"),
        ({"hidden_size": "32"}, r"hidden_size must be a whole number of 1 or more, got '32'"),
        ({"num_hidden_layers": 10**9}, r"must say for each of the 1000000000 layers"),
        ({"linear_attn_config": {}}, r"must say for each of the 4 layers what it is"),
        ({"num_attention_heads": 4}, r"linear_attn_config.num_heads is 2; a model of lkda has 4 here"),
        ({"kv_lora_rank": 24}, r"kv_a_layernorm.weight is \(20,\), expected \(24,\)"),
        ({"vocab_size": 10**12}, r"vocab_size must be at most 67108864, got 1000000000000"),
        ({"rms_norm_eps": 1e-6}, r"KDA here has rms_norm_eps 1e-05"),
    ],
)
def test_what_is_not_ours_is_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    kimi_made_elsewhere(tmp_path / "out", **changes)
    with pytest.raises(ValueError, match=message):
        lkda.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 1}, r"num_key_value_heads is 1; a model of lkda has 2 here"),
        ({"attention_bias": True}, r"attention_bias is True"),
        ({"rope_parameters": {"rope_type": "llama3"}}, r"rope_type is 'llama3'"),
    ],
)
def test_llama_variants_are_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    lkda.export(model(("softmax",)), tokenizer(), tmp_path / "out", format="hf")
    config = json.loads((tmp_path / "out/config.json").read_text())
    (tmp_path / "out/config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=message):
        lkda.load(tmp_path / "out")
