"""Softmax attention: the fused form against the quadratic one."""

from __future__ import annotations

import pytest
import torch

from lkda.ops import softmax_attention
from tests.ops.cases import relative


def qkv(T, S, dtype=torch.float64, V=8):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, T, 3, 8), (2, S, 3, 8), (2, S, 3, V))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize(("T", "S"), [(1, 1), (17, 17), (1, 30), (5, 30)])
@pytest.mark.parametrize("V", [8, 4])
def test_sdpa_equals_the_quadratic_form(T, S, V):
    q, k, v = qkv(T, S, V=V)
    got = softmax_attention(q, k, v, backend="sdpa")
    assert relative(got, softmax_attention(q, k, v, backend="naive")) < 1e-12


def test_the_last_queries_see_what_the_whole_sequence_shows_them():
    q, k, v = qkv(30, 30)
    assert relative(softmax_attention(q[:, -5:], k, v), softmax_attention(q, k, v)[:, -5:]) < 1e-12


@pytest.mark.parametrize("backend", ["sdpa", "naive"])
def test_packed_sequences_equal_each_alone(backend):
    q, k, v = (x[:1] for x in qkv(40, 40))
    bounds = [0, 0, 11, 12, 40, 40]
    got = softmax_attention(q, k, v, cu_seqlens=torch.tensor(bounds), backend=backend)
    for a, b in zip(bounds, bounds[1:]):
        if a < b:
            assert relative(got[:, a:b], softmax_attention(q[:, a:b], k[:, a:b], v[:, a:b], backend="naive")) < 1e-12


def test_scale_scales_the_scores():
    q, k, v = qkv(9, 9)
    want = softmax_attention(2 * q, k, v, backend="naive")
    assert relative(softmax_attention(q, k, v, scale=2 * 8**-0.5), want) < 1e-12


def test_more_queries_than_keys_is_refused():
    q, k, v = qkv(5, 4)
    with pytest.raises(ValueError, match="the last T of S positions"):
        softmax_attention(q, k, v)
