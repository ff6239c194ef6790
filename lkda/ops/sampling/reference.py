"""Sampling in PyTorch: the definition.

The probabilities are whole numbers, exp(logit - largest logit) in units of 2^-40, so that their sums are exact: the
token does not depend on the order of a sum, nor on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = 2.0**40
# On a CPU the nucleus is searched in so many likeliest tokens first, since sorting all of them takes longer.
LIKELIEST = (64, 512)

_MASK = 2**64 - 1
# The constants of SplitMix64 (Steele, Lea and Flood, 2014).
_STEP, _MIX = 0x9E3779B97F4A7C15, ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def draw_key(seed: int, prompt: int, sample: int) -> int:
    """The key (int64) of the random numbers of one sampled text."""
    key = 0
    for number in (seed, prompt, sample):
        key = (key + number + 1) * _STEP & _MASK
        for shift, factor in _MIX:
            key = (key ^ key >> shift) * factor & _MASK
        key ^= key >> 31
    return _signed(key)


def uniforms(keys: Tensor, positions: Tensor) -> Tensor:
    """Number `positions` (int64) of the SplitMix64 generator that `keys` (int64) begin: float64 in [0, 1), exact."""
    z = keys + (positions + 1) * _signed(_STEP)
    for shift, factor in _MIX:
        z = (z ^ _shift_right(z, shift)) * _signed(factor)
    return _shift_right(z ^ _shift_right(z, 31), 11).double() * 2.0**-53


def sample_torch(
    logits: Tensor, keys: Tensor, positions: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> Tensor:
    """Arguments as in `sample_tokens`; top_k = 0 for all tokens."""
    logits = logits.float()
    largest, likeliest = logits.max(-1, keepdim=True)
    if temperature == 0:
        return torch.where(largest.isfinite(), likeliest, -1).squeeze(-1)
    weights = torch.exp((logits - largest) / temperature)
    counts = (weights * UNIT).long()
    if top_k and top_k < logits.shape[-1]:
        least = weights.topk(top_k).values[:, -1:]
        counts = counts.masked_fill(weights < least, 0)
    if top_p < 1:
        counts = counts.masked_fill(counts < _least_of_nucleus(counts, top_p), 0)
    if min_p > 0:
        counts = counts.masked_fill(weights < min_p, 0)
    below = counts.cumsum(-1)
    total = below[:, -1]
    drawn = torch.minimum((uniforms(keys, positions) * total.double()).long(), total - 1)
    token = (below <= drawn.unsqueeze(-1)).sum(-1)
    return torch.where(largest.squeeze(-1).isfinite(), token, -1)


def _least_of_nucleus(counts: Tensor, top_p: float) -> Tensor:
    """[B, 1], the count of the last token of the smallest set of likeliest tokens that has the share `top_p`."""
    needed = (counts.sum(-1, keepdim=True).double() * top_p).ceil().long().clamp(min=1)
    for size in LIKELIEST:
        if counts.device.type == "cpu" and counts.shape[-1] > 4 * size:
            some = counts.topk(size).values
            if bool((some.sum(-1, keepdim=True) >= needed).all()):
                return _reaching(some, needed)
    return _reaching(counts.sort(descending=True).values, needed)


def _reaching(descending: Tensor, needed: Tensor) -> Tensor:
    """The count with which the sum reaches `needed`."""
    fewer = (descending.cumsum(-1) < needed).sum(-1, keepdim=True)
    return descending.gather(-1, fewer.clamp(max=descending.shape[-1] - 1))


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """A logical shift: int64 is shifted arithmetically."""
    return (z >> bits) & (2 ** (64 - bits) - 1)


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number
