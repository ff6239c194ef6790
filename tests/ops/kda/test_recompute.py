"""`recompute`: the backward computes the workspaces again. All results are the same bits, and fewer bytes are kept."""

from __future__ import annotations

import pytest
import torch

from lkda.ops import KDAGate, kda_attention, kda_attention_fused
from lkda.ops.kda.cuda import core as cuda
from lkda.ops.kda.cuda import plan as cuda_plan
from lkda.ops.kda.cuda.plan import sizes_of
from lkda.ops.short_conv import cuda as short_conv
from tests.ops.cases import kda_inputs, poisoned, small_kda_inputs
from tests.ops.emulation import EMULATED, NEEDS_A_GPU, kernels_on_the_cpu, ops_run_on_the_cpu  # noqa: F401
from tests.ops.rounded_reference import outputs_and_gradients

PACKED = [0, 0, 5, 69, 69, 169, 170, 600, 601, 700, 700]


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert torch.equal(got[name], x), name


def emulated_op(*, normalize=False):
    """`kda_cuda` with arguments by name."""

    def run(*, initial_state=None, cu_seqlens=None, recompute, **given):
        scale = given["q"].shape[3] ** -0.5
        options = {"normalize": normalize, "recompute": recompute}
        return cuda.kda_cuda(**given, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens, **options)

    return run


def kept_bytes(op, inputs, **options):
    """Bytes of the tensors that autograd saves of a call, each memory counted once."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.update({x.data_ptr(): x.nbytes}) or x, lambda x: x):
        op(**leaves, **options)
    return sum(kept.values())


@pytest.mark.parametrize("backend", ["cpu", "chunk", "recurrent"])
def test_other_backends_take_it_without_an_effect(backend):
    inputs = kda_inputs(1, 20, 1, 16, 16)
    got, want = (
        outputs_and_gradients(kda_attention, inputs, backend=backend, recompute=recompute)
        for recompute in (True, False)
    )
    assert_equal(got, want)


@pytest.fixture
def on_the_cpu(kernels_on_the_cpu, monkeypatch):  # noqa: F811
    monkeypatch.setattr(cuda_plan, "architecture", lambda device: "sm_90a")
    monkeypatch.setattr(cuda_plan, "segment_count", lambda *sizes: 1)


@pytest.mark.usefixtures("on_the_cpu")
class TestOnTheCPU:
    pytestmark = EMULATED[:1]

    @pytest.mark.parametrize(
        ("T", "D", "packed", "state", "segments", "normalize"),
        [
            pytest.param(70, 32, False, True, 1, False, marks=pytest.mark.long),
            (70, 32, True, True, 1, True),
            pytest.param(300, 32, False, False, 4, True, marks=pytest.mark.slow),
            pytest.param(70, 128, True, True, 1, True, marks=pytest.mark.long),
        ],
    )
    def test_same_bits(self, T, D, packed, state, segments, normalize, monkeypatch):
        monkeypatch.setattr(cuda_plan, "segment_count", lambda *sizes: segments)
        inputs, options = small_kda_inputs(T, D, packed=packed, state=state)
        op = emulated_op(normalize=normalize)
        got, want = (outputs_and_gradients(op, inputs, **options, recompute=recompute) for recompute in (True, False))
        assert_equal(got, want)

    @pytest.mark.parametrize("normalize", [False, True])
    def test_the_workspaces_are_not_kept(self, normalize):
        inputs = kda_inputs(1, 70, 2, 32, 32, dtype=torch.bfloat16)
        op = emulated_op(normalize=normalize)
        with_them, without = (kept_bytes(op, inputs, recompute=recompute) for recompute in (False, True))
        assert with_them - without == sizes_of(inputs["v"], None).workspaces

    def test_a_second_backward_through_a_kept_graph(self):
        inputs = {n: x.requires_grad_() for n, x in kda_inputs(1, 70, 2, 32, 32, dtype=torch.bfloat16).items()}
        loss = emulated_op()(**inputs, recompute=True)[0].float().square().sum()
        leaves = list(inputs.values())
        first, second = (torch.autograd.grad(loss, leaves, retain_graph=keep) for keep in (True, False))
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))

    def test_strided_inputs(self):
        inputs = kda_inputs(1, 70, 2, 32, 32, dtype=torch.bfloat16)
        strided = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in inputs.items()}
        got = outputs_and_gradients(emulated_op(), strided, recompute=True)
        assert_equal(got, outputs_and_gradients(emulated_op(), inputs, recompute=False))

    @pytest.mark.slow  # imports torch._dynamo
    @pytest.mark.parametrize("normalize", [False, True])
    def test_traced_in_one_graph_whose_backward_computes_them(self, normalize):
        """The compiler's partitioner could move what depends on the inputs alone into the forward, and keep it."""
        inputs = kda_inputs(1, 70, 2, 32, 32, dtype=torch.bfloat16)
        op = emulated_op(normalize=normalize)
        want = outputs_and_gradients(op, inputs, recompute=False)
        launches = {
            "kda_forward": cuda._forward_op,
            "kda_workspaces": cuda.launch_workspaces,
            "kda_inter_chunk_bwd": cuda._inter_chunk_bwd_op,
            "kda_intra_chunk_bwd": cuda.launch_intra_chunk_bwd,
            "short_conv_forward": short_conv.launch_forward,
            "short_conv_backward": short_conv.launch_backward,
        }
        with ops_run_on_the_cpu(**launches):
            for backend in ("aot_eager", "aot_eager_decomp_partition"):
                traced = torch.compile(op, backend=backend, fullgraph=True)
                assert_equal(outputs_and_gradients(traced, inputs, recompute=True), want)
                kept = {recompute: kept_bytes(traced, inputs, recompute=recompute) for recompute in (False, True)}
                assert kept[False] - kept[True] == sizes_of(inputs["v"], None).workspaces
        torch._dynamo.reset()


