"""The layer's kernels on a GPU: short convolution, norms and gates, KDA from raw logits. pytest -m gpu tests/ops"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lkda.bench.layer_gradients import errors
from lkda.bench.op_benchmark import Shape
from lkda.ops import gated_rms_norm, l2_normalized, short_convolutions
from tests.ops.cases import relative
from tests.ops.gated_norm.test_op import inputs_of as norm_inputs
from tests.ops.kda.test_fused import FORMS, attention, gate_inputs, gates, layer_inputs
from tests.ops.layer_cases import assert_error_within_reference, outputs_and_gradients
from tests.ops.rounded_reference import operands_rounded
from tests.ops.short_conv.test_emulated import inputs_of as conv_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernels are emulated, not run"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
PACKED = [0, 0, 1, 3, 3, 32, 64, 66, 300, 301, 900, 1000, 1000, 1000]
SUMS = 3e-5  # of thousands of tokens in float32


@dataclass(frozen=True)
class Op:
    """An op as a function of named tensors that gives a tuple of tensors; `backend` is bound first."""

    bind: Callable[..., Callable[..., Any]]
    inputs: Callable[..., dict[str, torch.Tensor]]


def bind_conv(backend, *, normalized=(True, True, False), head_dim=64, cu_seqlens=None):
    def run(**inputs):
        xs, weights, states = ([inputs[name] for name in inputs if name[0] == kind] for kind in "xws")
        options = {"normalized": normalized[: len(xs)], "head_dim": head_dim, "cu_seqlens": cu_seqlens}
        ys, after = short_convolutions(xs, weights, states=states or None, backend=backend, **options)
        return (*ys, *after)

    return run


def bind_joined(backend, *, normalized=(True, True, False), head_dim=64, cu_seqlens=None):
    def run(x, **inputs):
        weights, states = ([inputs[name] for name in inputs if name[0] == kind] for kind in "ws")
        options = {"normalized": normalized, "head_dim": head_dim, "cu_seqlens": cu_seqlens}
        ys, after = short_convolutions(x, weights, states=states, backend=backend, **options)
        return (*ys, *after)

    return run


def joined_inputs(B, T, D, dtype):
    inputs = conv_inputs(B, T, 4 * D, dtype=dtype)
    return {"x": torch.cat([inputs.pop(f"x{i}") for i in range(3)], -1), **inputs}


OPS = {
    "conv": Op(bind_conv, lambda B, T, D, dtype: conv_inputs(B, T, 4 * D, dtype=dtype)),
    "joined": Op(bind_joined, joined_inputs),
    "norm": Op(
        lambda backend, **_: lambda x, gate, weight: (gated_rms_norm(x, gate, weight, backend=backend),),
        lambda B, T, D, dtype: norm_inputs(B, T, 4, D, dtype=dtype),
    ),
    "l2": Op(
        lambda backend, **_: lambda **xs: l2_normalized(*xs.values(), backend=backend),
        lambda B, T, D, dtype: {
            f"x{i}": x for i, x in enumerate(norm_inputs(B, T, 4, D, dtype=dtype).values()) if i < 2
        },
    ),
    "gate": Op(
        lambda backend, **_: lambda **inputs: gates(backend, inputs["logits"].shape[-1])(**inputs),
        lambda B, T, D, dtype: gate_inputs(B, T, 4, D, dtype=dtype),
    ),
}


def on_gpu(name, B=2, T=500, D=64, dtype=torch.bfloat16):
    return {key: x.cuda() for key, x in OPS[name].inputs(B, T, D, dtype).items()}


def check(name, inputs, **options):
    want = outputs_and_gradients(OPS[name].bind("torch", **options), {key: x.double() for key, x in inputs.items()})
    assert_error_within_reference(outputs_and_gradients(OPS[name].bind("cuda", **options), inputs), want, sums=SUMS)


@pytest.mark.parametrize("name", OPS)
class TestEveryOp:
    @pytest.mark.parametrize("T", [1, 31, 1000])
    @pytest.mark.parametrize("D", [32, 64, 128])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_error(self, name, dtype, D, T):
        check(name, on_gpu(name, 2, T, D, dtype), head_dim=D)

    def test_bitwise_equal_from_run_to_run(self, name):
        inputs = on_gpu(name, 4, 3000)
        first = outputs_and_gradients(OPS[name].bind("cuda"), inputs)
        for _ in range(5):
            again = outputs_and_gradients(OPS[name].bind("cuda"), inputs)
            assert all(torch.equal(x, again[key]) for key, x in first.items())

    def test_a_call_without_the_dispatcher_equals_a_dispatched_one(self, name):
        class Watching(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                return function(*args, **(kwargs or {}))

        inputs, op = on_gpu(name), OPS[name].bind("cuda")
        want = outputs_and_gradients(op, inputs)
        with Watching():
            got = outputs_and_gradients(op, inputs)
        assert all(torch.equal(x, got[key]) for key, x in want.items())

    def test_compiles_without_a_graph_break(self, name):
        inputs, op = on_gpu(name), OPS[name].bind("auto")
        want = outputs_and_gradients(op, inputs)
        got = outputs_and_gradients(torch.compile(op, fullgraph=True), inputs)
        assert all(torch.equal(x, got[key]) for key, x in want.items())

    def test_replays_in_a_cuda_graph(self, name):
        inputs, op = {key: x.requires_grad_() for key, x in on_gpu(name).items()}, OPS[name].bind("cuda")

        def step():
            outputs = op(**inputs)
            return *outputs, *torch.autograd.grad(sum(y.float().square().sum() for y in outputs), list(inputs.values()))

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            step()
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            for x in inputs.values():
                x.copy_(x.flip(1 if x.dim() > 1 else 0))
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(got, want) for got, want in zip(captured, step()))

    def test_runs_on_the_current_stream(self, name):
        inputs, op = on_gpu(name), OPS[name].bind("cuda")
        want = op(**inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            got = op(**{key: x * 1 for key, x in inputs.items()})  # exists only after the sleep, on this stream
        stream.synchronize()
        assert all(torch.equal(x, y) for x, y in zip(got, want))


@pytest.mark.parametrize("dtype", DTYPES)
def test_convolutions_of_packed_sequences(dtype):
    inputs = conv_inputs(1, PACKED[-1], 256, dtype=dtype, sequences=len(PACKED) - 1)
    inputs = {name: x.cuda() for name, x in inputs.items()}
    check("conv", inputs, cu_seqlens=torch.tensor(PACKED, device="cuda"))


@pytest.mark.parametrize("width", [1, 2, 3])
def test_convolutions_of_other_widths(width):
    check("conv", {name: x.cuda() for name, x in conv_inputs(2, 100, 256, width=width, streams=2).items()})


def test_convolutions_of_slices_of_one_projection():
    inputs = {name: x.cuda() for name, x in conv_inputs(2, 100, 256).items()}
    want = outputs_and_gradients(bind_conv("cuda"), inputs)
    whole = torch.cat([inputs[f"x{i}"] for i in range(3)], -1)
    got = outputs_and_gradients(bind_conv("cuda"), inputs | {f"x{i}": x for i, x in enumerate(whole.chunk(3, -1))})
    assert all(torch.equal(x, got[name]) for name, x in want.items())


def test_opcheck_of_the_convolution():
    inputs = [x.cuda().requires_grad_() for x in conv_inputs(2, 40, 128).values()]
    torch.library.opcheck(torch.ops.lkda.short_conv_forward, (*inputs, None, 3, 64))
    ys = [torch.randn_like(x) for x in inputs[:3]]
    lasts = [torch.randn_like(x) for x in inputs[6:]]
    plain = [x.detach() for x in inputs]
    torch.library.opcheck(torch.ops.lkda.short_conv_backward, (*ys, *lasts, *plain, None, 3, 64))
    joined = (torch.cat(plain[:3], -1), None, None, *plain[3:], None, 3, 64)
    torch.library.opcheck(torch.ops.lkda.short_conv_forward, joined)
    torch.library.opcheck(torch.ops.lkda.short_conv_backward, (*ys, *lasts, *joined))
    one = (inputs[0], *([None] * 8), None, 1, 64)
    torch.library.opcheck(torch.ops.lkda.short_conv_forward, one)
    torch.library.opcheck(torch.ops.lkda.short_conv_backward, (ys[0], *([None] * 5), plain[0], *one[1:]))


def test_opcheck_of_the_gated_norm():
    x, gate, weight = (t.cuda().requires_grad_() for t in norm_inputs(2, 40, 3, 64).values())
    torch.library.opcheck(torch.ops.lkda.gated_norm_forward, (x, gate, weight, 1e-5))
    torch.library.opcheck(torch.ops.lkda.gated_norm_forward, (x, None, weight, 1e-5))
    given = (x.detach(), x.detach(), gate.detach(), weight.detach(), 1e-5)
    torch.library.opcheck(torch.ops.lkda.gated_norm_backward, given)


def test_opcheck_of_the_gate():
    logits, strengths, A_log, bias = (t.cuda().requires_grad_() for t in gate_inputs(2, 40, 3, 64).values())
    torch.library.opcheck(torch.ops.lkda.kda_gate, (logits, strengths, A_log, bias, 64, False, -5.0, 1.0))
    torch.library.opcheck(torch.ops.lkda.kda_gate, (None, strengths, None, None, 64, False, -5.0, 1.0))
    inputs = [x.detach() for x in (logits, strengths, A_log, bias)]
    dg, dbeta = torch.randn(2, 40, 3, 64, device="cuda"), torch.randn(2, 40, 3, device="cuda")
    torch.library.opcheck(torch.ops.lkda.kda_gate_backward, (dg, dbeta, *inputs, False, -5.0, 1.0))


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_gates_of_every_form(form, per_head):
    inputs = {name: x.cuda() for name, x in gate_inputs(2, 700, 6, 64, per_head=per_head).items()}
    want = outputs_and_gradients(gates("torch", 64, *form), {name: x.double() for name, x in inputs.items()})
    assert_error_within_reference(outputs_and_gradients(gates("cuda", 64, *form), inputs), want, sums=SUMS)


@pytest.mark.parametrize("shape", ["8x2048x16x64", "1x8192x16x128"])
def test_gradients_of_the_decays_parameters_err_less_than_a_thousandth(shape):
    """In bf16 too: of a sum over all tokens little is left, so that it shows what the products round."""
    found = errors(Shape.parse(shape), torch.device("cuda"))
    assert {row["inputs"] for row in found} == {"float32", "bfloat16"}
    for row in found:
        assert float(row["dA_log"]) < 1e-3, row
        assert float(row["ddt_bias"]) < 1e-3, row


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(("gate", "lower_bound", "negative"), FORMS)
@pytest.mark.parametrize("D", [32, 64, 128])
def test_attention_from_raw_logits(D, gate, lower_bound, negative, per_head):
    """Within twice the error of the PyTorch form with bf16 operands; A_log and dt_bias sum the errors of dg."""
    inputs = {name: x.cuda() for name, x in layer_inputs(2, 1000, 8, D, per_head=per_head).items()}
    inputs = {name: x.bfloat16() if x.dim() > 2 and name != "A_log" else x.float() for name, x in inputs.items()}
    options = {"form": gate, "lower_bound": lower_bound, "negative_eigenvalues": negative}

    def op(backend):
        return lambda **inputs: attention(**inputs, **options, backend=backend)

    want = outputs_and_gradients(op("chunk"), {name: x.double() for name, x in inputs.items()})
    with operands_rounded():
        reference = outputs_and_gradients(op("chunk"), inputs)
    for name, x in outputs_and_gradients(op("cuda"), inputs).items():
        error, allowed = relative(x, want[name]), 2 * relative(reference[name], want[name]) + 1e-6
        assert error <= allowed, f"{name} errs {error:.1e}, allowed {allowed:.1e}"
