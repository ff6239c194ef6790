"""chunk_fwd.cu, the forward in one kernel, on the CPU: every bit is that of the kernels with workspaces."""

import shutil

import pytest
import torch

from lkda.ops import kda_attention, l2_normalized
from lkda.ops.kda.cuda import core, plan, variants
from tests.ops.cases import kda_inputs, relative
from tests.ops.emulation import emulated, kernels_on_the_cpu  # noqa: F401

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


def in_one_kernel(q, k, v, g, beta, state, scale, products=False):
    B, T, H, _ = v.shape
    kernel = variants.chunk_fwd(v.dtype, q.dtype, products)
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


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize(("T", "gate"), [(200, "slow"), (200, "fast"), (130, "resets"), (70, "zero"), (130, "mixed")])
def test_products_inside_leaves(T, gate):
    """They round other numbers than sums do. Their error is about the same."""
    inputs = kda_inputs(1, T, 2, D, D, gate=gate, dtype=torch.bfloat16)
    q, k, v, g, beta, state = inputs.values()
    got = in_one_kernel(q, k, v, g, beta, state, D**-0.5, products=True)
    sums = in_one_kernel(q, k, v, g, beta, state, D**-0.5)
    truth = kda_attention(*(x.double() for x in (q, k, v, g, beta)), initial_state=state.double(), backend="recurrent")
    for one, other, want in zip(got, sums, truth, strict=True):
        assert relative(one, want) < max(1.3 * relative(other, want), 1e-4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("with_state", [True, False])
def test_a_large_value_lowers_the_scale(with_state):
    """Products: the chunks before it have the bits that they have without it. Within a chunk all tokens have one scale."""
    inputs = kda_inputs(1, 200, 1, D, D, gate="slow", dtype=torch.bfloat16)
    q, k, v, g, beta, state = inputs.values()
    v[:, :64] *= 2.0**-20
    state = state * 2.0**-30 if with_state else None
    large = v.clone()
    large[:, 130] *= 2.0**30
    large[0, 130, 0, 5] = torch.inf
    before, _ = in_one_kernel(q, k, v, g, beta, state, D**-0.5, products=True)
    got = in_one_kernel(q, k, large, g, beta, state, D**-0.5, products=True)
    assert torch.equal(got[0][:, :128], before[:, :128])
    wide = (x.double() for x in (q, k, large, g, beta))
    truth = kda_attention(*wide, initial_state=None if state is None else state.double(), backend="recurrent")
    other = [column for column in range(D) if column != 5]  # the infinity is of this column
    for t in (range(64), range(64, 128), range(130, 200)):
        assert relative(got[0][:, t][..., other], truth[0][:, t][..., other]) < 6e-3
    assert relative(got[1][..., other], truth[1][..., other]) < 6e-3


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.usefixtures("kernels_on_the_cpu")
@pytest.mark.parametrize(
    ("T", "gate", "with_state"), [(200, "slow", True), pytest.param(130, "fast", False, marks=pytest.mark.slow)]
)
def test_the_op_in_one_kernel(T, gate, with_state, monkeypatch):
    """Against the recurrence in float64. The backward needs the workspaces, so with a gradient nothing changes."""
    monkeypatch.setattr(variants, "ONE_PASS", "sums")
    monkeypatch.setattr(plan, "architecture", lambda device: ARCH)
    monkeypatch.setattr(plan, "BLOCKS", 3)
    monkeypatch.setattr(plan, "optional_segment_count", lambda *sizes: 1)
    monkeypatch.setattr(plan, "segment_count", lambda *sizes: 1)
    plan._plan.cache_clear()
    launched = []
    launch = core.Plan.intra_chunk_fwd
    monkeypatch.setattr(core.Plan, "intra_chunk_fwd", lambda *given: (launched.append(1), launch(*given)))
    inputs = kda_inputs(1, T, 3, D, D, gate=gate, dtype=torch.bfloat16)
    inputs |= {name: (3 * inputs[name]).contiguous() for name in ("q", "k")}
    state = inputs.pop("initial_state")
    state = state if with_state else None
    got = core.kda_cuda(**inputs, scale=D**-0.5, initial_state=state, cu_seqlens=None, normalize=True)
    assert not launched
    wide = {name: x.double() for name, x in inputs.items()}
    wide |= {name: l2_normalized(wide[name], wide[name], backend="torch")[0] for name in ("q", "k")}
    state = None if state is None else state.double()
    want = kda_attention(**wide, scale=D**-0.5, initial_state=state, backend="recurrent")
    for one, other in zip(got, want, strict=True):
        assert relative(one, other) < 6e-3
    inputs["v"].requires_grad_()
    core.kda_cuda(**inputs, scale=D**-0.5, initial_state=None, cu_seqlens=None)
    assert launched
    plan._plan.cache_clear()


@pytest.mark.parametrize(
    ("blocks", "fills"), [(1, False), (87, False), (88, True), (128, True), (132, True), (140, False), (512, True)]
)
def test_how_many_blocks_fill_the_gpu(blocks, fills):
    assert plan.fills_in_one_pass(blocks) is fills
