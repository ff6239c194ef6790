"""lkda in flash-linear-attention's registries, on a CPU, where FLA's own kernels do not run."""

from __future__ import annotations

import logging
import re
import shutil

import pytest
import torch
import torch.nn.functional as F

from lkda.bench import fla_tests
from lkda.integrations import fla as integration
from tests.ops.cases import relative
from tests.ops.emulation import kernels_on_the_cpu  # noqa: F401

pytest.importorskip("triton", reason="FLA needs triton, also where its kernels do not run")
pytest.importorskip("fla.ops.kda", reason="flash-linear-attention is not installed", exc_type=ImportError)

from fla.layers import KimiDeltaAttention
from fla.models import KDAConfig, KDAForCausalLM
from fla.modules import FusedRMSNormGated, GatedMLP, RMSNorm, ShortConvolution
from fla.modules.activations import swiglu
from fla.ops.kda import chunk_kda, fused_recurrent_kda
from fla.ops.kda.fused_recurrent import fused_recurrent_kda_fwd
from fla.ops.kda.gate import naive_kda_gate, naive_kda_lowerbound_gate
from fla.ops.kda.naive import naive_recurrent_kda

from lkda.integrations import fla_backends

B, T, H, K = 2, 40, 2, 32


@pytest.fixture(autouse=True)
def registered():
    integration.register()
    yield
    integration.unregister()


def inputs(HV=H, V=K, *, B=B):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "q": normal(B, T, H, K),
        "k": normal(B, T, H, K),
        "v": normal(B, T, HV, V),
        "g": normal(B, T, HV, K),
        "beta": normal(B, T, HV),
    }


def parameters(HV=H):
    generator = torch.Generator().manual_seed(1)
    return {
        "A_log": torch.rand(HV, generator=generator),
        "dt_bias": torch.randn(HV * K, generator=generator),
    }


FROM_LOGITS = {
    "use_qk_l2norm_in_kernel": True,
    "use_gate_in_kernel": True,
    "use_beta_sigmoid_in_kernel": True,
    "output_final_state": True,
}


def naive(q, k, v, g, beta, *, A_log=None, dt_bias=None, lower_bound=None, twice=False, initial_state=None, **options):
    """FLA's own recurrence in PyTorch, from logits."""
    if lower_bound is None:
        g = naive_kda_gate(g, A_log, dt_bias)
    else:
        g = naive_kda_lowerbound_gate(g, A_log, dt_bias, lower_bound)
    beta = (2 if twice else 1) * beta.sigmoid()
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    return naive_recurrent_kda(q, k, v, g, beta, initial_state=initial_state, output_final_state=True, **options)


def results(op, tensors, **options):
    """o, the state and the gradients of all tensors."""
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    o, state = op(**leaves, **options)
    generator = torch.Generator().manual_seed(2)
    loss = (o * torch.randn(o.shape, generator=generator)).sum()
    loss = loss + (state * torch.randn(state.shape, generator=generator)).sum()
    return [o, state, *torch.autograd.grad(loss, list(leaves.values()))]


def same(got, want, tolerance=1e-5):
    assert [relative(x, y) < tolerance for x, y in zip(got, want, strict=True)] == [True] * len(want)


def reason(caplog, op, *args, **options):
    """Why a call was declined. FLA's own code then ran, which fails on a CPU or refuses the arguments."""
    with caplog.at_level(logging.INFO, "fla.backends"), pytest.raises(Exception):  # noqa: B017
        op(*args, **options)
    return next(record.getMessage() for record in caplog.records if "lkda rejected" in record.getMessage())


