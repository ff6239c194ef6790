"""The residual sum with its norm: the form in PyTorch, and the kernels on the CPU and on a GPU, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lkda.ops import residual_norm
from lkda.ops.residual_norm import cuda
from lkda.ops.residual_norm.op import BACKENDS
from lkda.ops.runtime.jit import ARCHITECTURES, SHARED_BYTES_PER_BLOCK, _reason_no_compiler
from tests.ops.emulation import EMULATED, NEEDS_A_GPU, kernels_on_the_cpu, ops_run_on_the_cpu  # noqa: F401
from tests.ops.layer_cases import assert_error_within_reference, assert_same_bits_traced, outputs_and_gradients

EPS = 1e-5
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# The data types of x, y (None: no y) and n: mixed precision, float32, half precision.
TYPES = [
    *((FP32, BF16, BF16), (FP32, FP16, FP16), (FP32, FP32, FP32), (BF16, BF16, BF16), (FP16, FP16, FP16)),
    *((FP32, None, BF16), (FP32, None, FP32), (BF16, None, BF16), (BF16, BF16, FP32)),
]
# Each type of x once, with and without y; each costs the compilation of two kernels.
FEW = ((FP32, BF16, BF16), (FP16, FP16, FP16), (BF16, None, BF16))
MARKED = [pytest.param(types, marks=[] if types in FEW else [pytest.mark.long]) for types in TYPES]


def inputs_of(*shape, x=FP32, y=BF16, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(*shape, generator=generator) for _ in range(2)]
    weight = 1 + 0.3 * torch.randn(shape[-1], generator=generator)
    inputs = {"x": 3 * drawn[0].to(x), "weight": weight}
    if y is not None:
        inputs["y"] = drawn[1].to(y)
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def norm(backend, dtype):
    """s and n of inputs x, weight and y."""
    return lambda x, weight, y=None: BACKENDS[backend].run(x, y, weight, EPS, dtype)


def check(inputs, dtype):
    """The kernels may err twice as much as the rounding of the results. n is that of the rounded s, so the kernels are
    compared with float64 from there on, and s with PyTorch, bit for bit."""
    got = outputs_and_gradients(norm("cuda", dtype), inputs)
    exact = {name: tensor.double() for name, tensor in inputs.items()}
    want = outputs_and_gradients(norm("torch", FP64), exact)
    if "y" in inputs:
        assert torch.equal(got["out0"], inputs["x"] + inputs["y"])
        rounded = {"x": got["out0"].double(), "weight": exact["weight"]}
        of_rounded = outputs_and_gradients(norm("torch", FP64), rounded)
        want |= {name: of_rounded[name] for name in ("out1", "dx", "dweight")} | {"dy": of_rounded["dx"]}
    assert_error_within_reference(got, want)
    assert {name: got[f"d{name}"].dtype for name in inputs} == {name: tensor.dtype for name, tensor in inputs.items()}
    assert (got["out0"].dtype, got["out1"].dtype) == (inputs["x"].dtype, dtype)


def test_the_definition():
    inputs = {name: tensor.double() for name, tensor in inputs_of(3, 5, 7).items()}
    x, weight, y = inputs.values()
    s, n = residual_norm(x, y, weight, eps=EPS, dtype=FP64)
    assert torch.equal(s, x + y)
    torch.testing.assert_close(n, s / (s.square().mean(-1, keepdim=True) + EPS).sqrt() * weight)
    s, n = residual_norm(x, None, weight, eps=EPS, dtype=FP32)
    assert s is x
    assert n.dtype == FP32
    assert torch.equal(n, F.rms_norm(x, (7,), weight, EPS).float())


def test_its_gradient_in_pytorch():
    leaves = [tensor.double().requires_grad_() for tensor in inputs_of(3, 6).values()]
    assert torch.autograd.gradcheck(lambda x, w, y: residual_norm(x, y, w, eps=EPS, dtype=FP64), leaves)


@pytest.mark.parametrize("types", [(BF16, FP32), (BF16, FP16), (FP32, FP64)], ids=str)
def test_the_sum_has_the_type_that_pytorch_gives_it(types):
    inputs = inputs_of(2, 8, x=types[0], y=types[1])
    s, n = residual_norm(inputs["x"], inputs["y"], inputs["weight"], eps=EPS, dtype=BF16)
    assert torch.equal(s, inputs["x"] + inputs["y"])
    assert s.dtype == torch.promote_types(*types)
    assert n.dtype == BF16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.ones(5)}, r"residual_norm: weight must be \[d\] for x .*, got \[5\]"),
        ({"y": torch.ones(2, 6)}, r"residual_norm: y must have x's shape \[2, 3, 6\], got \[2, 6\]"),
        ({"y": torch.ones(2, 3, 6, dtype=torch.int32)}, r"y must be a floating-point tensor, got torch\.int32"),
        ({"weight": torch.ones(6, device="meta")}, "weight is on meta and x on cpu"),
        ({"dtype": torch.int32}, r"dtype, that of the norm, must be a floating-point type, got torch\.int32"),
        ({"backend": "cuda"}, "not on a CUDA device; use backend='auto' or backend='torch'"),
        ({"backend": "cpu"}, "backend must be one of auto, cuda, torch"),
    ],
)
def test_what_does_not_fit_is_said(changes, message):
    given = {"x": torch.ones(2, 3, 6), "y": torch.ones(2, 3, 6), "weight": torch.ones(6), "dtype": FP32, "eps": EPS}
    with pytest.raises(ValueError, match=message):
        residual_norm(**(given | changes))


@pytest.mark.parametrize(
    ("width", "dtype", "reason"),
    [
        (12, BF16, "rows of a multiple of 8 up to 8192, got 12; use backend='torch'"),
        (8200, BF16, "rows of a multiple of 8 up to 8192, got 8200"),
        (64, FP64, r"takes bfloat16, float16 and float32, got torch\.float64; use backend='torch'"),
    ],
)
def test_what_the_kernels_cannot_take_is_said(width, dtype, reason):
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(cuda.cannot_run(torch.device("cuda", 0), width, dtype))


@pytest.mark.sample(3)
@pytest.mark.skipif(_reason_no_compiler() is not None, reason=str(_reason_no_compiler()))
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile_without_spills(arch):
    for name in ("forward", "backward"):
        kernel = cuda.norm_kernel(name, 512, FP32, BF16, BF16)
        used = kernel.module.binary(arch).resources()[kernel.entry]
        assert used.spill_bytes == 0
        assert used.registers <= 128
        assert used.static_shared_bytes + kernel.shared_bytes <= SHARED_BYTES_PER_BLOCK[arch]


class TestKernels:
    pytestmark = EMULATED

    @pytest.mark.parametrize("types", MARKED, ids=str)
    def test_forward_and_backward(self, types):
        x, y, dtype = types
        check(inputs_of(2, 7, 72, x=x, y=y), dtype)

    @pytest.mark.parametrize(
        ("rows", "width"),
        [
            (5, 520),
            *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((1, 8), (9, 512), (3, 2056), (1, 8192))),
        ],
    )
    def test_every_number_of_warps_for_a_row(self, rows, width):
        check(inputs_of(rows, width), BF16)

    def test_more_groups_of_rows_than_blocks(self, monkeypatch):
        monkeypatch.setattr(cuda, "MAX_BLOCKS", 2)
        check(inputs_of(27, 72), BF16)
        check(inputs_of(7, 520), BF16)

    def test_no_rows(self):
        got = outputs_and_gradients(norm("cuda", BF16), inputs_of(0, 72))
        assert got["out1"].shape == got["dy"].shape == (0, 72)
        assert torch.equal(got["dweight"], torch.zeros(72))

    def test_strided_inputs_and_gradients(self):
        inputs = inputs_of(4, 6, 72)
        want = outputs_and_gradients(norm("cuda", BF16), inputs)
        strided = {
            name: tensor.transpose(0, 1).contiguous().transpose(0, 1)
            for name, tensor in inputs.items()
            if name != "weight"
        }
        parts = {"y": F.pad(inputs["y"], (1, 2))[..., 1:-2], "x": F.pad(inputs["x"], (8, 8))[..., 8:-8]}
        for layout in (strided, parts):
            assert not any(tensor.is_contiguous() for tensor in layout.values())
            got = outputs_and_gradients(norm("cuda", BF16), inputs | layout)
            assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
        s, n = norm("cuda", BF16)(**leaves)
        (s.sum() + n.sum()).backward()  # gradients of stride 0
        assert all(tensor.grad.isfinite().all() for tensor in leaves.values())

    @pytest.mark.sample(3)
    @pytest.mark.parametrize("y", [BF16, FP32, None])
    def test_a_loss_of_one_output_alone(self, y):
        inputs = {name: tensor.requires_grad_() for name, tensor in inputs_of(5, 72, y=y).items()}
        for index in range(2):
            losses = [norm(word, FP32)(**inputs)[index].square().sum() for word in ("cuda", "torch")]
            found = [
                torch.autograd.grad(loss, list(inputs.values()), allow_unused=True, materialize_grads=True)
                for loss in losses
            ]
            for got, want in zip(*found, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-2 if y == BF16 else 1e-5, atol=1e-4)

    def test_a_frozen_weight_gets_no_gradient(self):
        inputs = inputs_of(5, 72)
        want = outputs_and_gradients(norm("cuda", BF16), inputs)
        weight = inputs.pop("weight")
        got = outputs_and_gradients(lambda x, y: norm("cuda", BF16)(x, weight, y), inputs)
        assert all(torch.equal(tensor, want[name]) for name, tensor in got.items())

    def test_without_gradients_s_is_x_and_nothing_is_kept(self):
        inputs = inputs_of(5, 72, y=None)
        s, n = norm("cuda", BF16)(**inputs)
        assert s is inputs["x"]
        assert not n.requires_grad
        with_gradient = norm("cuda", BF16)(inputs["x"].clone().requires_grad_(), inputs["weight"])
        assert torch.equal(with_gradient[1], n)
        assert torch.equal(with_gradient[0], s)

    def test_large_numbers_and_zeros(self):
        x = torch.tensor([[1e18] * 8, [0.0] * 8, [1e-20] * 8])
        s, n = norm("cuda", FP32)(x, torch.ones(8), torch.zeros(3, 8))
        assert torch.equal(s, x)
        torch.testing.assert_close(n, F.rms_norm(x, (8,), torch.ones(8), EPS))

    def test_memory_between_forward_and_backward(self):
        """y alone where it is narrower than the stream: the norm before keeps x already."""
        kept = []

        def pack(tensor):
            kept.append(tensor.data_ptr())
            return tensor

        inputs = {name: tensor.requires_grad_() for name, tensor in inputs_of(4, 72).items()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            s, _ = norm("cuda", BF16)(**inputs)
        assert {inputs["x"].data_ptr(), inputs["y"].data_ptr()} <= set(kept)
        assert s.data_ptr() not in kept


@pytest.fixture
def ops_on_the_cpu(kernels_on_the_cpu):  # noqa: F811
    with ops_run_on_the_cpu(residual_norm=cuda._launch_new, residual_norm_backward=cuda.launch_backward):
        yield


@pytest.mark.usefixtures("ops_on_the_cpu")
class TestOps:
    pytestmark = EMULATED[:1]

    @pytest.mark.slow
    @pytest.mark.parametrize("types", [(FP32, BF16, BF16), (FP32, None, BF16), (FP32, FP32, FP32)], ids=str)
    def test_opcheck(self, types):
        x, y, dtype = types
        inputs = {name: tensor.requires_grad_() for name, tensor in inputs_of(3, 72, x=x, y=y).items()}
        torch.library.opcheck(
            torch.ops.lkda.residual_norm, (inputs["x"], inputs.get("y"), inputs["weight"], EPS, dtype)
        )

    @pytest.mark.long
    @pytest.mark.sample(3)
    @pytest.mark.parametrize("y", [BF16, FP32, None])
    def test_traced_in_one_graph(self, y):
        assert_same_bits_traced(norm("cuda", BF16), inputs_of(3, 4, 72, y=y))


def on_gpu(*shape, **types):
    return inputs_of(*shape, device="cuda", **types)


@pytest.mark.gpu
@NEEDS_A_GPU
class TestOnAGPU:
    @pytest.mark.parametrize("types", TYPES, ids=str)
    @pytest.mark.parametrize(("rows", "width"), [(1, 8), (257, 512), (3000, 1024), (33, 1544), (65, 4096), (9, 8192)])
    def test_against_float64(self, rows, width, types):
        x, y, dtype = types
        check(on_gpu(rows, width, x=x, y=y), dtype)

    @pytest.mark.parametrize("y", [BF16, None])
    def test_the_same_bits_in_every_run_and_form(self, y):
        inputs = on_gpu(4, 3000, 512, y=y)
        forms = [norm("cuda", BF16)] * 3 + [torch.compile(norm("cuda", BF16), fullgraph=True)]
        want, *others = [outputs_and_gradients(form, inputs) for form in forms]
        for got in others:
            assert all(torch.equal(got[name], tensor) for name, tensor in want.items())

    def test_opcheck(self):
        inputs = {name: tensor.requires_grad_() for name, tensor in on_gpu(3, 64).items()}
        x, weight, y = inputs.values()
        torch.library.opcheck(torch.ops.lkda.residual_norm, (x, y, weight, EPS, BF16))
        torch.library.opcheck(torch.ops.lkda.residual_norm, (x, None, weight, EPS, BF16))

    def test_a_replayed_graph_has_the_same_bits(self):
        inputs = {name: tensor.requires_grad_() for name, tensor in on_gpu(700, 512).items()}
        ds, dn = torch.randn(700, 512, device="cuda"), torch.randn(700, 512, device="cuda").bfloat16()

        def run():
            outputs = norm("cuda", BF16)(**inputs)
            gradients = torch.autograd.grad(outputs, list(inputs.values()), (ds, dn))
            # Detached: a graph of autograd that lives on would bind the gradients to the stream of its first run.
            return [tensor.detach() for tensor in (*outputs, *gradients)]

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            want = run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = run()
        for _ in range(2):
            graph.replay()
            assert all(map(torch.equal, got, want))

    @pytest.mark.parametrize("y", [BF16, None])
    def test_launches(self, y):
        """One for the results; one for the gradients of x and y, and one for the sum of the weight's gradient."""
        from lkda.bench.timing import launches

        inputs = {name: tensor.requires_grad_() for name, tensor in on_gpu(700, 512, y=y).items()}
        ds, dn = torch.randn(700, 512, device="cuda"), torch.randn(700, 512, device="cuda").bfloat16()
        with torch.no_grad():
            assert launches(lambda: norm("cuda", BF16)(**inputs)) == 1

        def run():
            return torch.autograd.grad(norm("cuda", BF16)(**inputs), list(inputs.values()), (ds, dn))

        assert launches(run) == 3
