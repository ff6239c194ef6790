"""Attention of one token to preallocated caches, in C++. test_step.py compares `softmax_step` with float64."""

from __future__ import annotations

import pytest
import torch

from lkda.ops import softmax_step
from lkda.ops.runtime import cpp
from lkda.ops.softmax.cpu.step import advance_, is_full, latent_step_cpu

pytestmark = pytest.mark.skipif(cpp.compiler() is None, reason="no C++ compiler")


def test_lengths() -> None:
    lengths = torch.tensor([[1], [3]])
    assert not is_full(lengths, 4)
    advance_(lengths)
    assert lengths.tolist() == [[2], [4]]
    assert is_full(lengths, 4)
    assert not is_full(lengths[:1], 4)


@torch.inference_mode()
def test_a_full_cache_of_latents_loses_its_last_token() -> None:
    latents, shareds, lengths = torch.zeros(2, 4, 6), torch.zeros(2, 4, 2), torch.tensor([1, 5])
    found = latent_step_cpu(
        *(torch.randn(2, 3, 8), torch.randn(2, 6), torch.randn(2, 2)),
        norm=torch.ones(6),
        eps=1e-6,
        projection=torch.randn(3 * (6 + 5), 6),
        rope_base=None,
        latents=latents,
        shareds=shareds,
        lengths=lengths,
    )
    assert found.isfinite().all()
    for cache in (latents, shareds):
        assert cache.any(-1).tolist() == [[False, True, False, False], [False, False, False, True]]
    assert lengths.tolist() == [1, 5]


@torch.inference_mode()
def test_long_caches_give_the_same_bits_with_any_threads() -> None:
    """And what PyTorch computes of the caches."""
    draw = torch.Generator().manual_seed(0)
    caches = [torch.randn(1, 4, 3000, 32, generator=draw) for _ in range(2)]
    q, k, v = (torch.randn(1, 4, 32, generator=draw) for _ in range(3))
    before, found, lengths = torch.get_num_threads(), [], torch.tensor([2500])
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            found.append(softmax_step(q, k, v, *caches, lengths, rope_base=10000.0, backend="cpu"))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    want = softmax_step(q, k, v, *caches, lengths, rope_base=10000.0, backend="torch")
    torch.testing.assert_close(found[0], want)