class TestChunkKDA:
    @pytest.mark.parametrize("HV", [2, 4])
    @pytest.mark.parametrize("gate", [{}, {"lower_bound": -4.0, "safe_gate": True}])
    def test_from_logits(self, gate, HV):
        tensors = inputs(HV) | parameters(HV) | {"initial_state": torch.randn(B, HV, K, K)}
        got = results(chunk_kda, tensors, **FROM_LOGITS, **gate)
        same(got, results(naive, tensors, lower_bound=gate.get("lower_bound")))

    def test_from_gates_with_values_of_another_size(self):
        tensors = inputs(V=16)
        tensors |= {"g": -tensors["g"].abs(), "beta": tensors["beta"].sigmoid()}
        tensors |= {name: F.normalize(tensors[name], dim=-1) for name in ("q", "k")}
        got = results(chunk_kda, tensors, scale=0.3, output_final_state=True)
        same(got, results(naive_recurrent_kda, tensors, scale=0.3, output_final_state=True))

    def test_negative_eigenvalues_and_a_gate_without_its_parameters(self):
        tensors = inputs()
        got = results(chunk_kda, tensors, **FROM_LOGITS, allow_neg_eigval=True, lower_bound=-3.0)
        same(got, results(naive, tensors, lower_bound=-3.0, twice=True))

    def test_beta_from_logits_alone(self):
        tensors = inputs()
        tensors["g"] = -tensors["g"].abs()
        options = {"use_qk_l2norm_in_kernel": True, "output_final_state": True}
        got = results(chunk_kda, tensors, **options, use_beta_sigmoid_in_kernel=True)
        want = results(lambda beta, **rest: chunk_kda(beta=beta.sigmoid(), **rest), tensors, **options)
        same(got, want)

    def test_packed_sequences_and_states_with_v_first(self):
        tensors = inputs(B=1) | parameters()
        states = torch.randn(3, H, K, K)
        bounds = torch.tensor([0, 12, 12, T])
        o, final = chunk_kda(
            **tensors, **FROM_LOGITS, initial_state=states.mT.contiguous(), state_v_first=True, cu_seqlens=bounds
        )
        assert final.is_contiguous()
        for n, (start, end) in enumerate([(0, 12), (12, T)]):
            rows = {name: tensors[name][:, start:end] for name in ("q", "k", "v", "g", "beta")}
            want, state = naive(**rows, **parameters(), initial_state=states[2 * n : 2 * n + 1])
            same([o[:, start:end], final[2 * n].mT], [want, state[0]])

    def test_no_final_state_unless_asked(self):
        assert chunk_kda(**inputs(), **parameters(), use_gate_in_kernel=True)[1] is None

    def test_states_before_chunks(self):
        tensors = inputs() | parameters()
        options = FROM_LOGITS | {"state_v_first": True, "chunk_size": 32}
        with torch.inference_mode():
            o, final, states = chunk_kda(**tensors, **options, return_intermediate_states=True)
        assert (states.shape, states.dtype) == ((B, 2, H, K, K), torch.bfloat16)
        rows = {name: x[:, :32] if name in inputs() else x for name, x in tensors.items()}
        _, want = naive(**rows)
        same([states[:, 1].mT.float()], [want], 1e-2)
        same([o, final.mT], naive(**tensors))


class TestFusedRecurrentKDA:
    @pytest.mark.parametrize("tokens", [1, 5])
    @pytest.mark.parametrize("HV", [2, 4])
    def test_from_logits(self, HV, tokens):
        tensors = {name: x[:, :tokens] for name, x in inputs(HV).items()}
        state = torch.randn(B, HV, K, K)
        before = state.mT.contiguous()
        o, final = fused_recurrent_kda(
            **tensors, **parameters(HV), **FROM_LOGITS, initial_state=before, state_v_first=True
        )
        same([o, final.mT], naive(**tensors, **parameters(HV), initial_state=state))
        assert torch.equal(before, state.mT)  # not written

    @pytest.mark.parametrize("tokens", [1, 5])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_the_final_state_is_in_float32_whatever_the_initial_one_is_in(self, dtype, tokens):
        tensors = {name: x[:, :tokens] for name, x in inputs().items()}
        state = torch.randn(B, H, K, K).to(dtype)
        o, final = fused_recurrent_kda(**tensors, **parameters(), **FROM_LOGITS, initial_state=state)
        assert final.dtype == torch.float32
        same([o, final], naive(**tensors, **parameters(), initial_state=state.float()))

    def test_into_a_given_tensor(self):
        tensors = inputs() | parameters()
        out = torch.empty_like(tensors["v"])
        found, _ = fused_recurrent_kda_fwd(**tensors, **FROM_LOGITS, inplace_final_state=False, out=out)
        assert found is out
        same([out], naive(**tensors)[:1])


