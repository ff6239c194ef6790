"""SwiGLU of two halves: the kernel's source on the CPU, and the kernel on a GPU, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lkda.ops.swiglu import cuda
from lkda.ops.swiglu.linear import swiglu_linear
from lkda.ops.swiglu.op import swiglu
from tests.ops.cases import relative
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


def upper(B, hidden, dtype, device="cpu"):
    """The gradient of a result."""
    return torch.randn(B, hidden, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def exact_gradient(x, dy):
    leaf = x.double().cpu().requires_grad_()
    (dx,) = torch.autograd.grad(exact(leaf), leaf, dy.double().cpu())
    return dx


@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
@pytest.mark.parametrize(("B", "hidden"), [(1, 8), (3, 520), (9, 1024)])
def test_backward_against_float64(kernels_on_the_cpu, dtype, B, hidden):  # noqa: F811
    x, dy = drawn(B, hidden, dtype), upper(B, hidden, dtype)
    dx, y = cuda.launch_backward(dy, x)
    assert relative(dx, exact_gradient(x, dy)) < ERROR[dtype]
    assert torch.equal(y, cuda.swiglu_cuda(x))


def test_backward_of_other_layouts(kernels_on_the_cpu):  # noqa: F811
    x, dy = drawn(4, 64, torch.bfloat16), upper(4, 64, torch.bfloat16)
    want = cuda.launch_backward(dy, x)
    parts = F.pad(x, (8, 8))[:, 8:-8]
    for got in (
        cuda.launch_backward(dy, parts),
        cuda.launch_backward(dy.t().contiguous().t(), F.pad(x, (1, 2))[:, 1:-2]),
    ):
        assert all(map(torch.equal, got, want))
    assert [y.shape for y in cuda.launch_backward(dy[:0], x[:0])] == [(0, 128), (0, 64)]


def test_backward_at_the_ends_of_the_range(kernels_on_the_cpu):  # noqa: F811
    gate = torch.tensor([-1e4, -90.0, -1.0, 0.0, 1.0, 90.0, 1e4, 3.0])
    x, dy = torch.cat([gate, torch.full((8,), 2.0)]).unsqueeze(0), torch.ones(1, 8)
    dx, _ = cuda.launch_backward(dy, x)
    torch.testing.assert_close(dx.double(), exact_gradient(x, dy), rtol=1e-5, atol=1e-30)


def test_linear_in_pytorch():
    x, weight = drawn(3, 6, torch.float64).requires_grad_(), drawn(4, 3, torch.float64).requires_grad_()
    torch.testing.assert_close(swiglu_linear(x, weight), exact(x) @ weight.T)
    assert torch.autograd.gradcheck(swiglu_linear, (x, weight))


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(2, 6), torch.zeros(4, 2), r"x must be \[..., 2 \* hidden\].*got \[2, 6\] and \[4, 2\]"),
        (torch.zeros(2, 4), torch.zeros(4, 2).double(), "one dtype, got torch.float32 and torch.float64"),
    ],
)
def test_bad_input_of_linear(x, weight, message):
    with pytest.raises(ValueError, match=message):
        swiglu_linear(x, weight)


@gpu
@needs_gpu
class TestLinearOnAGPU:
    """The result and its gradients, in the forms in which training calls it."""

    SHAPES = pytest.mark.parametrize(("B", "hidden", "outputs"), [(3, 64, 16), (257, 1376, 512), (2048, 2752, 1024)])

    def inputs(self, B, hidden, outputs, dtype):
        x = drawn(B, hidden, dtype, "cuda").requires_grad_()
        weight = (upper(outputs, hidden, dtype, "cuda") / hidden**0.5).requires_grad_()
        return x, weight, upper(B, outputs, dtype, "cuda")

    def measured(self, function, x, weight, dy):
        y = function(x, weight)
        return (y.detach(), *torch.autograd.grad(y, (x, weight), dy))

    @SHAPES
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_errs_no_more_than_pytorch(self, B, hidden, outputs, dtype):
        x, weight, dy = self.inputs(B, hidden, outputs, dtype)
        doubles = [t.detach().double().cpu().requires_grad_() for t in (x, weight)]
        want = self.measured(lambda x, w: exact(x) @ w.T, *doubles, dy.double().cpu())
        got = self.measured(lambda x, w: swiglu_linear(x, w, backend="cuda"), x, weight, dy)
        theirs = self.measured(lambda x, w: swiglu_linear(x, w, backend="torch"), x, weight, dy)
        for a, b, c in zip(got, theirs, want, strict=True):
            assert a.dtype == dtype
            assert relative(a, c) < 1.2 * relative(b, c) + 1e-6

    def test_float32_and_three_dimensions(self):
        x, weight, dy = self.inputs(96, 64, 16, torch.float32)
        doubles = [t.detach().double().cpu().requires_grad_() for t in (x, weight)]
        want = self.measured(lambda x, w: exact(x) @ w.T, *doubles, dy.double().cpu())
        rows = self.measured(lambda x, w: swiglu_linear(x.view(2, 48, -1), w).flatten(0, 1), x, weight, dy)
        for a, c in zip(rows, want, strict=True):
            assert relative(a, c) < 1e-5

    def test_opcheck(self):
        x, weight, dy = self.inputs(8, 32, 16, torch.bfloat16)
        torch.library.opcheck(torch.ops.lkda.swiglu_linear, (x, weight))
        torch.library.opcheck(torch.ops.lkda.swiglu_backward, (dy.repeat(1, 2), x.detach()))

    def test_compiled_in_one_graph(self):
        x, weight, dy = self.inputs(512, 1376, 512, torch.bfloat16)
        compiled = torch.compile(swiglu_linear, fullgraph=True)
        got, want = (self.measured(function, x, weight, dy) for function in (compiled, swiglu_linear))
        assert all(map(torch.equal, got, want))

    def test_a_layer_under_autocast(self):
        from lkda.models.mlp import SwiGLU

        layer, x = SwiGLU(128, 352).cuda(), torch.randn(2, 300, 128, device="cuda", requires_grad=True)
        found = []
        for plain in (True, False):
            layer._is_plain = lambda plain=plain: plain
            with torch.autocast("cuda", torch.bfloat16):
                y = layer(x)
            assert y.dtype == torch.bfloat16
            found.append([y, *torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])])
        for a, b in zip(*found, strict=True):
            assert a.dtype == b.dtype
            assert relative(a, b.double().cpu()) < 1e-2

    def test_a_frozen_weight_gets_no_gradient(self):
        x, weight, dy = self.inputs(64, 64, 16, torch.bfloat16)
        y = swiglu_linear(x, weight.detach())
        assert torch.autograd.grad(y, x, dy)[0].isfinite().all()


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
