"""Softmax attention: the fused form against the quadratic one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lkda.ops import softmax_attention
from lkda.ops.softmax import op
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


@pytest.mark.parametrize("V", [8, 4])
def test_late_queries_need_no_mask_of_all_pairs(V, monkeypatch):
    masks = []

    def recorded(*arguments, attn_mask, **options):
        masks.append(attn_mask.numel())
        return attend(*arguments, attn_mask=attn_mask, **options)

    attend = F.scaled_dot_product_attention
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, T, 3, width, dtype=torch.float64) for T, width in ((50, 8), (70, 8), (70, V)))
    want = softmax_attention(q, k, v, backend="naive")
    monkeypatch.setattr(op, "MASK_ENTRIES", 560)
    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    torch.testing.assert_close(softmax_attention(q, k, v, backend="sdpa"), want)
    assert len(masks) == 7  # 8 queries at a time
    assert max(masks) <= 560


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: PyTorch has other kernels there")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("K", "V"), [(64, 64), (96, 64)])
def test_late_queries_on_a_gpu_take_linear_memory(K, V, dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, T, 2, n, device="cuda", dtype=dtype) for T, n in ((8192, K), (32768, K), (32768, V)))
    softmax_attention(q, k, v)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    o = softmax_attention(q, k, v)
    assert torch.cuda.max_memory_allocated() - before < 8192 * 32768 / 4  # a mask of bytes takes four times this
    some = slice(4000, 4064)
    want = softmax_attention(q[:, some].double(), k[:, :28640].double(), v[:, :28640].double(), backend="naive")
    assert (o[:, some] - want).norm() < (1e-2 if dtype == torch.bfloat16 else 1e-3) * want.norm()