class TestDeclined:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"use_graph": True}, "does not read the padded cu_seqlens of use_graph"),
            ({"chunk_size": 16}, "FLA refuses this chunk_size"),
            ({"return_intermediate_states": True}, "outside inference mode"),
            ({"initial_state": torch.zeros(B, H, K, K).double()}, "refuses an initial_state of torch.float64"),
            ({"allow_neg_eigval": True}, "without use_beta_sigmoid_in_kernel"),
            ({"use_gate_in_kernel": True}, "without A_log and lower_bound"),
            ({"use_gate_in_kernel": True, "lower_bound": -9.0}, r"lower_bound in \[-5, 0\), got -9.0"),
            ({"use_gate_in_kernel": True, "safe_gate": True}, "safe_gate without lower_bound"),
            ({"something_new": 1}, "lkda does not know the argument something_new"),
            ({"beta": torch.zeros(B, T, 3)}, r"beta \[2, 40, 2\], got .* and \[2, 40, 3\]"),
            ({"v": torch.zeros(B, T, 3, K)}, "the shapes of q, k and v do not fit"),
            ({"v": torch.zeros(B, T, H, K).double()}, "of four axes and one dtype"),
            ({name: x[:, :0] for name, x in inputs().items()}, "takes one token at least"),
        ],
    )
    def test_calls_that_lkda_cannot_do_name_the_reason(self, options, message, caplog, fresh_log):
        assert re.search(message, reason(caplog, chunk_kda, **inputs() | options))

    def test_decoding_by_index_is_declined(self, caplog, fresh_log):
        tensors = inputs() | parameters() | {"initial_state": torch.zeros(B, H, K, K)}
        assert "in place or by index" in reason(caplog, fused_recurrent_kda_fwd, **tensors)

    @pytest.fixture
    def fresh_log(self):
        """FLA logs a reason once per function."""
        from fla import backends

        for registry in (*backends._operation_registries.values(), *backends._function_registries.values()):
            registry._logged.clear()


class TestConvolution:
    @staticmethod
    def want(x, weight, state):
        window = torch.cat([state, x.mT], 2)
        width = weight.shape[-1]
        y = F.silu(F.conv1d(window[..., 1:], weight, groups=len(weight)))
        return y.mT, window[..., -width:]

    @pytest.mark.parametrize("tokens", [2, 20])
    def test_it_carries_a_cache(self, tokens):
        layer = ShortConvolution(64, 4)
        tensors = {"x": torch.randn(B, tokens, 64), "weight": layer.weight.detach(), "state": torch.randn(B, 64, 4)}

        def op(x, weight, state):
            return torch.func.functional_call(
                layer, {"weight": weight}, (x,), {"cache": state, "output_final_state": True}
            )

        same(results(op, tensors), results(self.want, tensors))

    def test_packed_sequences(self):
        layer, x, bounds = ShortConvolution(64, 4), torch.randn(1, 20, 64), [0, 2, 2, 20]
        y, states = layer(x, output_final_state=True, cu_seqlens=torch.tensor(bounds))
        for n, (start, end) in enumerate(zip(bounds, bounds[1:])):
            want, state = (
                self.want(x[:, start:end], layer.weight, torch.zeros(1, 64, 4)) if end > start else (None, None)
            )
            if want is None:
                assert not states[n].any()
                continue
            same([y[:, start:end], states[n]], [want, state[0]])

    @torch.no_grad()
    def test_one_token_updates_the_cache_in_place(self):
        layer, x, cache = ShortConvolution(64, 4), torch.randn(B, 1, 64), torch.randn(B, 64, 4)
        want, state = self.want(x, layer.weight, cache)
        y, found = layer(x, cache=cache, output_final_state=True)
        assert found is cache
        same([y, cache], [want, state])

    def test_a_convolution_with_a_bias_is_declined(self, caplog):
        found = reason(caplog, ShortConvolution(64, 4, bias=True), torch.randn(B, 8, 64))
        assert "neither a bias nor a residual" in found


class TestGatedNorm:
    def test_it_is_an_rmsnorm_with_a_sigmoid(self):
        layer = FusedRMSNormGated(K, activation="sigmoid", eps=1e-3)
        x, g = (torch.randn(B, 5, H, K, requires_grad=True) for _ in range(2))
        got, want = layer(x, g), F.rms_norm(x, (K,), layer.weight, 1e-3) * g.sigmoid()
        leaves = (x, g, layer.weight)
        found = [torch.autograd.grad(y.square().sum(), leaves) for y in (got, want)]
        same([got, *found[0]], [want, *found[1]])

    def test_swish_is_declined(self, caplog):
        layer = FusedRMSNormGated(K, activation="swish")
        assert "got activation='swish'" in reason(caplog, layer, torch.randn(B, 5, K), torch.randn(B, 5, K))


def rms(x, residual, weight, eps):
    """The norm of the sum, and the sum, in the dtypes of FLA."""
    total = x if residual is None else x + residual
    return F.rms_norm(total.double(), weight.shape, weight.double(), eps).to(x.dtype), total


