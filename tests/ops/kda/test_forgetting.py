"""Chunks that forget the state that enters them: which chunks do, and that no bit of a result depends on using it."""

from __future__ import annotations

import shutil

import pytest
import torch

from lkda.ops import kda_attention
from lkda.ops.kda.cuda import core as cuda
from lkda.ops.kda.cuda import plan as cuda_plan
from lkda.ops.kda.cuda import variants as cuda_kernels
from tests.ops.cases import kda_inputs, poisoned
from tests.ops.emulation import emulated, kernels_on_the_cpu  # noqa: F401
from tests.ops.rounded_reference import outputs_and_gradients

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
ARCH = "sm_90a"
KILLED = -1e4


def forgets_of(g):
    """Which chunks of one head forget, by the kernels run on the CPU with a segment per chunk, for keys with no number
    near zero."""
    T, D, dtype = *g.shape[1:4:2], torch.bfloat16
    layout = cuda_kernels.Layout(D, dtype)
    chunks = -(-T // layout.chunk)
    segments = chunks + 1  # the last one is empty: nothing asks about it
    inputs = kda_inputs(1, T, 1, D, D, dtype=dtype)
    k = torch.nn.functional.normalize(inputs["k"].float().sign() + inputs["k"].float(), dim=-1).to(dtype)
    workspaces = torch.full((chunks * layout.workspace,), 255, dtype=torch.uint8)
    intra_chunk_fwd = emulated(cuda_kernels.intra_chunk_fwd_kernel(D, dtype, ARCH))
    intra_chunk_fwd(2, layout.threads, inputs["q"], k, g, inputs["beta"], workspaces, None, chunks, T, 1, 1.0)
    summary = cuda_kernels.InterChunkKernel("inter_chunk_fwd", D, dtype, ARCH, "summary")
    offsets, transposed = (torch.full((segments, D, D), torch.nan) for _ in range(2))
    forgotten, amax = torch.full((segments,), -1, dtype=torch.int32), torch.ones(chunks)
    outputs = (offsets, None, None, None, transposed, None, forgotten)
    run = emulated(summary.kernel)
    run(
        segments * summary.blocks,
        32 * summary.warps,
        workspaces,
        inputs["v"],
        amax,
        None,
        None,
        None,
        *outputs,
        None,
        1,
        T,
        1,
        segments,
        0,
    )
    for forgets, matrix in zip(forgotten[:-1], transposed):
        assert matrix.isfinite().all() if forgets == 0 else not matrix.nan_to_num().any()  # 0, or not written
    return forgotten[:-1].tolist()


@needs_compiler
class TestWhichChunks:
    def test_those_of_fast_gates_and_none_of_slow_ones(self):
        gates = {gate: kda_inputs(1, 200, 1, 32, 32, gate=gate, dtype=torch.bfloat16)["g"] for gate in ("fast", "slow")}
        assert forgets_of(gates["fast"]) == [1, 1, 1, 0]  # the last one has eight tokens
        assert forgets_of(gates["slow"]) == [0, 0, 0, 0]

    def test_one_channel_that_lives_is_enough(self):
        g = torch.full((1, 64, 1, 32), -60.0)
        g[..., 17] = -0.01
        assert forgets_of(g) == [0]

    def test_a_state_that_a_token_carries_from_one_channel_to_another(self):
        """exp(G_C) is 0 in every channel. Tokens 20 to 31 read channel 0 and write channel 1, which lives on."""
        g = torch.full((1, 64, 1, 32), -60.0)
        g[..., :2] = 0
        g[0, 32, 0, 0] = g[0, 19, 0, 1] = KILLED
        assert forgets_of(g) == [0]
        g[0, 8, 0, :2] = KILLED  # now no token that reads the state writes what lives on
        assert forgets_of(g) == [1]

    def test_a_state_that_one_token_hands_to_another(self):
        """Tokens before 16 read channel 0, tokens from 48 on write channel 1, and keys of both agree in channel 2."""
        g = torch.full((1, 64, 1, 32), -60.0)
        g[0, :16, 0, 0] = g[0, 48:, 0, 1] = g[0, 10:52, 0, 2] = 0
        assert forgets_of(g) == [0]
        g[0, 30, 0, 2] = KILLED  # now no channel links the two
        assert forgets_of(g) == [1]


def varied(B, T, H, D, *, dtype=torch.bfloat16):
    """Heads whose chunks all forget, heads with stretches of slow gates, and heads whose chunks all remember."""
    inputs = kda_inputs(B, T, H, D, D, gate="fast", dtype=dtype)
    slow = kda_inputs(B, T, H, D, D, gate="slow", dtype=dtype)["g"]
    kind = torch.arange(H) % 4
    inputs["g"][:, T // 3 : T // 2, kind == 1] = slow[:, T // 3 : T // 2, kind == 1]
    inputs["g"][:, :, kind == 2] = slow[:, :, kind == 2]
    inputs["g"][:, 5 * T // 8 :, kind == 3] = slow[:, 5 * T // 8 :, kind == 3]
    inputs["v"][:, :, 1::2] *= 1e-3  # small beside the state that enters
    inputs["initial_state"] *= 100
    return inputs


def with_and_without(inputs, monkeypatch, **options):
    """Results and gradients where forgetting is used, and where it is not; and the part of the chunks without decay.

    It is not used where an exp(G_C) is -0, which exp never is. A state times -0 is a zero too.
    """
    launch, parts = cuda.launch_intra_chunk_fwd, []

    def op(*, initial_state, cu_seqlens=None, **given):
        if given["q"].is_cuda:
            return kda_attention(**given, initial_state=initial_state, cu_seqlens=cu_seqlens, backend="cuda")
        scale = given["q"].shape[-1] ** -0.5
        return cuda.kda_cuda(**given, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens)

    def run(remembers):
        def launched(q, k, v, g, beta, plan, spans, scale):
            workspaces = launch(q, k, v, g, beta, plan, spans, scale)
            D, layout = q.shape[-1], cuda_kernels.Layout(q.shape[-1], inputs["q"].dtype)
            start = 3 * layout.chunk * D * layout.operand + layout.chunk**2 * layout.operand
            each = workspaces[: plan.items * layout.workspace].view(plan.items, layout.workspace)
            decay = each[:, start : start + 4 * D].contiguous().view(torch.float32)
            if remembers:
                decay[:, 0] = torch.where(decay[:, 0] == 0, -0.0, decay[:, 0])
                each[:, start : start + 4 * D] = decay.view(torch.uint8)
            parts.append((decay == 0).all(1).float().mean().item())
            return workspaces

        monkeypatch.setattr(cuda, "launch_intra_chunk_fwd", launched)
        with poisoned():
            return outputs_and_gradients(op, inputs, **options)

    return run(remembers=False), run(remembers=True), parts[0]


@needs_compiler
@pytest.mark.usefixtures("kernels_on_the_cpu")
@pytest.mark.slow
@pytest.mark.parametrize(("optional", "packed"), [(False, False), (True, False), (True, True)])
def test_no_bit_depends_on_it(optional, packed, monkeypatch):
    """With three segments, of which some forget; that optional ones change no bit; and that packed sequences may be
    empty or of one chunk."""
    monkeypatch.setattr(cuda_plan, "architecture", lambda device: ARCH)
    monkeypatch.setattr(cuda_plan, "segment_count", lambda *sizes: 1 if optional else 3)
    monkeypatch.setattr(cuda_plan, "optional_segment_count", lambda *sizes: 3)
    inputs, options = varied(1, 200, 2, 32), {}
    if packed:
        options["cu_seqlens"] = torch.tensor([0, 0, 20, 200], dtype=torch.int32)
        inputs["initial_state"] = inputs["initial_state"].repeat(3, 1, 1, 1)
    with_it, without, part = with_and_without(inputs, monkeypatch, **options)
    # 5 of 8 chunks forget all. Packed, there is room for 12, because three sequences may have two more chunks per head.
    assert part == pytest.approx(5 / 12 if packed else 5 / 8)
    for name, x in without.items():
        assert torch.equal(with_it[name], x), name
    if optional and not packed:
        monkeypatch.setattr(cuda_plan, "optional_segment_count", lambda *sizes: 1)
        uncut, _, _ = with_and_without(inputs, monkeypatch, **options)
        for name, x in uncut.items():
            assert torch.equal(with_it[name], x), name


@pytest.mark.gpu
@needs_gpu
class TestOnTheGPU:
    @pytest.mark.parametrize("D", [32, 64, 128])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("optional", [False, True])
    def test_no_bit_depends_on_it(self, optional, packed, dtype, D, monkeypatch):
        T, segments = 2048, 1 if optional else 8
        monkeypatch.setattr(cuda_plan, "segment_count", lambda *sizes: segments)
        inputs, options = {name: x.cuda() for name, x in varied(1, T, 8, D, dtype=dtype).items()}, {}
        if packed:
            options["cu_seqlens"] = torch.tensor([0, 0, 700, 711, T], device="cuda")
            inputs["initial_state"] = inputs["initial_state"].repeat(4, 1, 1, 1)
        with_it, without, part = with_and_without(inputs, monkeypatch, **options)
        assert part < 0.9
        assert dtype == torch.float32 or part > 0.3  # in float32 a chunk has half as many tokens
        for name, x in without.items():
            assert torch.equal(with_it[name], x), name
        if optional:
            monkeypatch.setattr(cuda_plan, "optional_segment_count", lambda *sizes: 1)
            uncut, _, _ = with_and_without(inputs, monkeypatch, **options)
            for name, x in uncut.items():
                assert torch.equal(with_it[name], x), name
