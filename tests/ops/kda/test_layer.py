"""The KDA layer as one function: equal, bit for bit, to its pieces, whose kernels it runs twice. Run on the CPU."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from lkda.models.mixers import kda as mixer
from lkda.models.mixers.kda import KimiDeltaAttention
from lkda.ops import KDAGate
from lkda.ops.gated_norm.cuda import gated_norm_cuda
from lkda.ops.kda.cuda import plan
from lkda.ops.kda.cuda.core import kda_cuda
from lkda.ops.kda.cuda.gate import kda_gate_cuda
from lkda.ops.kda.cuda.layer import SAVED_FOR_BACKWARD, kda_layer_cuda
from lkda.ops.short_conv.cuda import short_convolutions_cuda
from tests.ops.cases import relative
from tests.ops.emulation import kernels_on_the_cpu  # noqa: F401
from tests.ops.layer_cases import outputs_and_gradients

D, H, R, WIDTH = 32, 2, 16, 4
OPTIONS = {"form": "bounded", "lower_bound": -3.0, "negative_eigenvalues": True}


def kda_layer_inputs(B, T, *, decay="channel", gated=True, heads=H, dim=D, dtype=torch.bfloat16):
    """Everything that `kda_layer_cuda` differentiates, by name."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=draw).to(dtype)

    C = heads * dim
    inputs = {"x": normal(B, T, 3 * C), "beta_logits": normal(B, T, heads), "norm_weight": normal(dim).float()}
    inputs |= {f"w{i}": normal(C, 1, WIDTH, dtype=torch.float32) for i in range(3)}
    if decay != "none":
        rows = C if decay == "channel" else heads
        inputs |= {"latent": normal(B, T, R), "weight": normal(rows, R), "A_log": normal(1, 1, heads, 1).float()}
        inputs["dt_bias"] = normal(rows).float() - 3
    return inputs | ({"out_latent": normal(B, T, R), "out_weight": normal(C, R)} if gated else {})


def as_one(head_dim=D, cu_seqlens=None, save_for_backward="inputs"):
    def run(x, w0, w1, w2, beta_logits, norm_weight, A_log=None, dt_bias=None, **linear):
        given = [linear.get(name) for name in ("latent", "weight", "out_latent", "out_weight")]
        gate = KDAGate(A_log, dt_bias, **OPTIONS)
        y, state, caches = kda_layer_cuda(
            *(x, [w0, w1, w2], *given[:2], beta_logits, gate, *given[2:], norm_weight),
            head_dim=head_dim,
            cu_seqlens=cu_seqlens,
            save_for_backward=save_for_backward,
        )
        return y, state, *caches

    return run


def in_pieces(head_dim=D, cu_seqlens=None):
    def heads(y):
        return y.unflatten(-1, (-1, head_dim))

    def run(x, w0, w1, w2, beta_logits, norm_weight, A_log=None, dt_bias=None, **linear):
        (q, k, v), caches = short_convolutions_cuda(x, [w0, w1, w2], (True, True, False), head_dim, None, cu_seqlens)
        logits = F.linear(linear["latent"], linear["weight"]) if "latent" in linear else None
        if logits is not None and logits.shape != beta_logits.shape:
            logits = heads(logits)
        g, beta = kda_gate_cuda(logits, beta_logits, KDAGate(A_log, dt_bias, **OPTIONS), head_dim=head_dim)
        o, state = kda_cuda(heads(q), heads(k), heads(v), g, beta, head_dim**-0.5, None, cu_seqlens)
        output_gate = heads(F.linear(linear["out_latent"], linear["out_weight"])) if "out_latent" in linear else None
        return gated_norm_cuda(o, output_gate, norm_weight, 1e-5), state, *caches

    return run


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert torch.equal(got[name], x), name


@pytest.fixture
def emulated(kernels_on_the_cpu, monkeypatch):  # noqa: F811
    monkeypatch.setattr(plan, "architecture", lambda device: "sm_90a")
    monkeypatch.setattr(plan, "segment_count", lambda *sizes: 1)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.usefixtures("emulated")
class TestOnTheCPU:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("decay", "gated", "packed"),
        [("channel", True, False), ("head", True, True), ("none", False, False)],
    )
    def test_equals_its_pieces(self, decay, gated, packed):
        cu_seqlens = torch.tensor([0, 0, 20, 70], dtype=torch.int32) if packed else None
        inputs = kda_layer_inputs(1, 70, decay=decay, gated=gated)
        want = outputs_and_gradients(in_pieces(cu_seqlens=cu_seqlens), inputs)
        for save_for_backward in SAVED_FOR_BACKWARD:
            assert_equal(
                outputs_and_gradients(as_one(cu_seqlens=cu_seqlens, save_for_backward=save_for_backward), inputs), want
            )

    def test_keeps_its_inputs_alone(self):
        leaves = {name: x.requires_grad_() for name, x in kda_layer_inputs(1, 70).items()}
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
            y, *_ = as_one()(**leaves)
        assert {address for address in kept if address} <= {x.data_ptr() for x in leaves.values()}
        y.sum().backward()
        assert all(x.grad.isfinite().all() for x in leaves.values())

    @pytest.mark.parametrize("options", [{}, {"gate": "none", "output_gate": False}])
    def test_a_mixer_runs_it(self, options, monkeypatch):
        """With the output, the state and the gradients of the mixer in PyTorch, both of bf16 projections."""
        torch.manual_seed(0)
        layer, x, found, calls = KimiDeltaAttention(H * D, H, **options), torch.randn(1, 70, H * D), [], []
        layer.save_for_backward = "inputs"
        monkeypatch.setattr(mixer, "kda_layer_cuda", lambda *xs, **o: calls.append(1) or kda_layer_cuda(*xs, **o))
        for on_gpu in (False, True):
            monkeypatch.setattr(mixer, "kda_layer_runs", lambda *_, on_gpu=on_gpu: on_gpu)
            with torch.autocast("cpu", torch.bfloat16):
                y, state = layer(x)
            gradients = torch.autograd.grad(y.float().square().sum(), list(layer.parameters()))
            found.append((y, *state, *gradients))
        assert len(calls) == 1
        for got, want in zip(found[1], found[0], strict=True):
            assert got.dtype == want.dtype
            assert relative(got, want) < 3e-2