class TestNorm:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("adds", [False, True])
    def test_of_a_residual_sum(self, adds, dtype):
        self.check(adds, dtype)

    @staticmethod
    def check(adds, dtype):
        layer = RMSNorm(64, eps=1e-3)
        torch.nn.init.normal_(layer.weight)
        x = torch.randn(B, 5, 64).to(dtype).requires_grad_()
        residual = torch.randn(B, 5, 64, requires_grad=True) if adds else None
        leaves = [x, layer.weight, *([residual] if adds else [])]
        pairs = [layer(x, residual, True), rms(x, residual, layer.weight, 1e-3)]
        found = [torch.autograd.grad(y.square().sum() + s.sin().sum(), leaves) for y, s in pairs]
        assert [y.dtype for y in pairs[0]] == [y.dtype for y in pairs[1]]
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        same([*pairs[0], *found[0]], [*pairs[1], *found[1]], tolerance)

    def test_a_bias_is_declined(self, caplog):
        assert "without a bias" in reason(caplog, RMSNorm(64, bias=True), torch.randn(B, 5, 64))

    def test_a_residual_that_is_narrower_is_declined(self):
        x = torch.randn(5, 64)
        found = fla_backends._rms_fwd_declined({"x": x, "residual": x.bfloat16(), "residual_dtype": None})
        assert found == "the sum of lkda's norm has the wider dtype of x and the residual"


class TestSwiGLU:
    def test_it_is_the_product_of_a_silu(self):
        layer = GatedMLP(hidden_size=16, intermediate_size=24)
        x, leaves = torch.randn(B, 5, 16, requires_grad=True), list(layer.parameters())
        want = layer.down_proj(F.silu(layer.gate_proj(x)) * layer.up_proj(x))
        got = layer(x)
        found = [torch.autograd.grad(y.square().sum(), [x, *leaves]) for y in (got, want)]
        same([got, *found[0]], [want, *found[1]])

    def test_with_frozen_weights_and_rows_that_lie_apart(self):
        x, y = (torch.randn(B, 5, 48)[..., :24].requires_grad_() for _ in range(2))
        got, want = swiglu(x, y), F.silu(x) * y
        found = [torch.autograd.grad(z.square().sum(), (x, y)) for z in (got, want)]
        same([got, *found[0]], [want, *found[1]])

    def test_two_dtypes_are_declined(self, caplog):
        x = torch.randn(B, 5, 24)
        assert "tensors of one shape and dtype" in reason(caplog, swiglu, x, x.half())


def test_flas_own_layer_trains_and_decodes():
    """Its convolutions, gate, KDA and gated norm all run lkda's code: FLA's has no CPU form."""
    layer = KimiDeltaAttention(hidden_size=64, head_dim=32, num_heads=2, layer_idx=0)
    x = torch.randn(B, 10, 64)
    want, _, _ = layer(x)
    want.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())
    mask = torch.ones(B, 10, dtype=torch.long)
    mask[0, :3] = 0
    alone, _, _ = layer(x[:1, 3:])
    masked, _, _ = layer(x, attention_mask=mask)
    same([masked[:1, 3:], masked[1:]], [alone, want[1:]])


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
class TestKernelsCalledDirectly:
    """On a GPU the convolution and the norm call the kernels, without lkda's autograd. Here their source runs."""

    @pytest.fixture(autouse=True)
    def on_a_gpu(self, kernels_on_the_cpu, monkeypatch):  # noqa: F811
        monkeypatch.setattr(fla_backends, "_runs_kernels", lambda *tensors: True)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("bounds", [None, [0, 7, 7, 40]])
    def test_convolution(self, bounds, dtype):
        layer, rows = ShortConvolution(64, 4), B if bounds is None else 1
        x = torch.randn(rows, T, 64).to(dtype).requires_grad_()
        got, states = layer(x, cu_seqlens=None if bounds is None else torch.tensor(bounds), output_final_state=True)
        parts = x.double().split([b - a for a, b in zip(bounds, bounds[1:])] if bounds else T, 1)
        weight, state = layer.weight.double(), torch.zeros(rows, 64, 4, dtype=torch.float64)
        want = torch.cat([TestConvolution.want(part, weight, state)[0] for part in parts if part.shape[1]], 1)
        assert torch.equal(states[-1, :, -4:], x[-1, -4:].mT)
        found = [torch.autograd.grad(y.square().sum(), (x, layer.weight)) for y in (got, want)]
        assert got.dtype == dtype
        same([got.double(), *found[0]], [want, *found[1]], 1e-5 if dtype == torch.float32 else 1e-2)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_gated_norm(self, dtype):
        layer = FusedRMSNormGated(K, activation="sigmoid", eps=1e-3)
        x, g = (torch.randn(B, 5, H, K).to(dtype).requires_grad_() for _ in range(2))
        got = layer(x, g)
        want = F.rms_norm(x.double(), (K,), layer.weight.double(), 1e-3) * g.double().sigmoid()
        found = [torch.autograd.grad(y.square().sum(), (x, g, layer.weight)) for y in (got, want)]
        assert got.dtype == dtype
        same([got.double(), *found[0]], [want, *found[1]], 1e-5 if dtype == torch.float32 else 1e-2)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("adds", [False, True])
    def test_norm(self, adds, dtype):
        TestNorm.check(adds, dtype)


