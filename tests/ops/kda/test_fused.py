"""KDA from raw logits: the PyTorch path against its parts, the gate's kernels, run on the CPU, against float64."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from lkda.ops import KDAGate, kda_attention, kda_attention_fused, kda_gate
from lkda.ops.kda.cuda.gate import kda_gate_cuda
from lkda.ops.kda.reference.gate import kda_gate_torch
from tests.ops.cases import relative
from tests.ops.emulation import kernels_on_the_cpu  # noqa: F401
from tests.ops.layer_cases import assert_error_within_reference, outputs_and_gradients

FORMS = [("softplus", -5.0, False), ("bounded", -3.0, True)]


def gate_inputs(B, T, H, K, *, per_head=False, dtype=torch.bfloat16, spread=3.0):
    """Logits of every size; A and dt as a layer begins with."""
    generator = torch.Generator().manual_seed(0)
    shape = (H,) if per_head else (H, K)
    dt = torch.exp(torch.empty(*shape).uniform_(-7, -2, generator=generator)).flatten()
    return {
        "logits": (spread * torch.randn(B, T, *shape, generator=generator)).to(dtype),
        "strengths": torch.randn(B, T, H, generator=generator).to(dtype),
        "A_log": torch.empty(1, 1, H, 1).uniform_(1, 16, generator=generator).log(),
        "dt_bias": torch.log(torch.expm1(dt)),
    }


def gates(backend, K, form="softplus", lower_bound=-5.0, negative=False):
    def run(strengths, logits=None, A_log=None, dt_bias=None):
        gate = KDAGate(A_log, dt_bias, form, lower_bound, negative)
        return (kda_gate_torch if backend == "torch" else kda_gate_cuda)(logits, strengths, gate, head_dim=K)

    return run


def check_gates(inputs, K, *form):
    want = outputs_and_gradients(gates("torch", K, *form), {name: x.double() for name, x in inputs.items()})
    assert_error_within_reference(outputs_and_gradients(gates("cuda", K, *form), inputs), want)


@pytest.mark.parametrize("form", FORMS)
def test_the_gate_alone_equals_its_definition(form):
    inputs = gate_inputs(2, 5, 4, 32, dtype=torch.float32)
    gate = KDAGate(inputs["A_log"], inputs["dt_bias"], *form)
    logits, strengths = inputs["logits"], inputs["strengths"]
    want = kda_gate_torch(logits, strengths, gate, head_dim=32)
    assert all(torch.equal(got, x) for got, x in zip(kda_gate(logits, strengths, gate), want))
    mixed = kda_gate(logits, strengths.bfloat16(), gate)  # in the wider dtype
    assert torch.equal(mixed[0], want[0])
    with pytest.raises(ValueError, match=r"kda_gate: beta_logits must be \[B, T, H\] = \[2, 5, 4\]"):
        kda_gate(logits, strengths[..., :2], gate)


@pytest.mark.parametrize("per_head", [False, True])
def test_value_heads_have_gates_of_their_own(per_head):
    inputs = gate_inputs(1, 20, 4, 16, per_head=per_head, dtype=torch.float32)
    gate = KDAGate(inputs["A_log"], inputs["dt_bias"])
    q, k, v = (torch.randn(1, 20, heads, size) for heads, size in ((2, 16), (2, 16), (4, 8)))
    got, state = kda_attention_fused(q, k, v, inputs["logits"], inputs["strengths"], gate)
    q, k = q.repeat_interleave(2, 2), k.repeat_interleave(2, 2)
    want, final = kda_attention_fused(q, k, v, inputs["logits"], inputs["strengths"], gate)
    assert relative(got, want) < 1e-6
    assert relative(state, final) < 1e-6


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.usefixtures("kernels_on_the_cpu")
class TestGateKernels:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize(
        ("dtype", "K", "T", "per_head"),
        [
            (torch.bfloat16, 64, 200, False),
            (torch.float16, 128, 7, True),
            pytest.param(torch.float32, 32, 40, False, marks=pytest.mark.slow),
            pytest.param(torch.float32, 32, 40, True, marks=pytest.mark.long),
        ],
    )
    def test_forward_and_backward(self, dtype, K, T, per_head, form):
        check_gates(gate_inputs(2, T, 6, K, per_head=per_head, dtype=dtype), K, *form)

    def test_without_decay(self):
        strengths = gate_inputs(2, 40, 6, 32)["strengths"]
        assert not gates("cuda", 32)(strengths.requires_grad_())[0].any()

        def beta(backend):
            return lambda strengths: gates(backend, 32, "softplus", -5.0, True)(strengths)[1:]

        want = outputs_and_gradients(beta("torch"), {"strengths": strengths.double()})
        assert_error_within_reference(outputs_and_gradients(beta("cuda"), {"strengths": strengths}), want)

    def test_where_logits_are_large(self):
        """softplus keeps its digits where it is tiny, and is the identity where it is large."""
        inputs = gate_inputs(1, 50, 2, 32, dtype=torch.float32, spread=30.0)
        g, _ = gates("cuda", 32)(**inputs)
        exact, _ = gates("torch", 32)(**{name: x.double() for name, x in inputs.items()})
        kept = exact < -1e-37  # what float32 can hold
        assert ((g - exact).abs() / exact.abs())[kept].max() < 1e-5

    def test_strided_logits_and_gradients(self):
        inputs = gate_inputs(2, 20, 4, 32)
        want = outputs_and_gradients(gates("cuda", 32), inputs)
        strided = {name: x.transpose(0, 1).contiguous().transpose(0, 1) for name, x in inputs.items() if x.dim() > 1}
        got = outputs_and_gradients(gates("cuda", 32), inputs | strided)
        assert all(torch.equal(got[name], x) for name, x in want.items())
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        g, beta = gates("cuda", 32)(**leaves)
        (g.sum() + beta.sum()).backward()
        assert all(x.grad.isfinite().all() for x in leaves.values())

    def test_a_loss_of_beta_alone(self):
        leaves = {name: x.requires_grad_() for name, x in gate_inputs(2, 20, 4, 32, dtype=torch.float32).items()}
        _, beta = gates("cuda", 32)(**leaves)
        beta.sum().backward()
        assert leaves["logits"].grad.abs().max() == 0
        strengths = leaves["strengths"].detach()
        torch.testing.assert_close(leaves["strengths"].grad, strengths.sigmoid() * (1 - strengths.sigmoid()))


def layer_inputs(B=2, T=50, H=2, K=16, *, per_head=False, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(B, T, H, K, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    logits, strengths, A_log, dt_bias = gate_inputs(B, T, H, K, per_head=per_head, dtype=dtype).values()
    return {"q": q, "k": k, "v": v, "gate_logits": logits, "beta_logits": strengths, "A_log": A_log, "dt_bias": dt_bias}


def attention(A_log, dt_bias, *, form="softplus", lower_bound=-5.0, negative_eigenvalues=False, **inputs):
    """`kda_attention_fused`, of the gate's parameters one by one, so that each can have a gradient."""
    gate = KDAGate(A_log, dt_bias, form, lower_bound, negative_eigenvalues)
    return kda_attention_fused(**inputs, gate=gate)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(("gate", "lower_bound", "negative"), FORMS)
