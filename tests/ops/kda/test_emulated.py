"""The KDA kernels' source, run on the CPU, against float64: arithmetic and indices without a GPU."""

import shutil

import pytest
import torch

from lkda.ops import kda_attention, l2_normalized
from lkda.ops.kda.cuda import core as cuda
from lkda.ops.kda.cuda import plan as cuda_plan
from lkda.ops.kda.cuda import variants as cuda_kernels
from tests.ops.cases import kda_inputs, relative, small_kda_inputs
from tests.ops.emulation import emulated, kernels_on_the_cpu  # noqa: F401
from tests.ops.rounded_reference import kda_truth, outputs_and_gradients

ARCH = "sm_90a"


ALLOWED = {torch.bfloat16: 6e-3, torch.float16: 6e-3, torch.float32: 8e-4}  # about twice what the GPU shows


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("dtype", "gate", "segments", "D", "warpgroups"),
    [
        (torch.bfloat16, "slow", 1, 32, False),
        (torch.bfloat16, "resets", 1, 32, False),
        (torch.float32, "slow", 1, 32, False),
        (torch.bfloat16, "slow", 4, 32, False),
        pytest.param(torch.float16, "slow", 1, 64, True, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, "resets", 4, 64, True, marks=pytest.mark.long),
        pytest.param(torch.bfloat16, "fast", 1, 128, True, marks=pytest.mark.slow),
        pytest.param(torch.float16, "resets", 4, 128, True, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, "resets", 1, 128, False, marks=pytest.mark.long),
    ],
)
def test_forward_and_backward(dtype, gate, segments, D, warpgroups, monkeypatch):
    """With segments, of two chunks each, the last one shorter and one empty."""
    monkeypatch.setattr(cuda_kernels, "WARPGROUPS", warpgroups)
    B, T, H = 1, 70 if segments == 1 else 300, max(1, 64 // D)
    inputs = kda_inputs(B, T, H, D, D, gate=gate, dtype=dtype)
    q, k, v, g, beta, state = inputs.values()
    layout, scale = cuda_kernels.Layout(D, dtype), D**-0.5
    slots = B * -(-T // layout.chunk)
    generator = torch.Generator().manual_seed(1)  # as `outputs_and_gradients` draws them
    grad_o, grad_state = torch.randn(v.shape, generator=generator), torch.randn(state.shape, generator=generator)
    grad_o = grad_o.to(dtype)

    def unwritten(*shape, dtype=torch.float32):
        return torch.full(shape, torch.nan, dtype=dtype)

    operand = torch.float32 if dtype == torch.float32 else torch.float16
    workspaces = torch.full((slots * H * layout.workspace,), 255, dtype=torch.uint8)
    states, d_states = (torch.full((slots, H, layout.saved_state), 255, dtype=torch.uint8) for _ in range(2))
    v_tilde, d_residual = (unwritten(slots, H, D, layout.chunk, dtype=operand) for _ in range(2))
    got = {"o": unwritten(*v.shape, dtype=dtype), "final_state": unwritten(*state.shape)}
    got |= {f"d{name}": unwritten(*x.shape, dtype=x.dtype) for name, x in inputs.items()}
    beta_parts = unwritten(slots, H, D // 16, layout.chunk)
    forgotten = torch.empty(B, H, segments, dtype=torch.int32)
    amax, d_amax, v_scales, do_scales = unwritten(slots, H), unwritten(slots, H), unwritten(B, H), unwritten(B, H)

    def inter_chunk(name, part, *tensors):
        launch = cuda_kernels.InterChunkKernel(name, D, dtype, ARCH, part)
        run = emulated(launch.kernel)
        run(B * segments * H * launch.blocks, 32 * launch.warps, *tensors, None, B, T, H, segments, 0)

    def entries(matrices, offsets, start, backward):
        found = unwritten(*offsets.shape)
        run(B * H * (D // 8), 2 * D, matrices, offsets, start, found, forgotten, segments, H, int(backward))
        return found

    intra_chunk = cuda_kernels.IntraChunkFwd(D, dtype, ARCH if warpgroups else "sm_80")  # with helper warps, without
    launch, where = (min(3, slots * H), intra_chunk.threads), (None, slots * H, T, H)
    if intra_chunk.helpers:
        found = unwritten(slots, H)
        emulated(intra_chunk.kernel)(*launch, q, k, v, g, beta, workspaces, found, *where, scale)
    else:
        emulated(intra_chunk.kernel)(*launch, q, k, g, beta, workspaces, *where, scale)
    if dtype.itemsize == 2:
        find_amax = emulated(cuda_kernels.amax_kernel(D, dtype))
        find_amax(-(-slots * H // 8), 256, v, amax, None, slots * H, T, H)
        assert not intra_chunk.helpers or torch.equal(found, amax)
        find_amax(-(-slots * H // 8), 256, grad_o, d_amax, None, slots * H, T, H)
    entering, leaving = state, grad_state
    if segments > 1:
        offsets, d_offsets, transposed, transitions = (unwritten(B * segments, H, D, D) for _ in range(4))
        run = emulated(cuda_kernels.segments_kernel(D, ARCH))
        ends = (offsets, None, None, None, transposed, transitions, forgotten)
        inter_chunk("inter_chunk_fwd", "summary", workspaces, v, amax, state, None, None, *ends)
        entering = entries(transposed, offsets, state, backward=False)
        ends = (d_offsets, None, None, None, None, forgotten)
        inter_chunk("inter_chunk_bwd", "summary", workspaces, None, grad_o, d_amax, grad_state, None, *ends)
        leaving = entries(transitions, d_offsets, grad_state, backward=True)
    results = (got["o"], got["final_state"])
    inter_chunk(
        "inter_chunk_fwd",
        "whole",
        workspaces,
        v,
        amax,
        state,
        entering,
        *results,
        states,
        v_tilde,
        v_scales,
        None,
        None,
        None,
    )
    saved = (got["dinitial_state"], d_states, d_residual, do_scales, beta_parts, None)
    inter_chunk("inter_chunk_bwd", "whole", workspaces, v, grad_o, d_amax, grad_state, leaving, *saved)
    intra_chunk_bwd = cuda_kernels.intra_chunk_bwd(D, dtype, ARCH)
    blocks = 1 if intra_chunk_bwd.persistent else slots * H
    passed = (states, v_tilde, d_states, d_residual, beta_parts, v_scales, do_scales)
    given = (q, k, g, beta, grad_o, *passed, state, grad_state)
    results = [got[name] for name in ("dq", "dk", "dv", "dg", "dbeta")]
    emulated(intra_chunk_bwd.kernel)(blocks, layout.threads, *given, *results, None, slots * H, T, H, scale)

    for name, want in kda_truth(inputs).items():
        assert relative(got[name], want) < ALLOWED[dtype], name


def unwritten_gradients(rows, H, D, dtype):
    shape = (1, rows, H, D)
    gradients = [torch.full(shape, torch.nan, dtype=of) for of in (dtype, dtype, dtype, torch.float32)]
    return [*gradients, torch.full(shape[:3], torch.nan)]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("query", [torch.bfloat16, torch.float16])
def test_a_persistent_block_goes_from_chunk_to_chunk(query):
    """Packed sequences with short last chunks, and places without a chunk between them and at the end: the bits do not
    depend on how many chunks a block works on."""
    D, H, dtype = 128, 2, torch.bfloat16
    layout, kernel = cuda_kernels.layout_of(D, dtype), cuda_kernels.intra_chunk_bwd(D, dtype, ARCH, query)
    assert kernel.persistent
    spans = [(0, 0, 5, 3), (0, 0, 0, 0), (1, 5, 64, 3), (2, 69, 64, 1), (2, 133, 64, 0), (2, 197, 9, 2), (0, 0, 0, 0)]
    rows, slots, sequences = 206, len(spans), 3
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator).to(dtype)

    def drawn_states():
        states = torch.zeros(slots, H, layout.saved_state, dtype=torch.uint8)
        states[..., : 2 * D * D] = drawn(slots, H, D * D, dtype=torch.float16).view(torch.uint8)
        exponents = torch.randint(-20, 3, (slots, H, D // 16, 1), generator=generator)
        scales = torch.exp2(exponents.float()).expand(-1, -1, -1, 512 // D).reshape(slots, H, -1)
        states[..., 2 * D * D :] = scales.contiguous().view(torch.uint8)
        return states

    inputs = [drawn(1, rows, H, D, dtype=query) for _ in "qk"]
    gates = -torch.rand(1, rows, H, D, generator=generator) * torch.logspace(-3, 0, D)
    inputs += [gates, torch.rand(1, rows, H, generator=generator), drawn(1, rows, H, D, dtype=dtype)]
    v_tilde, d_residual = (drawn(slots, H, D, 64, dtype=torch.float16) for _ in range(2))
    inputs += [drawn_states(), v_tilde, drawn_states(), d_residual, drawn(slots, H, D // 16, 64)]
    inputs += [torch.full((sequences, H), x) for x in (0.5, 4.0)]
    inputs += [drawn(sequences, H, D, D) for _ in range(2)]
    where = (torch.tensor(spans, dtype=torch.int32), slots * H, rows, H, D**-0.5)
    found = []
    for blocks in (slots * H, 3, 1):
        found.append(unwritten_gradients(rows, H, D, dtype))
        emulated(kernel.kernel)(blocks, layout.threads, *inputs, *found[-1], *where)
    for several, one in zip(found[1] + found[2], found[0] + found[0], strict=True):
        assert one.isfinite().all()
        assert torch.equal(several, one)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.usefixtures("kernels_on_the_cpu")
@pytest.mark.parametrize(
    ("T", "D", "packed", "state", "segments", "normalize"),
    [
        pytest.param(70, 32, False, True, 1, False, marks=pytest.mark.long),
        (70, 32, True, True, 1, True),
        (70, 32, False, False, 1, True),
        pytest.param(300, 32, False, True, 4, False, marks=pytest.mark.slow),
        pytest.param(70, 128, False, True, 1, False, marks=pytest.mark.long),
        pytest.param(70, 128, True, True, 1, True, marks=pytest.mark.long),
    ],
)
def test_the_op_around_the_kernels(T, D, packed, state, segments, normalize, monkeypatch):
    """Forward, what is saved, backward: the launches and their arguments as a GPU would get them."""
    monkeypatch.setattr(cuda_plan, "architecture", lambda device: ARCH)
    monkeypatch.setattr(cuda_plan, "segment_count", lambda *sizes: segments)
    inputs, options = small_kda_inputs(T, D, packed=packed, state=state)
    if normalize:
        inputs |= {name: (3 * inputs[name]).contiguous() for name in ("q", "k")}

    def op(*, initial_state=None, cu_seqlens=None, **given):
        return cuda.kda_cuda(
            **given, scale=D**-0.5, initial_state=initial_state, cu_seqlens=cu_seqlens, normalize=normalize
        )

    def reference(q, k, **given):
        q, k = l2_normalized(q, k, backend="torch") if normalize else (q, k)
        return kda_attention(q, k, **given, backend="recurrent")

    got = outputs_and_gradients(op, inputs, **options)
    truth = outputs_and_gradients(reference, {name: x.double() for name, x in inputs.items()}, **options)
    for name, want in truth.items():
        assert relative(got[name], want) < ALLOWED[torch.bfloat16], name
