"""An independent implementation: transformers' Kimi Linear, with our weights, gives our numbers."""

from __future__ import annotations

import pytest
import torch

from tests.models.helpers import small, tokens

transformers = pytest.importorskip("transformers", minversion="5.17")

D_MODEL, HEADS, VOCAB, LAYERS = 32, 2, 50, 4


def kimi(pattern: list[str]):
    """Their model for `pattern`, dense, in float32."""
    head = D_MODEL // HEADS
    config = transformers.KimiLinearConfig(
        vocab_size=VOCAB,
        hidden_size=D_MODEL,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        kv_lora_rank=D_MODEL // 2,
        qk_nope_head_dim=head,
        qk_rope_head_dim=head // 2,
        v_head_dim=head,
        layer_types=["linear_attention" if name == "kda" else "full_attention" for name in pattern],
        mlp_layer_types=["dense"] * LAYERS,
        linear_head_dim=head,
        linear_num_heads=HEADS,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.KimiLinearForCausalLM(config).float().eval()


def their_name(name: str) -> str:
    for ours, theirs in (
        ("blocks.", "layers."),
        ("mixer_norm", "input_layernorm"),
        ("mlp_norm", "post_attention_layernorm"),
        (".mixer.", ".self_attn."),
    ):
        name = name.replace(ours, theirs)
    return name if name.startswith("lm_head") else f"model.{name}"


def with_our_weights(ours, theirs):
    """Copies every weight of ours into theirs; each of theirs must have been written once."""
    weights = {their_name(name): x for name, x in ours.state_dict().items()}
    target = theirs.state_dict()
    convolution = "conv1d.weight"
    for name, x in target.items():
        if name.endswith("." + convolution):
            layer = name.removesuffix(convolution).replace(".linear_attn.", ".self_attn.")
            x.copy_(torch.cat([weights.pop(f"{layer}{part}_{convolution}") for part in "qkv"]))
        else:
            ours_name = name.replace(".linear_attn.", ".self_attn.").replace(".forget_gate.", ".")
            x.copy_(weights.pop(ours_name))
    assert not weights
    return theirs


@pytest.mark.parametrize("scale", [5, 1], ids=["large_weights", "fresh"])
@pytest.mark.parametrize(
    "pattern", [["kda"] * 4, ["mla"] * 4, ["kda", "kda", "kda", "mla"]], ids=["kda", "mla", "hybrid"]
)
def test_logits_equal_theirs(pattern, scale):
    """At fresh weights the norms' eps shows; at large ones everything else does."""
    ours = small(pattern, num_layers=LAYERS, tie_embeddings=False, scale=scale)
    theirs = with_our_weights(ours, kimi(pattern))
    x = tokens(2, 100)
    with torch.no_grad():
        got, want = ours(x), theirs(x, use_cache=False).logits
    assert want.std() > 0.02 * scale
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5 * want.std().item())


@pytest.mark.parametrize("name", ["kda", "mla"])
def test_the_layer_equals_theirs(name):
    pattern = [name] * LAYERS
    ours = small(pattern, num_layers=LAYERS, tie_embeddings=False)
    theirs = with_our_weights(ours, kimi(pattern))
    layer = theirs.model.layers[0]
    attention = layer.linear_attn if hasattr(layer, "linear_attn") else layer.self_attn
    x = torch.randn(2, 70, D_MODEL, generator=torch.Generator().manual_seed(0))
    causal = torch.full((70, 70), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        want = attention(x, attention_mask=causal if name == "mla" else None)
        want = want[0] if isinstance(want, tuple) else want
        got, _ = ours.mixers()[0](x)
    assert want.std() > 1e-2
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)
