"""Inputs of KDA's decoding step, and the step in float64."""

from __future__ import annotations

from dataclasses import replace

import torch

from lkda.ops import KDAGate
from lkda.ops.kda.state import pack_state, unpack_state
from lkda.ops.kda.step import kda_step_fused

STATES = (torch.float32, torch.bfloat16, torch.int8)
WIDTH = 4


def token(
    B,
    H,
    D,
    dtype,
    *,
    device="cpu",
    seed=0,
    gate="channel",
    width=WIDTH,
    cache_dtype=torch.float32,
    slow=False,
    form="softplus",
    lower_bound=-5.0,
    negative_eigenvalues=False,
):
    """The arguments of `kda_step_fused` without state; `slow`: decays near 1, as in a layer at initialisation."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw)

    x = {name: normal(B, H, D) for name in ("q", "k", "v")}
    x["beta_logits"] = normal(B, H)
    if gate != "none":
        shape = (B, H, D) if gate == "channel" else (B, H)
        x["gate_logits"] = normal(*shape)
    x = {name: y.to(dtype) for name, y in x.items()}
    parameters = (None, None)
    if gate != "none":
        parameters = (normal(H), normal(H * D if gate == "channel" else H) - (6 if slow else 0))
    x.setdefault("gate_logits", None)
    if width:
        x["weights"] = [normal(H * D, 1, width) * 0.5 for _ in range(3)]
        x["caches"] = [normal(B, width - 1, H * D).to(cache_dtype) for _ in range(3)]
    x["gate"] = KDAGate(*parameters, form, lower_bound, negative_eigenvalues)
    return moved(x, lambda y: y.to(device))


def moved(x, move):
    """The same arguments after `move` of every tensor."""
    gate = x["gate"]
    parameters = {name: y if (y := getattr(gate, name)) is None else move(y) for name in ("A_log", "dt_bias")}
    return {
        name: [move(part) for part in y] if isinstance(y, list) else y if y is None else move(y)
        for name, y in x.items()
        if name != "gate"
    } | {"gate": replace(gate, **parameters)}


def state_of(B, H, D, dtype, *, device="cpu", seed=1):
    S = torch.randn(B, H, D, D, generator=torch.Generator().manual_seed(seed)) * 0.3
    return tuple(x.contiguous().to(device) for x in pack_state(S, dtype))


def copied(x):
    return [y.clone() for y in x]


def exact(x, state, **options):
    """o, the state and the caches after, in float64, from what the kept state says."""
    wide = moved(x, torch.Tensor.double)
    caches = wide.get("caches", [])
    after = (unpack_state(state).double(),)
    o = kda_step_fused(**wide, state=after, backend="torch", **options)
    return o, after[0], caches
