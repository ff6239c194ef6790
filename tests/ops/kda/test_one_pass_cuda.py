"""chunk_fwd.cu and chunk_fwd_pair.cu on a GPU: what only a GPU can show."""

import pytest
import torch

from lkda.ops import kda_attention
from lkda.ops.kda.cuda import core, plan
from tests.ops.cases import kda_inputs, poisoned, relative
from tests.ops.kda.test_one_pass import TENSORS, same_bits, truth


@pytest.fixture
def on_and_off(monkeypatch):
    """A function that calls `kda_attention` with one kernel, or with two."""

    def call(inputs, one_pass=True):
        monkeypatch.setattr(core, "ONE_PASS", one_pass)
        monkeypatch.setattr(core, "PAIR", one_pass)
        with poisoned(), torch.no_grad():
            return kda_attention(**inputs, backend="cuda")

    return call


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="no Hopper GPU: the kernel is emulated, not run",
)
class TestOnAGPU:
    @pytest.fixture(autouse=True, params=[64, 128], ids="D{}".format)
    def head_size(self, request):
        self.D = request.param

    def inputs(self, T, *, B=2, H=64, gate="slow", dtype=torch.bfloat16, seed=0):
        drawn = kda_inputs(B, T, H, self.D, self.D, gate=gate, dtype=dtype, seed=seed)
        inputs = {name: x.cuda() for name, x in drawn.items()}
        assert plan.plan_of(inputs["v"], None).chunk_fwd is not None
        return inputs

    @pytest.mark.parametrize("T", [1, 15, 64, 65, 128, 129, 1000])
    @pytest.mark.parametrize("gate", ["slow", "fast", "mixed", "resets", "brutal", "zero"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_errs_at_most_1_3_times_as_much_as_the_two_kernels(self, dtype, gate, T, on_and_off):
        inputs = self.inputs(T, gate=gate, dtype=dtype)
        one, two = on_and_off(inputs), on_and_off(inputs, one_pass=False)
        for got, other, want in zip(one, two, truth(*inputs.values()), strict=True):
            assert relative(got, want) <= max(1.3 * relative(other, want), 1e-4)

    @pytest.mark.parametrize(("B", "T", "H"), [(8, 2048, 16), (3, 1000, 44), (16, 300, 32)])
    def test_bitwise_equal_from_run_to_run(self, B, T, H, on_and_off):
        """The last shape has more blocks than multiprocessors."""
        inputs = self.inputs(T, B=B, H=H)
        first = on_and_off(inputs)
        for _ in range(10):
            assert all(torch.equal(x, y) for x, y in zip(on_and_off(inputs), first, strict=True))

    def test_future_tokens_never_change_past_outputs(self, on_and_off):
        one, two = self.inputs(300, seed=0), self.inputs(300, seed=1)
        o, _ = on_and_off(one)
        for t in (1, 7, 64, 100, 191):
            mixed = {name: torch.cat([one[name][:, :t], two[name][:, t:]], 1) for name in TENSORS}
            assert torch.equal(on_and_off(mixed | {"initial_state": one["initial_state"]})[0][:, :t], o[:, :t]), t

    def test_a_state_carries_on(self, on_and_off):
        inputs = self.inputs(333)
        whole, final = on_and_off(inputs)
        state, parts = inputs.pop("initial_state"), []
        for tokens in (slice(0, 100), slice(100, 101), slice(101, 333)):
            o, state = on_and_off({name: x[:, tokens] for name, x in inputs.items()} | {"initial_state": state})
            parts.append(o)
        assert relative(torch.cat(parts, 1), whole) < 5e-3
        assert relative(state, final) < 2e-3

    def test_strided_inputs(self, on_and_off):
        inputs = self.inputs(200)
        strided = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in inputs.items()}
        assert all(torch.equal(x, y) for x, y in zip(on_and_off(strided), on_and_off(inputs), strict=True))

    def test_compiles_without_a_graph_break(self, on_and_off):
        inputs = self.inputs(200)
        want = on_and_off(inputs)
        with torch.no_grad():
            got = torch.compile(lambda **given: kda_attention(**given, backend="auto"), fullgraph=True)(**inputs)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))

    def test_replays_in_a_cuda_graph(self, on_and_off):
        inputs = self.inputs(200)
        on_and_off(inputs)  # compiles and loads the kernel
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            captured = kda_attention(**inputs, backend="cuda")
        for name in ("q", "k", "v"):
            inputs[name].copy_(inputs[name].flip(1))
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(x, y) for x, y in zip(captured, on_and_off(inputs), strict=True))

    def test_a_forward_with_a_gradient_has_the_bits_of_the_two_kernels(self, on_and_off):
        inputs = self.inputs(200)
        want = on_and_off(inputs, one_pass=False)
        on_and_off(inputs)
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        got = kda_attention(**leaves, backend="cuda")
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="no Hopper GPU: the kernel is emulated, not run",
)
class TestSavesOnAGPU:
    """All results and gradients have the bits of the two kernels."""

    def results(self, inputs, saves, monkeypatch, **options):
        monkeypatch.setattr(core, "PAIR_SAVES", saves)
        leaves = [None if x is None else x.detach().requires_grad_() for x in inputs.values()]
        assert plan.plan_of(leaves[2], None).chunk_fwd_saves is not None
        with poisoned():
            o, final = core.kda_cuda(*leaves[:5], 128**-0.5, leaves[5], None, **options)
            loss = (o.float() * inputs["v"].float()).sum() + final.square().sum()
            return o, final, *torch.autograd.grad(loss, [x for x in leaves if x is not None])

    def inputs(self, T, *, B=2, H=32, gate="slow", dtype=torch.bfloat16):
        return {name: x.cuda() for name, x in kda_inputs(B, T, H, 128, 128, gate=gate, dtype=dtype).items()}

    @pytest.mark.parametrize("T", [1, 15, 64, 65, 129, 1000])
    @pytest.mark.parametrize("gate", ["slow", "fast", "mixed", "resets", "brutal", "zero"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_all_bits_of_the_two_kernels(self, dtype, gate, T, monkeypatch):
        inputs = self.inputs(T, gate=gate, dtype=dtype)
        got, want = (self.results(inputs, saves, monkeypatch) for saves in (True, False))
        assert all(same_bits(x, y) for x, y in zip(got, want, strict=True))

    @pytest.mark.parametrize("options", [{"normalize": True}, {"recompute": True}], ids=str)
    def test_options(self, options, monkeypatch):
        inputs = self.inputs(300) | {"initial_state": None}
        got, want = (self.results(inputs, saves, monkeypatch, **options) for saves in (True, False))
        assert all(same_bits(x, y) for x, y in zip(got, want, strict=True))

    def test_a_large_value_late(self, monkeypatch):
        inputs = self.inputs(300)
        inputs["v"][:, 250] *= 2.0**20
        got, want = (self.results(inputs, saves, monkeypatch) for saves in (True, False))
        assert all(same_bits(x, y) for x, y in zip(got, want, strict=True))

    @pytest.mark.parametrize(("B", "T", "H"), [(8, 2048, 8), (3, 1000, 20), (16, 300, 16)])
    def test_the_same_in_every_run(self, B, T, H, monkeypatch):
        """The last shape has more blocks than multiprocessors."""
        inputs = self.inputs(T, B=B, H=H)
        first = self.results(inputs, False, monkeypatch)
        for _ in range(5):
            got = self.results(inputs, True, monkeypatch)
            assert all(same_bits(x, y) for x, y in zip(got, first, strict=True))
