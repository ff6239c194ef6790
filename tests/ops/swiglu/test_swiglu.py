"""SwiGLU of two halves: the kernel's source on the CPU, and the kernel on a GPU, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lkda.ops.swiglu import cuda
from lkda.ops.swiglu.op import swiglu
from tests.ops.emulation import kernels_on_the_cpu  # noqa: F401

# Relative, of a result rounded once.
ERROR = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernel is emulated, not run")


def drawn(B, hidden, dtype, device="cpu"):
    x = torch.randn(B, 2 * hidden, generator=torch.Generator().manual_seed(0)) * 3
    return x.to(device, dtype)


def exact(x):
    gate, up = x.double().cpu().chunk(2, -1)
    return F.silu(gate) * up


def relative(got, want):
    return float((got.double().cpu() - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
@pytest.mark.parametrize(("B", "hidden"), [(1, 8), (3, 520), (9, 1024)])
def test_kernel_against_float64(kernels_on_the_cpu, dtype, B, hidden):  # noqa: F811
    x = drawn(B, hidden, dtype)
    y = cuda.swiglu_cuda(x)
    assert y.dtype == dtype
    assert y.shape == (B, hidden)
    assert relative(y, exact(x)) < ERROR[dtype]


def test_rows_of_other_layouts(kernels_on_the_cpu):  # noqa: F811
    x = drawn(4, 64, torch.bfloat16)
    want = cuda.swiglu_cuda(x)
    parts = F.pad(x, (8, 8))[:, 8:-8]  # parts of longer rows, read where they are
    for layout in (parts, F.pad(x, (1, 2))[:, 1:-2], x.t().contiguous().t()):
        assert not layout.is_contiguous()
        assert torch.equal(cuda.swiglu_cuda(layout), want)


def test_no_rows_give_no_rows(kernels_on_the_cpu):  # noqa: F811
    assert cuda.swiglu_cuda(drawn(0, 64, torch.bfloat16)).shape == (0, 64)


def test_the_ends_of_the_range(kernels_on_the_cpu):  # noqa: F811
    gate = torch.tensor([-1e4, -90.0, 0.0, 90.0, 1e4, float("nan"), 1.0, 1.0])
    x = torch.cat([gate, torch.ones(8)]).unsqueeze(0)
    got = cuda.swiglu_cuda(x)
    torch.testing.assert_close(got, swiglu(x, backend="torch"), equal_nan=True, rtol=1e-5, atol=1e-30)


def test_pytorch_against_float64():
    x = drawn(5, 7, torch.float64)
    torch.testing.assert_close(swiglu(x), exact(x))


@pytest.mark.parametrize("x", [torch.zeros(2, 3, 4), torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.int32)], ids=str)
def test_bad_input(x):
    with pytest.raises(ValueError, match=r"swiglu: x must be \[B, 2 \* hidden\] in floating point"):
        swiglu(x)


def test_it_has_a_gradient_in_pytorch():
    x = drawn(2, 3, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(swiglu, (x,))


@gpu
@needs_gpu
class TestOnAGPU:
    @pytest.mark.parametrize("dtype", list(ERROR), ids=str)
    @pytest.mark.parametrize(("B", "hidden"), [(1, 1376), (9, 1376), (257, 2752), (1024, 5504)])
    def test_against_float64(self, dtype, B, hidden):
        x = drawn(B, hidden, dtype, "cuda")
        assert relative(swiglu(x, backend="cuda"), exact(x)) < ERROR[dtype]

    def test_what_the_kernel_cannot_do_is_done_in_pytorch_or_refused_by_name(self):
        x = drawn(3, 12, torch.bfloat16, "cuda")
        with pytest.raises(ValueError, match=r"halves of a multiple of 8 in torch\.bfloat16, got 12"):
            swiglu(x, backend="cuda")
        assert relative(swiglu(x), exact(x)) < 2 * ERROR[torch.bfloat16]
        x = drawn(3, 16, torch.bfloat16, "cuda").requires_grad_()
        with pytest.raises(ValueError, match="has no backward"):
            swiglu(x, backend="cuda")
        swiglu(x).sum().backward()
        assert x.grad.isfinite().all()

    def test_it_is_one_launch_and_waits_for_the_one_before(self):
        from lkda.bench.timing import launches

        x, weight = drawn(64, 256, torch.bfloat16, "cuda"), drawn(512, 128, torch.bfloat16, "cuda") / 400
        bias = drawn(1, 256, torch.bfloat16, "cuda")[0]  # so that the numbers neither vanish nor overflow
        assert launches(lambda: swiglu(x)) == 1

        def chain():
            y = x
            for _ in range(8):
                y = F.linear(swiglu(y), weight, bias)
            return y

        want = chain()
        assert want.isfinite().all()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = chain()
        for _ in range(3):
            graph.replay()
            assert torch.equal(got, want)
