"""KDA's decoding step: the kernel on the CPU, and the form in PyTorch, against float64."""

from __future__ import annotations

import pytest
import torch

from lkda.ops import kda_attention_fused, kda_step_fused, short_convolutions
from lkda.ops.kda.cpu import step as cpu_step
from lkda.ops.kda.cuda import step as cuda_step
from lkda.ops.kda.state import pack_state, unpack_state
from lkda.ops.runtime import cpp
from tests.ops.cases import relative
from tests.ops.emulation import kernels_on_the_cpu  # noqa: F401
from tests.ops.kda.step_cases import STATES, copied, exact, moved, state_of, token

# Relative, of a state rounded once, by half a step at most: 2^-9 of a number in bf16, 1/254 of a row's largest in int8.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.int8: 8e-3}
OUTPUT = {torch.float32: 2e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}


def by_kernel(x, state, *, normalized=False, scale=None):
    """`kda_step_fused(backend="cuda")` as far as it does not ask for a GPU."""
    D = x["q"].shape[-1]
    return cuda_step.kda_step_cuda(
        *(x[name] for name in ("q", "k", "v", "gate_logits", "beta_logits", "gate")),
        *(state[0], state[1] if len(state) == 2 else None, x.get("weights", []), x.get("caches", [])),
        normalize=not normalized,
        scale=D**-0.5 if scale is None else scale,
    )


