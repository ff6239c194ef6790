"""The decoding step of simplified linear attention: the kernel on the CPU, and the form in PyTorch, against float64."""

from __future__ import annotations

import pytest
import torch

from lkda.ops import short_convolutions, simplified_attention, simplified_step_fused
from lkda.ops.runtime import cpp
from lkda.ops.simplified.cuda import fused_step as cuda
from tests.ops.cases import relative
from tests.ops.emulation import kernels_on_the_cpu  # noqa: F401
from tests.ops.simplified.step_cases import STATE, check, exact, moved, token, written


def by_kernel(x):
    """`simplified_step_fused(backend="cuda")` as far as it does not ask for a GPU."""
    given = (x[name] for name in ("q", "k", "v", "logits", "bias", "state"))
    return cuda.simplified_step_fused_cuda(*given, x.get("weights", []), x.get("caches", []))


@pytest.mark.parametrize(
    ("B", "H", "D", "dtype"),
    [
        (1, 3, 64, torch.bfloat16),
        (5, 2, 128, torch.float16),
        (2, 3, 32, torch.float32),
        (3, 5, 20, torch.float32),  # channels that do not fill the last block
    ],
    ids=str,
)
def test_kernel_against_float64(kernels_on_the_cpu, B, H, D, dtype):  # noqa: F811
    x = token(B, H, D, dtype)
    want = exact(x)
    check(by_kernel(x), x, want)


