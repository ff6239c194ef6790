"""The norm and the rotation of heads: the form in PyTorch, and the kernels on the CPU and on a GPU, against float64."""

from __future__ import annotations

import pytest
import torch

from lkda.ops import rotary_heads
from lkda.ops.runtime.jit import ARCHITECTURES, _reason_no_compiler
from lkda.ops.softmax.cuda import rotary as cuda
from lkda.ops.softmax.heads import BACKENDS
from lkda.ops.softmax.rotary import cos_sin
from tests.ops.emulation import EMULATED, NEEDS_A_GPU, kernels_on_the_cpu, ops_run_on_the_cpu  # noqa: F401
from tests.ops.layer_cases import assert_error_within_reference, assert_same_bits_traced, outputs_and_gradients

EPS, BASE = 1e-5, 10000.0
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def inputs_of(B, T, H, D, *, dtype=BF16, norms=True, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    inputs = {name: 2 * torch.randn(B, T, H, D, generator=generator).to(dtype) for name in "qk"}
    if norms:
        inputs |= {f"{name}_weight": 1 + 0.3 * torch.randn(D, generator=generator) for name in "qk"}
    return {name: x.to(device) for name, x in inputs.items()}


def heads(backend, position):
    def run(q, k, q_weight=None, k_weight=None):
        return BACKENDS[backend].run(q, k, position, BASE, q_weight, k_weight, EPS)

    return run


def exact(position):
    """In float64, with the angles that float32 has."""

    def run(q, k, q_weight=None, k_weight=None):
        cosines, sines = (x.double().unsqueeze(-2) for x in cos_sin(position, q.shape[-1], BASE, FP32))
        found = []
        for x, weight in ((q, q_weight), (k, k_weight)):
            m = x if weight is None else x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
            a, b = m.chunk(2, -1)
            found.append(torch.cat([a * cosines - b * sines, b * cosines + a * sines], -1))
        return found

    return run


def check(inputs, position=None):
    q = inputs["q"]
    position = torch.arange(q.shape[1], device=q.device) if position is None else position
    want = outputs_and_gradients(exact(position), {name: x.double() for name, x in inputs.items()})
    got = outputs_and_gradients(heads("cuda", position), inputs)
    assert_error_within_reference(got, want)
    assert {got[name].dtype for name in ("out0", "out1", "dq", "dk")} == {q.dtype}


@pytest.mark.parametrize("norms", [True, False])
def test_pytorch_against_float64(norms):
    inputs, position = inputs_of(2, 5, 3, 6, dtype=FP32, norms=norms), torch.tensor([3, 4, 5, 900, 901])
    want = outputs_and_gradients(exact(position), {name: x.double() for name, x in inputs.items()})
    assert_error_within_reference(outputs_and_gradients(heads("torch", position), inputs), want)
    weights = (inputs["q_weight"], inputs["k_weight"]) if norms else None
    got = rotary_heads(inputs["q"], inputs["k"], position, base=BASE, weights=weights, eps=EPS)
    assert all(map(torch.equal, got, heads("torch", position)(**inputs)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.ones(2, 3, 4, 5)}, r"q and k must be \[B, T, H, D\], D even, got \[2, 3, 4, 5\]"),
        ({"k": torch.ones(2, 2, 4, 6)}, r"got \[2, 3, 4, 6\] and \[2, 2, 4, 6\]"),
        ({"k": torch.ones(2, 3, 4, 8)}, r"got \[2, 3, 4, 6\] and \[2, 3, 4, 8\]"),
        ({"k": torch.ones(2, 3, 4, 6).bfloat16()}, r"k is torch.bfloat16 and q torch.float32; cast one of them"),
        ({"position": torch.arange(4)}, r"position must be \[T\] or \[B, T\] for q \[2, 3, 4, 6\], got \[4\]"),
        ({"weights": (torch.ones(6), torch.ones(5))}, r"weights must be two of \[6\], .* got \[6\] and \[5\]"),
        ({"weights": (torch.ones(6), None)}, r"weights must be two of \[6\], for q and for k, got \[6\] and None"),
        ({"weights": 3 * (torch.ones(6),)}, r"got \[6\] and \[6\] and \[6\]"),
        ({"position": torch.arange(3, device="meta")}, "position is on meta and q on cpu; move one of them"),
        ({"backend": "cuda"}, "not on a CUDA device; use backend='auto' or backend='torch'"),
    ],
)
def test_what_does_not_fit_is_said(changes, message):
    q, k = torch.ones(2, 2, 3, 4, 6)
    with pytest.raises(ValueError, match=message):
        rotary_heads(**({"q": q, "k": k, "position": torch.arange(3), "base": BASE} | changes))


@pytest.mark.sample(3)
@pytest.mark.skipif(_reason_no_compiler() is not None, reason=str(_reason_no_compiler()))
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile_without_spills(arch):
    for name in ("forward", "backward"):
        kernel = cuda.rotary_kernel(name, 64, BF16)
        used = kernel.module.binary(arch).resources()[kernel.entry]
        assert used.spill_bytes == 0
        assert used.registers <= 80


