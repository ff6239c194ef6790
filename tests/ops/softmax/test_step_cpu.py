"""Attention of one token to preallocated caches, in C++."""

from __future__ import annotations

import pytest
import torch

from lkda.models.rope import frequencies
from lkda.ops.softmax.cpu.step import LIBRARY, latent_step_cpu, softmax_step_cpu

pytestmark = pytest.mark.skipif(LIBRARY.reason_cannot_run() is not None, reason="no C++ compiler")


@torch.inference_mode()
def test_a_full_cache_is_said_and_nothing_is_changed() -> None:
    """Though another sequence has room. What the steps compute is tested with the mixers."""
    caches, length = [torch.zeros(2, 3, 4, 8) for _ in range(2)], torch.tensor([[1], [4]])
    q, k, v = (torch.randn(2, 3, 8) for _ in range(3))
    turned = frequencies(4, 10000.0, q.device, q.dtype)
    assert softmax_step_cpu(q, k, v, frequencies=turned, keys=caches[0], values=caches[1], length=length) is None
    assert not any(cache.any() for cache in caches)
    latents, shareds = torch.zeros(2, 4, 6), torch.zeros(2, 4, 2)
    found = latent_step_cpu(
        *(q, torch.randn(2, 6), torch.randn(2, 2)),
        norm=torch.ones(6),
        eps=1e-6,
        projection=torch.randn(3 * (6 + 5), 6),
        latents=latents,
        shareds=shareds,
        length=length,
    )
    assert found is None
    assert not latents.any()
    assert not shareds.any()
    assert length.tolist() == [[1], [4]]


@torch.inference_mode()
def test_long_caches_give_the_same_bits_with_any_threads() -> None:
    """And what PyTorch computes of the caches."""
    draw = torch.Generator().manual_seed(0)
    caches = [torch.randn(1, 4, 3000, 32, generator=draw) for _ in range(2)]
    q, k, v = (torch.randn(1, 4, 32, generator=draw) for _ in range(3))
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            given = {"keys": caches[0], "values": caches[1], "length": torch.tensor([[2500]])}
            found.append(softmax_step_cpu(q, k, v, frequencies=torch.zeros(16), **given))  # no rotation
        finally:
            torch.set_num_threads(before)
    assert found[0] is not None
    assert torch.equal(found[0], found[1])
    keys, values = (cache[:, :, :2501] for cache in caches)
    assert torch.equal(keys[:, :, -1], k)
    want = torch.nn.functional.scaled_dot_product_attention(q.unsqueeze(2), keys, values).squeeze(2)
    torch.testing.assert_close(found[0], want)