def test_calls_of_flas_tests_are_counted_in_its_registries(tmp_path):
    """As `lkda.bench.fla_tests` counts them, whose other tests need no FLA."""
    file = tmp_path / fla_tests.TESTS
    file.parent.mkdir(parents=True)
    file.write_text(
        "import pytest, torch\n"
        "from fla.ops.kda import chunk_kda, fused_recurrent_kda\n"
        "x, beta = torch.ones(1, 4, 2, 32), torch.ones(1, 4, 2)\n"
        "def test_computed():\n"
        "    chunk_kda(x, x, x, -x, beta)\n"
        "    fused_recurrent_kda(x, x, x, -x, beta)\n"
        "def test_declined():\n"
        "    chunk_kda(x, x, x, -x, beta)\n"
        "    with pytest.raises(ValueError):\n"
        "        chunk_kda(x, x, x, -x, beta, chunk_size=16)\n"
    )
    found, _ = fla_tests.run(tmp_path, fla_tests.registered_backends(), lambda results: None)
    assert [(test.test, test.result, test.calls, test.declined) for test in found] == [
        ("test_computed", "passed", {"chunk_kda": 1, "fused_recurrent_kda_fwd": 1}, {}),
        ("test_declined", "declined", {"chunk_kda": 1}, {"chunk_kda: FLA refuses this chunk_size": 1}),
    ]


def test_missing_and_surplus_arguments_are_said_as_python_does():
    with pytest.raises(TypeError, match="missing a required argument: 'v'"):
        fla_backends._arguments("chunk_kda", (torch.zeros(1),), {"k": torch.zeros(1)})
    with pytest.raises(TypeError, match="too many positional arguments"):
        fla_backends._arguments("swiglu_fwd", (None,) * 4, {})


@torch.no_grad()
def test_flas_own_model_continues_a_cache():
    """Its loss in PyTorch, since FLA's has no CPU form."""
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_heads": 2, "num_v_heads": 4, "head_dim": 16}
    model = KDAForCausalLM(KDAConfig(**sizes, **heads, fuse_cross_entropy=False)).eval()
    x, cache, found = torch.randint(3, 50, (B, 80)), None, []
    for part in x.split([10, 66, 1, 1, 2], 1):
        results = model(input_ids=part, past_key_values=cache, use_cache=True)
        cache = results.past_key_values
        found.append(results.logits)
    same([torch.cat(found, 1)], [model(input_ids=x, use_cache=False).logits])


class TestRegister:
    def test_parts_are_chosen(self, caplog):
        integration.unregister()
        integration.register(["norm"])
        FusedRMSNormGated(K, activation="sigmoid")(torch.randn(3, K), torch.randn(3, K))
        with pytest.raises(Exception, match=r"driver|Triton|triton|CUDA"):
            chunk_kda(**inputs())

    def test_it_can_be_undone(self):
        integration.unregister()
        integration.unregister()
        with pytest.raises(Exception, match=r"driver|Triton|triton|CUDA"):
            chunk_kda(**inputs())

    def test_another_signature_is_named(self, monkeypatch):
        import fla.ops.kda.chunk

        def chunk_kda(q, k, v, g, beta, scale=None, **kwargs):
            raise AssertionError

        # `registered` undoes the registration before `monkeypatch` would undo this.
        with monkeypatch.context() as patch:
            patch.setattr(fla.ops.kda.chunk, "chunk_kda", chunk_kda)
            with pytest.raises(ValueError, match=r"chunk_kda has no argument allow_neg_eigval, .*; lkda knows"):
                integration.register()

    def test_a_missing_function_is_named(self, monkeypatch):
        import fla.ops.kda.chunk

        with monkeypatch.context() as patch:
            patch.delattr(fla.ops.kda.chunk, "chunk_kda")
            with pytest.raises(ValueError, match=r"the installed FLA has no fla.ops.kda.chunk.chunk_kda"):
                integration.register()

    def test_a_registry_that_is_off_is_named(self, monkeypatch):
        import fla.backends

        with monkeypatch.context() as patch:
            patch.setattr(fla.backends, "_DISPATCH_DISABLED", True)
            with pytest.raises(ValueError, match="FLA_DISABLE_BACKEND_DISPATCH=1 switches FLA's backends off"):
                integration.register()
