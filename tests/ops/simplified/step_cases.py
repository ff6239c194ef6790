"""Inputs of the decoding step of simplified linear attention, and the step in float64."""

from __future__ import annotations

import torch

from lkda.ops import simplified_step_fused
from tests.ops.cases import relative

# Relative, of o rounded once, and of a state in float32.
OUTPUT = {torch.float32: 2e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}
STATE = 1e-6


def token(
    B,
    H,
    D,
    dtype,
    *,
    device="cpu",
    seed=0,
    width=4,
    decay="token",
    weight_dtype=torch.float32,
    cache_dtype=torch.float32,
    logits_dtype=None,
):
    """The arguments of `simplified_step_fused`; half of the decays are above 0.98."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw)

    x = {name: normal(B, H, D).to(dtype) for name in ("q", "k", "v")}
    x["logits"] = normal(B, H).to(logits_dtype or dtype) if decay == "token" else None
    x["bias"] = normal(H) + 4
    x["state"] = normal(B, H, 2, D).abs()
    if width:
        x["weights"] = [(normal(H * D, 1, width) * 0.5).to(weight_dtype) for _ in range(3)]
        x["caches"] = [normal(B, width - 1, H * D).to(cache_dtype) for _ in range(3)]
    return moved(x, lambda y: y.to(device))


def moved(x, move):
    """The same arguments after `move` of every tensor."""
    return {
        name: [move(part) for part in y] if isinstance(y, list) else y if y is None else move(y)
        for name, y in x.items()
    }


def written(x):
    """The tensors that a step writes: the state and the caches."""
    return [x["state"], *x.get("caches", [])]


def exact(x):
    """o, and the state and caches after the step, in float64."""
    wide = moved(x, lambda y: y.double().clone())
    o = simplified_step_fused(**wide, backend="torch")
    return o, *written(wide)


def check(o, x, want):
    """That o, and the state and caches of x after a step, are those of `exact` before it."""
    truth, state, *caches = want
    assert o.dtype == x["v"].dtype
    assert relative(o, truth) < OUTPUT[o.dtype]
    assert relative(x["state"], state) < STATE
    for got, cache in zip(x.get("caches", []), caches, strict=True):
        torch.testing.assert_close(got, cache.to(got.dtype), rtol=0, atol=0)