@pytest.mark.parametrize(
    ("dtype", "D", "state_dtype"),
    [  # each two of the three meet
        (torch.float32, 32, torch.bfloat16),
        (torch.bfloat16, 64, torch.int8),
        pytest.param(torch.bfloat16, 32, torch.float32, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, 128, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(torch.float32, 64, torch.float32, marks=pytest.mark.long),
        pytest.param(torch.float32, 128, torch.int8, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_kernel_against_float64(kernels_on_the_cpu, dtype, D, state_dtype):  # noqa: F811
    x, state = token(2, 3, D, dtype), state_of(2, 3, D, state_dtype)
    want, after, caches = exact(x, state)
    o = by_kernel(x, state)
    assert o.dtype == dtype
    assert relative(o, want) < OUTPUT[dtype]
    assert relative(unpack_state(state), after) < ROUNDING[state_dtype]
    for got, truth in zip(x["caches"], caches):
        torch.testing.assert_close(got.double(), truth, rtol=0, atol=0)


@pytest.mark.sample(3)
@pytest.mark.parametrize("state_dtype", STATES, ids=str)
def test_a_block_takes_several_heads(kernels_on_the_cpu, state_dtype):  # noqa: F811
    x, state = token(7, 9, 64, torch.bfloat16), state_of(7, 9, 64, state_dtype)
    want, after, caches = exact(x, state)
    assert relative(by_kernel(x, state), want) < OUTPUT[torch.bfloat16]
    assert relative(unpack_state(state), after) < ROUNDING[state_dtype]
    for got, truth in zip(x["caches"], caches):
        torch.testing.assert_close(got.double(), truth, rtol=0, atol=0)


OPTIONS = [
    ({"gate": "head"}, {}),
    ({"gate": "none"}, {}),
    ({"width": 0}, {"normalized": True}),
    ({"width": 2, "cache_dtype": torch.float16}, {}),
    ({"width": 1, "negative_eigenvalues": True}, {}),
    ({"cache_dtype": torch.bfloat16}, {"scale": 0.5}),
    ({"form": "bounded", "lower_bound": -3.0}, {}),
]


@pytest.mark.parametrize(("shape", "options"), OPTIONS)
def test_options(kernels_on_the_cpu, shape, options):  # noqa: F811
    x, state = token(1, 2, 32, torch.float16, **shape), state_of(1, 2, 32, torch.float32)
    want, after, caches = exact(x, state, **options)
    assert relative(by_kernel(x, state, **options), want) < OUTPUT[torch.float16]
    assert relative(state[0], after) < 1e-6
    for got, truth in zip(x.get("caches", []), caches):
        torch.testing.assert_close(got, truth.to(got.dtype), rtol=0, atol=0)


@pytest.mark.skipif(cpp.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize(("shape", "options"), [({}, {}), *OPTIONS])
def test_options_in_cpp(shape, options):
    shape = {name: value for name, value in shape.items() if name != "cache_dtype"}
    x, state = token(2, 3, 40, torch.float32, **shape), state_of(2, 3, 40, torch.float32)
    want, after, caches = exact(x, state, **options)
    assert relative(kda_step_fused(**x, state=state, backend="cpu", **options), want) < OUTPUT[torch.float32]
    assert relative(state[0], after) < 1e-6
    for got, truth in zip(x.get("caches", []), caches):
        torch.testing.assert_close(got, truth.to(got.dtype), rtol=0, atol=0)


@pytest.mark.skipif(cpp.compiler() is None, reason="no C++ compiler")
def test_what_the_cpp_cannot_take_runs_in_pytorch():
    x = token(1, 1, 32, torch.float32)
    for state_dtype in (torch.bfloat16, torch.int8):
        state = state_of(1, 1, 32, state_dtype)
        kda_step_fused(**x, state=state)
        with pytest.raises(ValueError, match="backend must be one of auto, cuda, torch, got 'cpu'"):
            kda_step_fused(**x, state=state, backend="cpu")


@pytest.mark.sample(3)
@pytest.mark.parametrize("state_dtype", STATES, ids=str)
def test_kernel_rounds_as_the_form_in_pytorch(kernels_on_the_cpu, state_dtype):  # noqa: F811
    """Where the numbers before rounding agree to the last bit, so do those after."""
    x, state = token(1, 2, 64, torch.float32), state_of(1, 2, 64, state_dtype)
    in_torch = tuple(copied(state))
    kda_step_fused(**{**x, "caches": copied(x["caches"])}, state=in_torch, backend="torch")
    by_kernel(x, state)
    step = unpack_state(in_torch).abs().amax(-1, keepdim=True) / (127 if state_dtype == torch.int8 else 128)
    assert ((unpack_state(state) - unpack_state(in_torch)).abs() <= 1.01 * step).all()
    if state_dtype != torch.float32:
        assert (state[0] != in_torch[0]).float().mean() < 0.01


@pytest.mark.sample(3)
@pytest.mark.parametrize("state_dtype", STATES, ids=str)
def test_a_number_that_is_none_is_not_hidden(kernels_on_the_cpu, state_dtype):  # noqa: F811
    x, state = token(1, 1, 32, torch.float32, width=0), state_of(1, 1, 32, state_dtype)
    in_torch = tuple(copied(state))
    x["v"][0, 0, 5] = float("nan")
    for o, kept in ((by_kernel(x, state), state), (kda_step_fused(**x, state=in_torch, backend="torch"), in_torch)):
        assert o[0, 0, 5].isnan()
        assert unpack_state(kept)[..., 5].isnan().all()


@pytest.mark.parametrize("state_dtype", STATES, ids=str)
def test_zeros_stay_zero(kernels_on_the_cpu, state_dtype):  # noqa: F811
    x, state = token(1, 1, 32, torch.float32, width=0), pack_state(torch.zeros(1, 1, 32, 32), state_dtype)
    x["v"].zero_()
    assert by_kernel(x, state).abs().max() == 0
    assert all(part.abs().max() == 0 for part in state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_rounding_is_to_nearest(dtype):
    x = 0.25 + 0.25 * torch.rand(64, 64, generator=torch.Generator().manual_seed(0))  # of one exponent
    x[:, 0] = 0.5  # sets the step of a row in int8
    got = unpack_state(pack_state(x, dtype))
    step = 0.5 / 127 if dtype == torch.int8 else 2.0**-9
    assert 0.49 * step < (got - x).abs().max() <= 0.501 * step
    assert abs((got - x)[:, 1:].mean().item()) < 0.05 * step


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_steps_equal_the_sequence(backend):
    """In float64, convolutions included."""
    if backend == "cpu" and cpu_step.LIBRARY.reason_cannot_run() is not None:
        pytest.skip("no C++ compiler")
    B, T, H, D = 2, 9, 2, 32
    tokens = [token(B, H, D, torch.float64, seed=t) for t in range(T)]
    x = moved(tokens[0], torch.Tensor.double)
    weights, gate = x["weights"], x["gate"]
    xs = {n: torch.stack([x[n] for x in tokens], 1) for n in ("q", "k", "v", "gate_logits", "beta_logits")}
    streams = [xs[n].flatten(2) for n in "qkv"]
    (q, k, v), lasts = short_convolutions(streams, weights, normalized=(True, True, False), head_dim=D)
    heads = [y.unflatten(2, (H, D)) for y in (q, k, v)]
    want, final = kda_attention_fused(*heads, xs["gate_logits"], xs["beta_logits"], gate, normalized=True)
    state = (torch.zeros(B, H, D, D, dtype=torch.float64),)
    caches = [torch.zeros(B, 3, H * D, dtype=torch.float64) for _ in range(3)]
    for t in range(T):
        x = tokens[t] | {"weights": weights, "caches": caches, "gate": gate}
        got = kda_step_fused(**x, state=state, backend=backend)
        torch.testing.assert_close(got, want[:, t], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state[0], final, rtol=1e-10, atol=1e-12)
    for cache, last in zip(caches, lasts):
        torch.testing.assert_close(cache, last)


def _int8_alone(x, state):
    state[:] = [state[0].to(torch.int8)]


def _transposed(x, state):
    state[:] = [state[0].mT]


def _two_weights(x, state):
    x["weights"] = x["weights"][:2]


def _short_cache(x, state):
    x["caches"][1] = x["caches"][1][:, :2]


def _half(x, state):
    state[:] = [state[0].half()]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_int8_alone, "comes with its factors"),
        (_transposed, "in place and must be contiguous"),
        (_two_weights, "three weights and three caches"),
        (_short_cache, r"caches\[1\] must be"),
        (_half, "begins with a tensor of"),
    ],
)
def test_bad_input(spoil, message):
    x, state = token(1, 2, 32, torch.float32), list(state_of(1, 2, 32, torch.float32))
    spoil(x, state)
    with pytest.raises(ValueError, match=message):
        kda_step_fused(**x, state=tuple(state))


@pytest.mark.parametrize("gate", ["channel", "head"])
def test_parts_of_one_product_are_read_where_they_are(kernels_on_the_cpu, gate):  # noqa: F811
    apart, state = token(3, 2, 64, torch.bfloat16, gate=gate), state_of(3, 2, 64, torch.float32)
    want = by_kernel(moved(apart, torch.Tensor.clone), tuple(x.clone() for x in state))
    names = ("q", "k", "v", "gate_logits", "beta_logits")
    sizes = [apart[name][0].numel() for name in names]
    product = torch.cat([apart[name].flatten(1) for name in names], 1)
    product = torch.nn.functional.pad(product, (0, -sum(sizes) % 8))
    together = moved(apart, torch.Tensor.clone) | {
        name: part.unflatten(1, apart[name].shape[1:])
        for name, part in zip(names, product[:, : sum(sizes)].split(sizes, 1))
    }
    assert not together["q"].is_contiguous()
    torch.testing.assert_close(by_kernel(together, state), want, rtol=0, atol=0)
