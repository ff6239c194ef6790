"""The layers of a decoding step in C++, against PyTorch. A row has the same bits in any batch and with any threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lkda.ops.rows import cpu
from lkda.ops.runtime import cpp

pytestmark = pytest.mark.skipif(cpp.compiler() is None, reason="no C++ compiler")
ALLOWED = {torch.float32: 2e-5, torch.float64: 1e-12}


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield request.param


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=ALLOWED[got.dtype], atol=ALLOWED[got.dtype])


@pytest.mark.parametrize("n", [1, 7, 16, 40, 129])
def test_products(dtype: torch.dtype, n: int) -> None:
    x, other = (torch.randn(3, 2 * n, dtype=dtype)[:, :n] for _ in range(2))  # rows that lie apart
    weights = [torch.randn(outputs, n, dtype=dtype) for outputs in (1, 8, 19)]
    norm, add = torch.randn(n, dtype=dtype), torch.randn(3, 28, dtype=dtype)
    together = torch.cat(weights)
    normal = F.rms_norm(x, (n,), norm, 1e-5)
    close(cpu.product_rows(x, weights), x @ together.mT)
    close(cpu.product_rows(x, weights, add=add), x @ together.mT + add)
    close(cpu.product_rows(x, weights, form=cpu.NORM, norm=norm, eps=1e-5), normal @ together.mT)
    gated = cpu.product_rows(x, weights, form=cpu.NORM, norm=norm, eps=1e-5, other=other)
    close(gated, (normal * other.sigmoid()) @ together.mT)
    close(cpu.product_rows(x, weights, form=cpu.SILU, other=other), (F.silu(x) * other) @ together.mT)
    close(cpu.product_rows(x, weights, form=cpu.TIMES, other=other), (x * other) @ together.mT)


def test_norms_of_heads(dtype: torch.dtype) -> None:
    x, norm, weight = (torch.randn(*shape, dtype=dtype) for shape in ((2, 48), (12,), (5, 48)))
    want = F.rms_norm(x.view(2, 4, 12), (12,), norm, 1e-5).flatten(1) @ weight.mT
    close(cpu.product_rows(x, [weight], form=cpu.NORM, norm=norm, eps=1e-5), want)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_of_a_row(dtype: torch.dtype, threads: int) -> None:
    x, weight = torch.randn(5, 512, dtype=dtype), torch.randn(1029, 512, dtype=dtype)
    alone = torch.cat([cpu.product_rows(row, [weight]) for row in x.split(1)])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(cpu.product_rows(x, [weight]), alone)
    finally:
        torch.set_num_threads(before)


def test_embedding_norm_and_sum(dtype: torch.dtype) -> None:
    table, norm, tokens = torch.randn(6, 20, dtype=dtype), torch.randn(20, dtype=dtype), torch.tensor([5, 0, 5])
    close(cpu.embed_rows(tokens, table, norm=None, eps=0.0, scale=1.0), table[tokens])
    want = 3 * F.rms_norm(table[tokens], (20,), norm, 1e-5)
    close(cpu.embed_rows(tokens, table, norm=norm, eps=1e-5, scale=3.0), want)
    close(cpu.norm_rows(table, norm, 1e-5), F.rms_norm(table, (20,), norm, 1e-5))
    heads = table[:, :12].unflatten(1, (3, 4))  # rows that lie apart
    close(cpu.norm_rows(heads, norm[:4], 1e-5), F.rms_norm(heads, (4,), norm[:4], 1e-5))
    close(cpu.add_rows(table, table), 2 * table)
    for token in (-1, 6):
        with pytest.raises(ValueError, match=f"tokens must be from 0 to 5, got .{token}."):
            cpu.embed_rows(torch.tensor([token]), table, norm=None, eps=0.0, scale=1.0)


@pytest.mark.parametrize("width", [1, 2, 4, 6])
def test_convolution(dtype: torch.dtype, width: int) -> None:
    xs, weight = torch.randn(2, 9, 12, dtype=dtype), torch.randn(12, 1, width, dtype=dtype)
    cache = torch.zeros(2, width - 1, 12, dtype=dtype)
    got = torch.stack([cpu.convolve_rows(xs[:, t], weight, cache) for t in range(9)], 1)
    padded = F.pad(xs.mT, (width - 1, 0))
    close(got, F.silu(F.conv1d(padded, weight, groups=12)).mT)
    assert torch.equal(cache, xs[:, 9 - (width - 1) :])


def test_what_has_gradients_or_another_dtype_is_not_taken() -> None:
    x = torch.randn(2, 4)
    assert not cpu.can_take(x)
    with torch.no_grad():
        assert cpu.can_take(x, x)
        assert cpu.can_take(x[:, :2], x)
        assert not cpu.can_take(x.t(), x)
        assert not cpu.can_take(x, x[:, :2])
        assert not cpu.can_take(x, x.double())
        assert not cpu.can_take(x.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            assert not cpu.can_take(x)
