"""chunk_fwd.cu, the forward in one kernel, on the CPU: every bit is that of the kernels with workspaces."""

import shutil

import pytest
import torch

from lkda.ops.kda.cuda import variants
from tests.ops.cases import kda_inputs, relative
from tests.ops.emulation import emulated
from tests.ops.rounded_reference import kda_truth  # noqa: F401

ARCH, D = "sm_90a", 64


def in_two_kernels(q, k, v, g, beta, state, scale):
    B, T, H, _ = v.shape
    dtype, layout = v.dtype, variants.layout_of(D, q.dtype)
    slots = B * -(-T // layout.chunk)
    workspaces = torch.full((slots * H * layout.workspace,), 255, dtype=torch.uint8)
    amax, o = torch.full((slots, H), torch.nan), torch.full_like(v, torch.nan)
    final = torch.full((B, H, D, D), torch.nan)
    intra = variants.IntraChunkFwd(D, dtype, ARCH, q.dtype)
    emulated(intra.kernel)(min(3, slots * H), intra.threads, q, k, g, beta, workspaces, None, slots * H, T, H, scale)
    emulated(variants.amax_kernel(D, dtype))(-(-slots * H // 8), 256, v, amax, None, slots * H, T, H)
    inter = variants.InterChunkKernel("inter_chunk_fwd", D, dtype, ARCH, "whole")
    results = (o, final, *(None,) * 6)
    emulated(inter.kernel)(
        B * H * inter.blocks, 32 * inter.warps, workspaces, v, amax, state, state, *results, None, B, T, H, 1, 0
    )
    return o, final


def in_one_kernel(q, k, v, g, beta, state, scale):
    B, T, H, _ = v.shape
    kernel = variants.chunk_fwd(v.dtype, q.dtype)
    o, final = torch.full_like(v, torch.nan), torch.full((B, H, D, D), torch.nan)
    emulated(kernel.kernel)(B * H, kernel.threads, q, k, v, g, beta, state, o, final, T, H, scale)
    return o, final


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("T", "gate", "dtype", "query", "with_state"),
    [
        (5, "slow", torch.bfloat16, torch.bfloat16, True),
        (300, "slow", torch.bfloat16, torch.float16, True),
        (300, "fast", torch.bfloat16, torch.bfloat16, False),
        (256, "resets", torch.float16, torch.float16, True),
        (130, "zero", torch.bfloat16, torch.bfloat16, False),
    ],
)
def test_equal_to_the_kernels_with_workspaces(T, gate, dtype, query, with_state):
    inputs = kda_inputs(2, T, 2, D, D, gate=gate, dtype=dtype)
    q, k, v, g, beta, state = inputs.values()
    given = (q.to(query), k.to(query), v, g, beta, state if with_state else None, D**-0.5)
    for got, want in zip(in_one_kernel(*given), in_two_kernels(*given), strict=True):
        assert torch.isfinite(want.float()).all()
        assert torch.equal(got, want), relative(got, want)