class TestKernels:
    pytestmark = EMULATED

    @pytest.mark.parametrize(
        ("dtype", "D", "norms"),
        [
            *((BF16, 64, True), (FP16, 32, False), (FP32, 128, True)),
            *(
                pytest.param(*case, marks=pytest.mark.long)
                for case in ((BF16, 64, False), (FP16, 32, True), (FP32, 128, False))
            ),
        ],
    )
    def test_forward_and_backward(self, dtype, D, norms):
        check(inputs_of(2, 7, 3, D, dtype=dtype, norms=norms))

    def test_positions_of_each_sequence(self):
        check(inputs_of(2, 3, 2, 64), torch.tensor([[5, 6, 7], [1000, 1001, 1002]]))

    @pytest.mark.parametrize(("heads", "norms"), [((3, 1), False), ((1, 2), True)])
    def test_k_has_other_heads_than_q(self, heads, norms):
        inputs, others = (inputs_of(2, 40, H, 32, dtype=FP32, norms=norms) for H in heads)
        check(inputs | {"k": others["k"]})

    def test_one_row_and_no_rows(self):
        check(inputs_of(1, 1, 1, 64), torch.tensor([70]))
        got = outputs_and_gradients(heads("cuda", torch.arange(0)), inputs_of(2, 0, 3, 64))
        assert got["dk"].shape == (2, 0, 3, 64)
        assert torch.equal(got["dq_weight"], torch.zeros(64))

    def test_more_groups_of_rows_than_blocks(self, monkeypatch):
        monkeypatch.setattr(cuda, "MAX_BLOCKS", 2)
        check(inputs_of(2, 70, 3, 64))

    @pytest.mark.parametrize("norms", [True, False])
    def test_strided_inputs_and_gradients(self, norms):
        """q and k as slices of one projection, read where they are; other layouts; a gradient of stride 0."""
        inputs, position = inputs_of(2, 5, 3, 64, norms=norms), torch.arange(5)
        want = outputs_and_gradients(heads("cuda", position), inputs)
        rows = torch.cat([inputs["q"].flatten(2), inputs["k"].flatten(2), torch.zeros(2, 5, 72).bfloat16()], -1)
        slices = dict(zip("qk", (x.unflatten(-1, (3, 64)) for x in rows.split([192, 192, 72], -1)[:2])))
        assert [cuda._with_stride(x)[0].data_ptr() for x in slices.values()] == [x.data_ptr() for x in slices.values()]
        swapped = {name: inputs[name].transpose(1, 2).contiguous().transpose(1, 2) for name in "qk"}
        for layout in (slices, swapped, {"q": slices["q"]}):
            got = outputs_and_gradients(heads("cuda", position), inputs | layout)
            assert all(torch.equal(got[name], x) for name, x in want.items())
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        sum(y.sum() for y in heads("cuda", position)(**leaves)).backward()
        assert all(x.grad.isfinite().all() for x in leaves.values())

    def test_a_loss_of_q_alone_and_frozen_weights(self):
        inputs, position = inputs_of(2, 5, 3, 128, dtype=FP32), torch.arange(5)
        found = []
        for word in ("cuda", "torch"):
            leaves = {name: x.detach().requires_grad_(name in "qk") for name, x in inputs.items()}
            heads(word, position)(**leaves)[0].square().sum().backward()
            assert leaves["q_weight"].grad is None
            found.append([torch.zeros_like(x) if x.grad is None else x.grad for x in leaves.values()])
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)

    def test_without_norms_nothing_but_the_angles_is_kept(self):
        kept = []

        def pack(x):
            kept.append(x.numel())
            return x

        inputs = {name: x.requires_grad_() for name, x in inputs_of(2, 5, 3, 64, norms=False).items()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            heads("cuda", torch.arange(5))(**inputs)
        assert kept == [5 * 32, 5 * 32]


@pytest.fixture
def ops_on_the_cpu(kernels_on_the_cpu):  # noqa: F811
    with ops_run_on_the_cpu(rotary_heads=cuda.launch_forward, rotary_heads_backward=cuda.launch_backward):
        yield


@pytest.mark.usefixtures("ops_on_the_cpu")
@pytest.mark.parametrize("norms", [True, False])
class TestOps:
    pytestmark = EMULATED[:1]

    def test_opcheck(self, norms):
        inputs = {name: x.requires_grad_() for name, x in inputs_of(2, 3, 2, 64, norms=norms).items()}
        q, k, *weights = inputs.values()
        angles = cos_sin(torch.arange(3), 64, BASE, FP32)
        torch.library.opcheck(torch.ops.lkda.rotary_heads, (q, k, *angles, *(weights or (None, None)), EPS))

    def test_traced_in_one_graph(self, norms):
        assert_same_bits_traced(heads("cuda", torch.arange(5)), inputs_of(2, 5, 3, 64, norms=norms))


@pytest.mark.gpu
@NEEDS_A_GPU
class TestOnAGPU:
    @pytest.mark.parametrize("norms", [True, False])
    @pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
    @pytest.mark.parametrize(("T", "D"), [(1, 32), (777, 64), (300, 128)])
    def test_against_float64(self, T, D, dtype, norms):
        check(inputs_of(2, T, 5, D, dtype=dtype, norms=norms, device="cuda"))

    @pytest.mark.parametrize("norms", [True, False])
    def test_k_has_one_head(self, norms):
        inputs = inputs_of(2, 777, 5, 32, norms=norms, device="cuda")
        check(inputs | {"k": inputs["k"][:, :, :1]})

    @pytest.mark.parametrize("norms", [True, False])
    def test_the_same_bits_in_every_run_and_form(self, norms):
        inputs = inputs_of(2, 2000, 8, 64, norms=norms, device="cuda")
        run = heads("cuda", torch.arange(2000, device="cuda"))
        forms = [run] * 3 + [torch.compile(run, fullgraph=True)]
        want, *others = [outputs_and_gradients(form, inputs) for form in forms]
        for got in others:
            assert all(torch.equal(got[name], x) for name, x in want.items())