OPTIONS = [
    {"decay": "constant"},
    {"width": 0},
    {"width": 0, "decay": "constant"},
    {"width": 1},
    {"width": 2, "cache_dtype": torch.bfloat16},
    {"width": 3, "weight_dtype": torch.bfloat16},
    {"weight_dtype": torch.bfloat16, "cache_dtype": torch.bfloat16},
    {"weight_dtype": torch.float16, "cache_dtype": torch.float16},  # of neither dtype that the kernel takes
    {"logits_dtype": torch.float32},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(kernels_on_the_cpu, options):  # noqa: F811
    x = token(2, 2, 32, torch.bfloat16, **options)
    want, in_torch = exact(x), moved(x, torch.Tensor.clone)
    check(simplified_step_fused(**in_torch, backend="torch"), in_torch, want)
    check(by_kernel(x), x, want)


CPP_OPTIONS = [{}, {"decay": "constant"}, {"width": 0}, {"width": 1}, {"width": 6}]


@pytest.mark.skipif(cpp.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("options", CPP_OPTIONS, ids=str)
def test_cpp(options):
    x = token(3, 2, 20, torch.float32, **options)
    want = exact(x)
    x["q"] = x["q"].mT.contiguous().mT
    check(simplified_step_fused(**x, backend="cpu"), x, want)


def test_cpp_takes_one_dtype():
    with pytest.raises(ValueError, match="backend must be one of auto, cuda, torch, got 'cpu'"):
        simplified_step_fused(**token(1, 2, 32, torch.float32, logits_dtype=torch.float64), backend="cpu")


def test_a_bias_in_half_precision(kernels_on_the_cpu):  # noqa: F811
    x = token(2, 2, 32, torch.bfloat16)
    x["bias"] = x["bias"].bfloat16()
    want = exact(x)
    check(by_kernel(x), x, want)


def test_several_steps_move_the_caches_on(kernels_on_the_cpu):  # noqa: F811
    kept, truth = token(2, 2, 32, torch.float32), None
    for t in range(6):
        x = kept | {name: token(2, 2, 32, torch.float32, seed=t)[name] for name in ("q", "k", "v", "logits")}
        wide = moved(x, torch.Tensor.double) if truth is None else moved(x, torch.Tensor.double) | truth
        want = simplified_step_fused(**wide, backend="torch")
        truth = {name: wide[name] for name in ("state", "caches")}
        check(by_kernel(x), x, (want, *written(wide)))


def test_a_sequence_is_the_same_wherever_it_stands(kernels_on_the_cpu):  # noqa: F811
    x = token(5, 2, 32, torch.bfloat16)
    parameters = {name: x[name] for name in ("bias", "weights")}
    alone = moved(x, lambda y: y[3:4].clone()) | parameters
    want, got = by_kernel(alone), by_kernel(x)
    assert torch.equal(got[3:4], want)
    for one, all_of_them in zip(written(alone), written(x), strict=True):
        assert torch.equal(all_of_them[3:4], one)


def test_parts_of_one_product_are_read_where_they_are(kernels_on_the_cpu, monkeypatch):  # noqa: F811
    """At any place and with any stride; other layouts are copied."""
    x = token(3, 3, 20, torch.bfloat16)
    apart = moved(x, torch.Tensor.clone)
    want = by_kernel(apart)
    names = ("q", "k", "v", "logits")
    sizes = [x[name][0].numel() for name in names]
    product = torch.cat([torch.zeros(3, 1, dtype=torch.bfloat16), *(x[name].flatten(1) for name in names)], 1)
    parts = dict(zip(names, product[:, 1:].split(sizes, 1), strict=True))
    together = moved(x, torch.Tensor.clone) | {
        name: part.unflatten(1, x[name].shape[1:]) for name, part in parts.items()
    }
    assert cuda._rows(together["k"]).data_ptr() == parts["k"].data_ptr()
    awkward = moved(x, torch.Tensor.clone) | {name: x[name].mT.contiguous().mT for name in ("q", "k", "v")}
    awkward["logits"] = x["logits"].repeat_interleave(2, 1)[:, ::2]
    assert awkward["logits"].stride() == (6, 2)
    for layout in (together, awkward):
        assert not layout["q"].is_contiguous()
        assert torch.equal(by_kernel(layout), want)
        for got, after in zip(written(layout), written(apart), strict=True):
            assert torch.equal(got, after)


def test_a_number_that_is_none_is_not_hidden(kernels_on_the_cpu):  # noqa: F811
    x = token(1, 1, 32, torch.float32, width=0)
    in_torch = moved(x, torch.Tensor.clone)
    x["v"][0, 0, 5] = in_torch["v"][0, 0, 5] = float("nan")
    for o, given in ((by_kernel(x), x), (simplified_step_fused(**in_torch, backend="torch"), in_torch)):
        assert o.isnan().nonzero().tolist() == [[0, 0, 5]]
        assert given["state"].isnan().nonzero().tolist() == [[0, 0, 0, 5]]


def test_keys_that_write_nothing_give_finite_outputs(kernels_on_the_cpu):  # noqa: F811
    x = token(1, 1, 32, torch.float32, width=0)
    x["k"].fill_(-1000)
    x["state"].zero_()
    assert by_kernel(x).abs().max() == 0
    assert x["state"].abs().max() == 0


@pytest.mark.parametrize(("width", "decay"), [(4, "token"), (6, "token"), (0, "constant")])
def test_steps_equal_the_sequence(width, decay):
    """In float64, convolutions included; those of more than 4 taps too."""
    B, T, H, D = 2, 9, 2, 32
    tokens = [token(B, H, D, torch.float64, seed=t, width=width, decay=decay) for t in range(T)]
    x = moved(tokens[0], torch.Tensor.double)
    xs = {name: torch.stack([one[name] for one in tokens], 1) for name in "qkv"}
    heads, lasts = [xs[name] for name in "qkv"], []
    if width:
        streams, lasts = short_convolutions([y.flatten(2) for y in heads], x["weights"])
        heads = [y.unflatten(2, (H, D)) for y in streams]
    logits = torch.stack([one["logits"] for one in tokens], 1) if decay == "token" else torch.zeros(H)
    want, final = simplified_attention(*heads, torch.sigmoid(logits.double() + x["bias"]))
    kept = {"bias": x["bias"], "state": torch.zeros_like(x["state"])}
    if width:
        kept |= {"weights": x["weights"], "caches": [torch.zeros_like(cache) for cache in x["caches"]]}
    for t in range(T):
        torch.testing.assert_close(simplified_step_fused(**tokens[t] | kept), want[:, t], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(kept["state"], final, rtol=1e-10, atol=1e-12)
    for cache, last in zip(kept.get("caches", []), lasts, strict=True):
        torch.testing.assert_close(cache, last)


def test_float64_tokens_with_a_float32_state():
    x = token(2, 2, 32, torch.float64)
    want, state, *_ = exact(x)
    torch.testing.assert_close(simplified_step_fused(**x), want, rtol=1e-12, atol=1e-12)
    assert relative(x["state"], state) < STATE


def _two_weights(x):
    x["weights"] = x["weights"][:2]


def _short_cache(x):
    x["caches"][1] = x["caches"][1][:, :2]


def _mixed_weights(x):
    x["weights"][2] = x["weights"][2].bfloat16()


def _transposed_state(x):
    x["state"] = x["state"].mT.contiguous().mT


def _half_state(x):
    x["state"] = x["state"].half()


def _logits_of_channels(x):
    x["logits"] = x["q"]


def _one_bias(x):
    x["bias"] = x["bias"][:1]


def _mixed_tokens(x):
    x["v"] = x["v"].bfloat16()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_two_weights, "three weights and three caches"),
        (_short_cache, r"caches\[1\] must be"),
        (_mixed_weights, "the weights share a floating-point dtype, got torch.float32 and torch.bfloat16"),
        (_transposed_state, "state is written in place and must be contiguous"),
        (_half_state, "state must be float32 or float64, got torch.float16"),
        (_logits_of_channels, r"logits must be \[B, H\]"),
        (_one_bias, "bias must be"),
        (_mixed_tokens, "v is torch.bfloat16 and q torch.float32"),
    ],
)
def test_bad_input(spoil, message):
    x = token(1, 2, 32, torch.float32)
    spoil(x)
    with pytest.raises(ValueError, match=message):
        simplified_step_fused(**x)


def test_what_the_kernel_cannot_take_is_refused_by_name():
    with pytest.raises(ValueError, match="backend must be one of auto, cpu, torch, got 'cuda'"):
        simplified_step_fused(**token(1, 2, 32, torch.float32, width=5), backend="cuda")