def on_gpu(B, T, H, D, **options):
    return {name: x.cuda() for name, x in kda_inputs(B, T, H, D, D, **{"dtype": torch.bfloat16} | options).items()}


def of_both(op, inputs, **options):
    """Results and gradients with `recompute` and without."""
    for recompute in (True, False):
        with poisoned():
            yield outputs_and_gradients(op, inputs, recompute=recompute, **options)


@pytest.mark.gpu
@NEEDS_A_GPU
class TestOnAGPU:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("D", [32, 64, 128])
    @pytest.mark.parametrize("normalized", [False, True])
    @pytest.mark.parametrize(
        ("B", "T", "H", "packed"), [(2, 500, 8, False), (1, PACKED[-1], 4, True), (1, 8192, 2, False)]
    )
    def test_same_bits(self, B, T, H, packed, normalized, D, dtype):
        """The last shape is computed in segments."""
        inputs, options = on_gpu(B, T, H, D, dtype=dtype), {"backend": "cuda", "normalized": normalized}
        if packed:
            options["cu_seqlens"] = torch.tensor(PACKED, device="cuda")
            inputs["initial_state"] = torch.randn(len(PACKED) - 1, H, D, D, device="cuda")
        assert_equal(*of_both(kda_attention, inputs, **options))

    @pytest.mark.parametrize("fullgraph", [False, True])
    def test_same_bits_from_logits(self, fullgraph):
        inputs = on_gpu(2, 300, 2, 64)
        inputs["gate_logits"] = inputs.pop("g").bfloat16()
        inputs["beta_logits"] = inputs.pop("beta").bfloat16()
        inputs |= {"A_log": torch.zeros(2, device="cuda"), "dt_bias": torch.zeros(128, device="cuda")}

        def op(*, recompute, A_log, dt_bias, **given):
            return kda_attention_fused(**given, gate=KDAGate(A_log, dt_bias), recompute=recompute)

        assert_equal(*of_both(torch.compile(op, fullgraph=True) if fullgraph else op, inputs))

    def test_bytes_between_forward_and_backward(self):
        """For each token and head, beyond the inputs and results."""
        for D, bytes_ in ((64, 520), (128, 908)):
            inputs = {name: x.requires_grad_() for name, x in on_gpu(2, 2048, 8, D).items()}
            for op in (kda_attention, torch.compile(kda_attention, fullgraph=True)):
                kept = []
                for recompute in (False, True):
                    op(**inputs, recompute=recompute)
                    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
                    results = op(**inputs, recompute=recompute)
                    after = torch.cuda.memory_stats()["requested_bytes.all.current"]
                    kept.append((after - before - sum(x.nbytes for x in results)) / (2 * 2048 * 8))
                    del results
                assert bytes_ <= kept[0] - kept[1] < bytes_ + 1
