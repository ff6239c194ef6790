"""Rotary positions of multi-head latent attention, against attention that is written out head by head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from lkda.models.mixers import mla
from lkda.models.mixers.mla import MultiHeadLatentAttention

BASE = 100.0
SIZES = {"kv_lora_rank": 7, "qk_nope_head_dim": 5, "qk_rope_head_dim": 6, "v_head_dim": 9}


def mixer_and_input(**options: Any) -> tuple[MultiHeadLatentAttention, Tensor]:
    torch.manual_seed(0)
    mixer = MultiHeadLatentAttention(24, 3, **({"rope_base": BASE} | SIZES | options)).double()
    with torch.no_grad():
        for weight in mixer.parameters():
            weight.mul_(3) if weight.dim() == 2 else weight.add_(0.3 * torch.randn_like(weight))
    return mixer, torch.randn(2, 11, 24, dtype=torch.float64, requires_grad=True)


def turned(x: Tensor, position: int) -> Tensor:
    """x [6], whose channels i and i + 3 are the parts of a complex number, times exp(i position / BASE^(i / 3))."""
    angles = position * BASE ** (-torch.arange(3, dtype=torch.float64) / 3)
    z = torch.complex(x[:3], x[3:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag])


def written_out(mixer: MultiHeadLatentAttention, x: Tensor) -> Tensor:
    """The layer for one sequence x [T, d_model]: every head and every token by itself."""
    latent, shared = mixer.kv_a_proj_with_mqa(x).split([7, 6], -1)
    latent = rms_norm(latent, (7,), mixer.kv_a_layernorm.weight, mixer.norm_eps)
    queries, keys_and_values = mixer.q_proj(x).unflatten(-1, (3, 11)), mixer.kv_b_proj(latent).unflatten(-1, (3, 14))
    outputs = []
    for t in range(len(x)):
        heads = []
        for h in range(3):
            q = torch.cat([queries[t, h, :5], turned(queries[t, h, 5:], t)])
            k = [torch.cat([keys_and_values[s, h, :5], turned(shared[s], s)]) for s in range(t + 1)]
            weights = (torch.stack(k) @ q / 11**0.5).softmax(0)
            heads.append(weights @ keys_and_values[: t + 1, h, 5:])
        outputs.append(mixer.o_proj(torch.cat(heads)))
    return torch.stack(outputs)


def with_gradients(y: Tensor, mixer: MultiHeadLatentAttention, x: Tensor) -> list[Tensor]:
    return [y, *torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()])]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_the_layer_is_the_one_written_out() -> None:
    mixer, x = mixer_and_input()
    want = torch.stack([written_out(mixer, row) for row in x])
    assert not torch.allclose(mixer_and_input(rope_base=None)[0](x)[0], want, atol=1e-2)
    assert_same(with_gradients(mixer(x)[0], mixer, x), with_gradients(want, mixer, x))


def test_packed_sequences_begin_at_position_0() -> None:
    mixer, x = mixer_and_input()
    row, bounds = x.flatten(0, 1), [0, 3, 3, 15, 22]
    want = torch.cat([written_out(mixer, row[a:b]) for a, b in zip(bounds, bounds[1:]) if a < b])
    y, _ = mixer(row.unsqueeze(0), cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    assert_same(with_gradients(y[0], mixer, x), with_gradients(want, mixer, x))


@pytest.mark.parametrize("options", [{}, {"conv_width": 3}], ids=str)
def test_only_distances_count(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions that all are 1,000 larger change nothing; positions twice as far apart do."""
    mixer, x = mixer_and_input(**options)
    want, _ = mixer(x)
    positions = MultiHeadLatentAttention.token_positions
    monkeypatch.setattr(mixer, "token_positions", lambda *given: 1000 + positions(mixer, *given))
    torch.testing.assert_close(mixer(x)[0], want, rtol=1e-9, atol=1e-9)
    monkeypatch.setattr(mixer, "token_positions", lambda *given: 2 * positions(mixer, *given))
    assert not torch.allclose(mixer(x)[0], want, atol=1e-2)


def test_a_cache_holds_rotated_channels() -> None:
    mixer, x = mixer_and_input()
    _, (_, shared, *_) = mixer(x)
    raw = mixer.kv_a_proj_with_mqa(x)[..., 7:]
    want = torch.stack([torch.stack([turned(token, t) for t, token in enumerate(row)]) for row in raw])
    torch.testing.assert_close(shared, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 4, 22])], ids=["rows", "packed"])
def test_the_operator_of_a_gpu_computes_the_same(cu_seqlens: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, x = mixer_and_input()
    given = x if cu_seqlens is None else x.flatten(0, 1).unsqueeze(0)
    want = with_gradients(mixer(given, cu_seqlens=cu_seqlens)[0], mixer, x)
    calls, operator = [], mla.rotary_heads

    def counted(q: Tensor, k: Tensor, position: Tensor, *, base: float) -> tuple[Tensor, Tensor]:
        calls.append((q.shape[2], k.shape[2]))
        return operator(q, k, position, base=base)

    monkeypatch.setattr(mla, "rotary_heads", counted)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    assert_same(with_gradients(mixer(given, cu_seqlens=cu_seqlens)[0], mixer, x), want)
    assert calls == [(3, 1)]


@pytest.mark.slow
def test_the_tracer_takes_it_whole() -> None:
    """torch.compile(fullgraph=True), forward and backward."""
    mixer, x = mixer_and_input()
    compiled = torch.compile(lambda given: mixer(given)[0], fullgraph=True, dynamic=False, backend="aot_eager")
    assert_same(with_gradients(compiled(x), mixer, x), with_gradients(mixer(x)[0], mixer, x))
