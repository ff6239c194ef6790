"""Rotary positions and the norm of keys of multi-head latent attention, against attention that is written out head by
head."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from lkda.checks import InputError
from lkda.models.mixers import mla
from lkda.models.mixers.mla import MultiHeadLatentAttention

BASE = 100.0
NORM = {"qk_norm": True}
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


def of_unit_rms(mixer: MultiHeadLatentAttention, x: Tensor) -> Tensor:
    """x [11] divided by its rms, if the mixer has norms of q and k."""
    return x / (x.square().mean() + mixer.norm_eps).sqrt() if mixer.q_norm is not None else x


def weight_of(norm: torch.nn.RMSNorm | None) -> Tensor | float:
    return 1.0 if norm is None or norm.weight is None else norm.weight


def written_out(mixer: MultiHeadLatentAttention, x: Tensor) -> Tensor:
    """The layer for one sequence x [T, d_model]: every head and every token by itself."""
    turn = turned if mixer.rope_base is not None else lambda channels, position: channels
    latent, shared = mixer.kv_a_proj_with_mqa(x).split([7, 6], -1)
    latent = rms_norm(latent, (7,), mixer.kv_a_layernorm.weight, mixer.norm_eps)
    queries, keys_and_values = mixer.q_proj(x).unflatten(-1, (3, 11)), mixer.kv_b_proj(latent).unflatten(-1, (3, 14))
    outputs = []
    for t in range(len(x)):
        heads = []
        for h in range(3):
            q = of_unit_rms(mixer, queries[t, h]) * weight_of(mixer.q_norm)
            q = torch.cat([q[:5], turn(q[5:], t)])
            k = [torch.cat([keys_and_values[s, h, :5], turn(shared[s], s)]) for s in range(t + 1)]
            k = [of_unit_rms(mixer, key) * weight_of(mixer.k_norm) for key in k]
            weights = (torch.stack(k) @ q / 11**0.5).softmax(0)
            heads.append(weights @ keys_and_values[: t + 1, h, 5:])
        outputs.append(mixer.o_proj(torch.cat(heads)))
    return torch.stack(outputs)


def with_gradients(y: Tensor, mixer: MultiHeadLatentAttention, x: Tensor) -> list[Tensor]:
    return [y, *torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()])]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, NORM, {"rope_base": None}, {"rope_base": None, **NORM}], ids=str)
def test_the_layer_is_the_one_written_out(options: dict[str, Any]) -> None:
    mixer, x = mixer_and_input(**options)
    want = torch.stack([written_out(mixer, row) for row in x])
    for other in ({"rope_base": None if mixer.rope_base else BASE}, {"qk_norm": mixer.q_norm is None}):
        assert not torch.allclose(mixer_and_input(**options | other)[0](x)[0], want, atol=1e-2)
    assert_same(with_gradients(mixer(x)[0], mixer, x), with_gradients(want, mixer, x))


def test_which_norms_have_weights() -> None:
    """Without positions, q and k, as models of before have them."""
    for options, want in (
        ({}, set()),
        (NORM, {"q_norm.weight"}),
        ({"rope_base": None, **NORM}, {"q_norm.weight", "k_norm.weight"}),
    ):
        weights = mixer_and_input(**options)[0].state_dict()
        assert {name for name in weights if name.startswith(("q_norm", "k_norm"))} == want


@pytest.mark.parametrize("options", [{}, NORM], ids=str)
def test_packed_sequences_begin_at_position_0(options: dict[str, Any]) -> None:
    mixer, x = mixer_and_input(**options)
    row, bounds = x.flatten(0, 1), [0, 3, 3, 15, 22]
    want = torch.cat([written_out(mixer, row[a:b]) for a, b in zip(bounds, bounds[1:]) if a < b])
    y, _ = mixer(row.unsqueeze(0), cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    assert_same(with_gradients(y[0], mixer, x), with_gradients(want, mixer, x))


@pytest.mark.parametrize("options", [{}, {"conv_width": 3}, NORM], ids=str)
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


@pytest.mark.parametrize("base", [BASE, None])
def test_a_cache_holds_the_inverse_length_of_each_key(base: float | None) -> None:
    mixer, x = mixer_and_input(**NORM, rope_base=base)
    _, (latent, shared, inverse, *_) = mixer(x)
    k = mixer.kv_b_proj(latent).unflatten(-1, (3, 14))[..., :5]
    squares = k.square().sum(-1) + shared.square().sum(-1, keepdim=True)
    torch.testing.assert_close(inverse, (squares + 11 * mixer.norm_eps) ** -0.5, rtol=1e-12, atol=1e-12)


def test_the_lengths_are_cached_in_float32() -> None:
    """Also beside caches in bfloat16, as `state_bytes` counts them."""
    mixer, _ = mixer_and_input(**NORM)
    state = mixer.bfloat16().init_state(2, max_tokens=10)
    assert [part.dtype for part in state] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.int64]
    assert [list(part.shape) for part in state] == [[2, 10, 7], [2, 10, 6], [2, 10, 3], [2, 1]]
    assert mixer.state_bytes(10) == 10 * (2 * (7 + 6) + 4 * 3)
    assert [part.shape[1] for part in mixer.cut_state(state, 4)] == [4, 4, 4, 1]
    assert mixer.double().init_state(1)[2].dtype == torch.float64


def test_a_state_of_a_model_without_the_norm_is_refused() -> None:
    with_norm, x = mixer_and_input(**NORM)
    without, _ = mixer_and_input()
    for mixer, other in ((with_norm, without), (without, with_norm)):
        for state in (other.init_state(2), other.init_state(2, max_tokens=20)):
            with pytest.raises(InputError, match=r"a state of 2 sequences of this mixer has caches of .* per token"):
                mixer(x, state=state)
            with pytest.raises(InputError, match="give the state of this model for this batch"):
                mixer.step(x[:, 0], state)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"conv_width": 3}], ids=str)
@pytest.mark.parametrize("base", [BASE, None])
def test_a_step_computes_the_keys_of_its_token_alone(
    base: float | None, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    mixer, x = mixer_and_input(**NORM, rope_base=base, **options)
    want, state = mixer(x)[0], mixer.init_state(2, max_tokens=20)
    projected: list[int] = []
    prompt, state = mixer(x[:, :6], state=state)
    torch.testing.assert_close(prompt, want[:, :6], rtol=1e-10, atol=1e-10)
    compute = mixer._keys_and_values
    monkeypatch.setattr(mixer, "_keys_and_values", lambda c, r: projected.append(c.shape[1]) or compute(c, r))
    for t in range(6, 11):
        y, state = mixer.step(x[:, t], state)
        torch.testing.assert_close(y, want[:, t], rtol=1e-10, atol=1e-10)
    assert projected == [1] * 5


@torch.no_grad()
@pytest.mark.parametrize("base", [BASE, None])
def test_attention_in_bfloat16_is_about_as_exact_as_with_computed_keys(base: float | None) -> None:
    """Against float64, with sharp attention. With inverse lengths or scores rounded to bfloat16 it would not be."""
    torch.manual_seed(0)
    mixer = MultiHeadLatentAttention(128, 4, rope_base=base, **NORM)
    for weight in mixer.parameters():
        weight.normal_(0, weight.shape[1] ** -0.5) if weight.dim() == 2 else weight.normal_(1, 0.2)
    mixer = mixer.bfloat16()
    q, latent, shared = 6 * torch.randn(256, 4, 48), torch.randn(256, 100, 64), torch.randn(256, 100, 16)
    rounded = [tensor.bfloat16() for tensor in (q, latent, shared)]
    computing = copy.deepcopy(mixer)  # a norm that is another module is called with all keys
    computing.k_norm = torch.nn.Sequential(computing.k_norm)
    q, latent, shared = (tensor.double() for tensor in rounded)
    want = copy.deepcopy(computing).double()._attend_one(q, (latent, shared), None)
    q, latent, shared = rounded
    caches = mixer.stored(latent, shared)
    errors = [(each._attend_one(q, caches, None) - want).norm() for each in (mixer, computing)]
    assert errors[0] < 1.2 * errors[1]


@pytest.mark.parametrize("options", [{}, NORM], ids=str)
@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 4, 22])], ids=["rows", "packed"])
def test_the_operator_of_a_gpu_computes_the_same(
    cu_seqlens: Tensor | None, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    mixer, x = mixer_and_input(**options)
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
@pytest.mark.parametrize("options", [{}, NORM], ids=str)
def test_the_tracer_takes_it_whole(options: dict[str, Any]) -> None:
    """torch.compile(fullgraph=True), forward and backward."""
    mixer, x = mixer_and_input(**options)
    compiled = torch.compile(lambda given: mixer(given)[0], fullgraph=True, dynamic=False, backend="aot_eager")
    assert_same(with_gradients(compiled(x), mixer, x), with_gradients(mixer(x)[0], mixer, x))


@pytest.mark.parametrize("base", [None, 100.0])
def test_training_and_a_prefill_project_the_latent_once(base: float | None) -> None:
    """The keys are attended to, and their norms are stored for decoding."""
    mixer = MultiHeadLatentAttention(32, 4, rope_base=base, **NORM)
    calls: list[Tensor] = []
    mixer.kv_b_proj.register_forward_hook(lambda module, inputs, output: calls.append(output))
    x, cu_seqlens = torch.randn(1, 10, 32), torch.tensor([0, 4, 10])
    _, (*_, inverse, _) = mixer(x)
    assert len(calls) == 1
    state = mixer.init_state(2, max_tokens=10)
    with torch.no_grad():
        mixer.forward_packed(x, state, cu_seqlens=cu_seqlens)
    assert len(calls) == 2
    torch.testing.assert_close(state[2][1, :6], inverse[0, 4:])
