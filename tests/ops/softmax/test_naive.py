"""The naive kernel of softmax attention against float64: emulated on the CPU, compiled, and on a GPU."""

from __future__ import annotations

import shutil

import pytest
import torch

from lkda.ops import softmax_attention
from lkda.ops.runtime import jit
from lkda.ops.runtime.kernel_inputs import ELEMENTS, HEAD_DIMS
from lkda.ops.softmax.cuda.naive import naive_kernel, softmax_cuda_naive
from tests.ops.cases import poisoned, relative
from tests.ops.emulation import kernels_on_the_cpu  # noqa: F401

# Rounding o to its dtype gives relative errors of up to 2^-9 in bfloat16 and 2^-12 in float16; sums are float32.
ERROR = {torch.float32: 2e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}
PACKED = [0, 0, 1, 4, 4, 20, 37, 37]
emulated = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler"),
    pytest.mark.usefixtures("kernels_on_the_cpu"),
]
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernel is emulated"),
]


def drawn(B, T, S, H, D, dtype, *, size=1.0, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, T, H, D), (B, S, H, D), (B, S, H, D))
    return [(size * torch.randn(shape, generator=generator)).to(dtype).to(device) for shape in shapes]


def by_kernel(q, k, v, *, scale=None, cu_seqlens=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return softmax_cuda_naive(q, k, v, scale, cu_seqlens, None)


def by_function(q, k, v, *, scale=None, cu_seqlens=None):
    return softmax_attention(q, k, v, scale=scale, cu_seqlens=cu_seqlens, backend="cuda_naive")


def check(run, x, **options):
    with poisoned():
        got = run(*x, **options)
    want = softmax_attention(*(y.double() for y in x), **options, backend="naive")
    assert got.dtype == x[0].dtype
    assert relative(got, want) < ERROR[x[0].dtype]


class TestEmulated:
    pytestmark = emulated

    @pytest.mark.parametrize(
        ("dtype", "D"), [(torch.float32, 32), (torch.float16, 64), (torch.bfloat16, 64), (torch.bfloat16, 128)]
    )
    def test_every_head_size_and_dtype(self, dtype, D):
        check(by_kernel, drawn(2, 11, 11, 3, D, dtype))

    @pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 40), (7, 40), (65, 65)])
    def test_queries_are_the_last_positions(self, T, S):
        check(by_kernel, drawn(1, T, S, 2, 32, torch.float32))

    def test_packed_sequences_with_empty_ones(self):
        x = drawn(1, PACKED[-1], PACKED[-1], 2, 32, torch.float32)
        check(by_kernel, x, cu_seqlens=torch.tensor(PACKED))

    @pytest.mark.parametrize(("size", "scale"), [(30.0, None), (1.0, -0.7), (0.0, None)])
    def test_large_scores_and_another_scale(self, size, scale):
        q, k, v = drawn(1, 33, 33, 1, 32, torch.float32, size=size)
        check(by_kernel, (q, k, v if size else v + 1), scale=scale)

    def test_strided_inputs(self):
        wide = torch.cat(drawn(2, 9, 9, 2, 32, torch.float32), -1)
        check(by_kernel, wide.split(32, -1))

    def test_a_number_that_is_none_reaches_those_that_see_it(self):
        q, k, v = drawn(1, 8, 8, 1, 32, torch.float32)
        k[0, 5] = torch.nan
        assert by_kernel(q, k, v).isnan().all(-1).flatten().tolist() == [False] * 5 + [True] * 3


@pytest.mark.skipif(jit._reason_no_compiler() is not None, reason=str(jit._reason_no_compiler()))
@pytest.mark.parametrize("arch", ["sm_80", "sm_120"])
def test_it_compiles_without_spills_and_with_under_a_kib_of_shared_memory(arch):
    kernel = naive_kernel(64, torch.bfloat16)
    used = kernel.module.binary(arch).resources()[kernel.entry]
    assert used.spill_bytes == 0
    assert kernel.shared_bytes + used.static_shared_bytes < 1024
    assert b".mma" not in kernel.module.source.read_bytes()


class TestRefusals:
    def test_a_cpu(self):
        with pytest.raises(
            ValueError, match=r"cuda_naive.*on cpu, not on a CUDA device; use backend='auto' or backend='naive'"
        ):
            by_function(*drawn(1, 4, 4, 1, 32, torch.float32))

    def test_a_gradient(self):
        q, k, v = drawn(1, 4, 4, 1, 32, torch.float32)
        with pytest.raises(ValueError, match="has no backward and an input requires a gradient; use backend='sdpa'"):
            by_kernel(q.requires_grad_(), k, v)

    def test_values_of_another_size(self):
        q, k, v = drawn(1, 4, 4, 1, 64, torch.float32)
        with pytest.raises(ValueError, match="K and V must be equal, got K = 64 and V = 32; use backend='sdpa'"):
            by_kernel(q, k, v[..., :32])

    def test_auto_never_takes_it(self):
        from lkda.ops.softmax.op import BACKENDS

        assert not BACKENDS["cuda_naive"].automatic


class TestOnAGPU:
    pytestmark = gpu

    @pytest.mark.parametrize("D", HEAD_DIMS)
    @pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
    @pytest.mark.parametrize("T", [1, 7, 8, 9, 64, 1000])
    def test_against_float64(self, T, dtype, D):
        check(by_function, drawn(2, T, T, 3, D, dtype, device="cuda"))

    def test_late_queries_and_packed_sequences(self):
        check(by_function, drawn(2, 5, 300, 3, 64, torch.bfloat16, device="cuda"))
        bounds = torch.tensor([0, 0, 1, 300, 301, 700, 700], device="cuda")
        check(by_function, drawn(1, 700, 700, 2, 64, torch.float32, device="cuda"), cu_seqlens=bounds)

    def test_it_is_a_custom_op(self):
        q, k, v = drawn(1, 20, 20, 2, 32, torch.float32, device="cuda")
        arguments = (q, k, v, torch.tensor([0, 7, 20], dtype=torch.int32, device="cuda"), 0.2)
        torch.library.opcheck(torch.ops.lkda.softmax_naive, arguments)
        compiled = torch.compile(by_function, fullgraph=True)
        assert torch.equal(compiled(q, k, v), by_function(q, k, v))