def test_is_the_attention_of_the_activated_inputs(gate, lower_bound, negative, per_head):
    inputs = layer_inputs(per_head=per_head)
    q, k, v, logits, strengths, A_log, dt_bias = inputs.values()
    raw = (logits if not per_head else logits.unsqueeze(-1)) + dt_bias.view(2, -1)
    A = A_log.exp().view(2, 1)
    g = lower_bound * torch.sigmoid(A * raw) if gate == "bounded" else -A * torch.log1p(torch.exp(raw))
    beta = torch.sigmoid(strengths) * (2 if negative else 1)
    norms = [F.normalize(x, dim=-1) for x in (q, k)]
    want = kda_attention(*norms, v, g.expand_as(q), beta)
    options = {"form": gate, "lower_bound": lower_bound, "negative_eigenvalues": negative}
    for got in (
        attention(**inputs, **options),
        attention(**inputs | {"q": norms[0], "k": norms[1]}, normalized=True, **options),
    ):
        assert relative(got[0], want[0]) < 1e-6
        assert relative(got[1], want[1]) < 1e-6


def test_without_logits_nothing_decays():
    q, k, v, _, strengths, *_ = layer_inputs().values()
    o, _ = kda_attention_fused(q, k, v, None, strengths, KDAGate(), normalized=True)
    want, _ = kda_attention(q, k, v, torch.zeros_like(q), strengths.sigmoid())
    assert torch.equal(o, want)


@pytest.mark.slow  # imports torch._dynamo
def test_one_compiled_function_takes_heads_of_several_sizes():
    run = torch.compile(kda_attention, backend="eager", fullgraph=True)
    for K in (8, 16, 32):
        q, k, v, g = (torch.randn(1, 20, 2, K) for _ in range(4))
        inputs = (q, F.normalize(k, dim=-1), v, -g.abs(), torch.rand(1, 20, 2))
        assert torch.equal(run(*inputs)[0], kda_attention(*inputs)[0])


@pytest.mark.slow  # imports torch._dynamo
def test_a_gate_made_in_a_compiled_function_breaks_no_graph():
    inputs = gate_inputs(1, 4, 2, 8, dtype=torch.float32)
    run = gates("torch", 8, "bounded", -3.0, True)
    got = torch.compile(run, backend="eager", fullgraph=True)(**inputs)
    assert all(torch.equal(x, y) for x, y in zip(got, run(**inputs), strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "linear"}, "form must be one of softplus, bounded, got 'linear'"),
        ({"lower_bound": -6.0}, r"lower_bound must be in \[-5, 0\), got -6.0"),
        ({"A_log": None}, "dt_bias needs A_log too"),
        ({"gate_logits": None}, "gate_logits, A_log and dt_bias come together"),
        ({"dt_bias": torch.zeros(3)}, r"A_log must hold 2 numbers and dt_bias 32, got .* and \[3\]"),
        ({"gate_logits": torch.zeros(2, 50, 2, 5)}, "gate_logits must be"),
        ({"beta_logits": torch.zeros(2, 50, 3)}, "beta_logits must be"),
        ({"backend": "cuda"}, "not on a CUDA device"),
    ],
)
def test_what_does_not_fit_is_said(changes, message):
    with pytest.raises(ValueError, match=message):
        attention(**layer_inputs() | changes)
