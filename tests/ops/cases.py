"""Inputs for the tests of the operators: gates of every kind, lengths below, at and across a chunk."""

from __future__ import annotations

import math
from contextlib import contextmanager

import torch
from torch import Tensor

GATES = ("slow", "fast", "zero", "resets", "brutal", "mixed")
LENGTHS = (1, 15, 16, 17, 63, 64, 65, 1000)


def log_decay(gate: str, B: int, T: int, H: int, K: int, generator: torch.Generator) -> Tensor:
    """g [B, T, H, K] float64, of one regime.

    slow: as a fresh layer draws it.  fast: -5 sigmoid(N(0, 1)).  zero: no decay.  resets: slow, with 5% of the tokens
    wiping everything (-1e4).  brutal: U(-60, 0).  mixed: slow channels beside channels of every other kind.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def slow() -> Tensor:
        A = 1 + 15 * uniform(1, 1, H, 1)
        dt = torch.exp(math.log(1e-3) + uniform(1, 1, H, K) * math.log(100))
        return -A * torch.nn.functional.softplus(torch.log(torch.expm1(dt)) + 0.3 * normal(B, T, H, K))

    def resets() -> Tensor:
        return torch.where(uniform(B, T, H, 1) < 0.05, -1e4, slow())

    if gate == "mixed":
        kinds = torch.stack(
            [slow(), -5 * torch.sigmoid(normal(B, T, H, K)), 0 * slow(), -60 * uniform(B, T, H, K), resets()]
        )
        return kinds[torch.arange(K) % len(kinds), ..., torch.arange(K)].movedim(0, -1)
    if gate == "fast":
        return -5 * torch.sigmoid(normal(B, T, H, K))
    if gate == "zero":
        return torch.zeros(B, T, H, K, dtype=torch.float64)
    if gate == "brutal":
        return -60 * uniform(B, T, H, K)
    return {"slow": slow, "resets": resets}[gate]()


def kda_inputs(
    B: int, T: int, H: int, K: int, V: int, *, gate: str = "slow", dtype: torch.dtype = torch.float64, seed: int = 0
) -> dict[str, Tensor]:
    """q, k (unit norm), v of `dtype`; g and beta in float32, or float64 where `dtype` is; initial_state likewise."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q, k = (torch.nn.functional.normalize(normal(B, T, H, K), dim=-1).to(dtype) for _ in range(2))
    return {
        "q": q,
        "k": k,
        "v": normal(B, T, H, V).to(dtype),
        "g": log_decay(gate, B, T, H, K, generator).to(wide),
        "beta": torch.sigmoid(normal(B, T, H)).to(wide),
        "initial_state": normal(B, H, K, V).to(wide),
    }


def small_kda_inputs(T: int, D: int, *, packed: bool, state: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """bfloat16 inputs of one row of 64 channels, or one head, and the options of the call: as three sequences, of which
    the first is empty, where it is packed."""
    inputs, options = kda_inputs(1, T, max(1, 64 // D), D, D, dtype=torch.bfloat16), {}
    if packed:
        options["cu_seqlens"] = torch.tensor([0, 0, 20, T], dtype=torch.int32)
        inputs["initial_state"] = inputs["initial_state"].repeat(3, 1, 1, 1)
    if not state:
        del inputs["initial_state"]
    return inputs, options


def simplified_inputs(
    B: int, T: int, H: int, D: int, *, memory: float = 30.0, dtype: torch.dtype = torch.float64, seed: int = 0
) -> dict[str, Tensor]:
    """q, k, v of `dtype`; decay 1 - U(0, 2) / memory, so that `memory` is the mean time constant in tokens."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = (torch.randn(B, T, H, D, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    decay = 1 - 2 * torch.rand(B, T, H, generator=generator, dtype=torch.float64) / memory
    state = torch.rand(B, H, 2, D, generator=generator, dtype=torch.float64)
    return {"q": q, "k": k, "v": v, "decay": decay.clamp(1e-30, 1).to(wide), "initial_state": state.to(wide)}


def relative(got: Tensor, want: Tensor) -> float:
    """Relative L2 error; NaN never passes a comparison with it."""
    got, want = got.detach().double().to(want.device), want.detach().double()
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()


@contextmanager
def poisoned():
    """Memory that torch.empty hands out is full of NaN."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was)
