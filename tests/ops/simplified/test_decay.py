"""The decays of simplified attention: the form in PyTorch, and the kernels on the CPU and on a GPU, against float64."""

from __future__ import annotations

import pytest
import torch

from lkda.ops import simplified_decay
from lkda.ops.runtime.jit import ARCHITECTURES, _reason_no_compiler
from lkda.ops.simplified.cuda import decay as cuda
from lkda.ops.simplified.decay import BACKENDS
from tests.ops.emulation import EMULATED, NEEDS_A_GPU, kernels_on_the_cpu, ops_run_on_the_cpu  # noqa: F401
from tests.ops.layer_cases import assert_error_within_reference, assert_same_bits_traced, outputs_and_gradients

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def inputs_of(*shape, dtype=BF16, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    logits, bias = torch.randn(*shape, generator=generator), 4 + torch.randn(shape[-1], generator=generator)
    return {"logits": logits.to(device, dtype), "bias": bias.to(device)}


def decays(backend):
    return lambda logits, bias: (BACKENDS[backend].run(logits, bias),)


def check(inputs):
    want = outputs_and_gradients(decays("torch"), {name: x.double() for name, x in inputs.items()})
    got = outputs_and_gradients(decays("cuda"), inputs)
    assert_error_within_reference(got, want)
    assert got["out0"].dtype == FP32
    assert got["dlogits"].dtype == inputs["logits"].dtype


def test_the_definition():
    inputs = inputs_of(2, 5, 3, dtype=torch.float64)
    want = 1 / (1 + torch.exp(-inputs["logits"] - inputs["bias"]))
    torch.testing.assert_close(simplified_decay(**inputs), want)
    assert simplified_decay(**inputs_of(2, 5, 3)).dtype == FP32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": torch.ones(3)}, r"logits must be \[..., H\] .* and bias \[H\], got \[2, 5, 4\] and \[3\]"),
        ({"logits": torch.ones(4)}, r"at least two dimensions .* got \[4\] and \[4\]"),
        ({"bias": torch.ones(4, dtype=torch.int32)}, "bias must be a floating-point tensor"),
        ({"backend": "cuda"}, "not on a CUDA device; use backend='auto' or backend='torch'"),
    ],
)
def test_what_does_not_fit_is_said(changes, message):
    with pytest.raises(ValueError, match=message):
        simplified_decay(**({"logits": torch.ones(2, 5, 4), "bias": torch.ones(4)} | changes))


def test_what_the_kernels_cannot_take_is_said():
    device = torch.device("cuda", 0)
    assert "up to 256 heads, got 300; use backend='torch'" in str(cuda.cannot_run(device, 300, BF16))
    assert "got torch.float64; use backend='torch'" in str(cuda.cannot_run(device, 8, torch.float64))


@pytest.mark.sample(3)
@pytest.mark.skipif(_reason_no_compiler() is not None, reason=str(_reason_no_compiler()))
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile_without_spills(arch):
    for used in cuda.decay_kernel("simplified_decay", BF16).module.binary(arch).resources().values():
        assert used.spill_bytes == 0
        assert used.registers <= 48


class TestKernels:
    pytestmark = EMULATED

    @pytest.mark.parametrize(
        ("T", "H", "dtype"),
        [(1, 1, BF16), (300, 8, BF16), (70, 7, FP16), pytest.param(9, 256, FP32, marks=pytest.mark.slow)],
    )
    def test_forward_and_backward(self, T, H, dtype):
        check(inputs_of(2, T, H, dtype=dtype))

    def test_a_penalty_of_the_gradient_is_refused(self):
        """The gradient of a sum has no history of its own."""
        logits, bias = (x.requires_grad_() for x in inputs_of(6, 4, dtype=FP32).values())
        (total,) = (y.sum() for y in decays("cuda")(logits, bias))
        (gradient,) = torch.autograd.grad(total, logits, create_graph=True)
        with pytest.raises(RuntimeError, match="first derivatives only"):
            torch.autograd.grad(total + gradient.square().sum(), logits)

    def test_logits_that_are_a_part_of_a_product(self):
        inputs = inputs_of(2, 40, 8)
        want = outputs_and_gradients(decays("cuda"), inputs)
        wide = torch.nn.functional.pad(inputs["logits"], (3, 5))[..., 3:-5]
        swapped = inputs["logits"].transpose(0, 1).contiguous().transpose(0, 1)
        for layout in (wide, swapped, inputs["logits"].mT.contiguous().mT):
            assert not layout.is_contiguous()
            got = outputs_and_gradients(decays("cuda"), inputs | {"logits": layout})
            assert all(torch.equal(got[name], x) for name, x in want.items())
        leaves = [x.detach().requires_grad_() for x in inputs.values()]
        decays("cuda")(*leaves)[0].sum().backward()  # a gradient of stride 0
        assert all(x.grad.isfinite().all() for x in leaves)

    def test_no_tokens(self):
        got = outputs_and_gradients(decays("cuda"), inputs_of(2, 0, 8))
        assert got["out0"].shape == (2, 0, 8)
        assert torch.equal(got["dbias"], torch.zeros(8))

    def test_the_ends_of_the_range(self):
        logits = torch.tensor([[-200.0, -90.0, 0.0, 8.3, 17.0, 90.0, torch.inf, torch.nan]])
        got = decays("cuda")(logits, torch.zeros(8))[0]
        torch.testing.assert_close(got, torch.sigmoid(logits), equal_nan=True, rtol=1e-6, atol=0)


@pytest.fixture
def ops_on_the_cpu(kernels_on_the_cpu):  # noqa: F811
    with ops_run_on_the_cpu(simplified_decay=cuda.launch_forward, simplified_decay_backward=cuda.launch_backward):
        yield


@pytest.mark.usefixtures("ops_on_the_cpu")
class TestOps:
    pytestmark = EMULATED[:1]

    def test_opcheck(self):
        logits, bias = (x.requires_grad_() for x in inputs_of(6, 4).values())
        torch.library.opcheck(torch.ops.lkda.simplified_decay, (logits, bias))

    def test_traced_in_one_graph(self):
        assert_same_bits_traced(decays("cuda"), inputs_of(2, 5, 4))


@pytest.mark.gpu
@NEEDS_A_GPU
class TestOnAGPU:
    @pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
    @pytest.mark.parametrize(("T", "H"), [(1, 1), (2000, 8), (333, 12), (100, 256)])
    def test_against_float64(self, T, H, dtype):
        check(inputs_of(2, T, H, dtype=dtype, device="cuda"))

    def test_the_same_bits_in_every_run_and_form(self):
        inputs = inputs_of(4, 2000, 8, device="cuda")
        forms = [decays("cuda")] * 3 + [torch.compile(decays("cuda"), fullgraph=True)]
        want, *others = [outputs_and_gradients(form, inputs) for form in forms]
        for got in others:
            assert all(torch.equal(got[name], x) for name, x in want.items())
