"""The KDA kernels against float64. On a CUDA machine: pytest -m gpu tests/ops (torch and pytest suffice)."""

import pytest
import torch

from lkda.ops import kda_attention
from lkda.ops.kda.cuda import core as cuda
from lkda.ops.kda.cuda import plan as cuda_plan
from lkda.ops.kda.cuda import recurrent as cuda_recurrent
from lkda.ops.kda.cuda import variants as cuda_kernels
from lkda.ops.kda.cuda.segments import segment_count
from lkda.ops.runtime.jit import ARCHITECTURES, SHARED_BYTES_PER_BLOCK
from lkda.ops.runtime.kernel_inputs import ELEMENTS, HEAD_DIMS
from tests.ops.cases import GATES, LENGTHS, kda_inputs, poisoned, relative
from tests.ops.rounded_reference import kda_rounded_reference, kda_truth, outputs_and_gradients

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: the kernels are compiled, not run"
)

PACKED = [0, 0, 5, 69, 69, 169, 170, 600, 601, 700, 700]
HEADS = 8  # of each gate: errors of fewer numbers are too much a matter of luck to compare
# The dimension of the heads in each result.
HEAD_AXIS = {"final_state": 1, "dinitial_state": 1}


@pytest.fixture(autouse=True)
def memory_given_back():
    """Float64 through a thousand tokens keeps tens of GB, which tests beside this one (pytest -n) may want."""
    yield
    torch.cuda.empty_cache()


def every_gate(B, T, D, *, dtype=torch.bfloat16, seed=0):
    """Inputs of HEADS heads of every gate, one gate's beside another's."""
    parts = [kda_inputs(B, T, HEADS, D, D, gate=gate, dtype=dtype, seed=seed + i) for i, gate in enumerate(GATES)]
    return {name: torch.cat([x[name] for x in parts], HEAD_AXIS.get(f"d{name}", 2)).cuda() for name in parts[0]}


def on_gpu(B, T, H, D, **options):
    return {name: x.cuda() for name, x in kda_inputs(B, T, H, D, D, **{"dtype": torch.bfloat16} | options).items()}


def run(inputs, backend="cuda", **options):
    with poisoned():
        return outputs_and_gradients(kda_attention, inputs, backend=backend, **options)


def errors(inputs, *, truth="recurrent", **options):
    """{(result, gate): (error, twice that of the rounded reference)}"""
    got, reference = run(inputs, **options), kda_rounded_reference(inputs, **options)
    want = kda_truth(inputs, backend=truth, **options)
    found = {}
    for name in want:
        axis = HEAD_AXIS.get(name, 2)
        parts = [x[name].split(HEADS, axis) for x in (got, want, reference)]
        for gate, mine, exact, rounded in zip(GATES, *parts):
            found[name, gate] = relative(mine, exact), 2 * relative(rounded, exact) + 1e-6
    return found


def assert_error_within_reference(inputs, **options):
    """At most twice the error of the rounded reference, in every result, gate by gate."""
    for (name, gate), (error, allowed) in errors(inputs, **options).items():
        assert error <= allowed, f"{name} at {gate} gates: {error:.2e} > {allowed:.2e}"


def test_values_wider_than_keys_are_refused():
    inputs = kda_inputs(1, 8, 1, 32, 64, dtype=torch.bfloat16)
    for function in (cuda.kda_cuda, cuda_recurrent.kda_cuda_recurrent):
        arguments = [inputs[name] for name in ("q", "k", "v", "g", "beta")]
        with pytest.raises(ValueError, match="K and V must be equal, got K = 32 and V = 64"):
            function(*arguments, 1.0, None, None)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_fits_the_architecture(arch):
    kernels = cuda_kernels.kernels(arch) + cuda_recurrent.kernels(arch)
    assert all(kernel.shared_bytes <= SHARED_BYTES_PER_BLOCK[arch] for kernel in kernels)
    smallest = min(kernels, key=lambda kernel: kernel.module.source.stat().st_size)
    assert smallest.module.binary(arch).resources()[smallest.entry].spill_bytes == 0


@gpu
@needs_gpu
class TestError:
    @pytest.mark.parametrize("T", LENGTHS)
    @pytest.mark.parametrize("D", HEAD_DIMS)
    def test_at_every_gate_head_size_and_length(self, D, T):
        assert_error_within_reference(every_gate(2, T, D))

    @pytest.mark.parametrize("T", [17, 65, 200])
    @pytest.mark.parametrize("D", HEAD_DIMS)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    def test_in_other_dtypes(self, dtype, D, T):
        assert_error_within_reference(every_gate(2, T, D, dtype=dtype))

    @pytest.mark.parametrize(("D", "truth"), [(32, "recurrent"), (64, "chunk"), (128, "chunk")])
    def test_over_a_long_sequence(self, D, truth):
        """Wider heads against the chunked form in float64: the recurrence would keep more than the memory holds."""
        assert_error_within_reference(every_gate(1, 8192, D), truth=truth)

    @pytest.mark.parametrize("D", [64, 128])
    def test_at_slow_gates_is_no_larger_than_public_kernels(self, D):
        """What FLA 0.6 errs at B = 1, T = 1024."""
        theirs = {"o": 4.2e-3, "dq": 4.1e-3, "dk": 4.3e-3, "dv": 4.0e-3, "dg": 5.5e-3, "dbeta": 3.4e-3}
        inputs = on_gpu(1, 1024, 8, D)
        got, want = run(inputs), kda_truth(inputs)
        for name, error in theirs.items():
            assert relative(got[name], want[name]) <= error, name

    @pytest.mark.parametrize("D", HEAD_DIMS)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_of_packed_sequences_with_empty_ones(self, D, dtype):
        inputs = every_gate(1, PACKED[-1], D, dtype=dtype)
        heads = inputs["q"].shape[2]
        inputs["initial_state"] = torch.randn(len(PACKED) - 1, heads, D, D, device="cuda")
        assert_error_within_reference(inputs, cu_seqlens=torch.tensor(PACKED, device="cuda"))

    @pytest.mark.parametrize("D", HEAD_DIMS)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("packed", [False, True])
    def test_of_sequences_in_segments(self, packed, dtype, D, monkeypatch):
        monkeypatch.setattr(cuda_plan, "segment_count", lambda sequences, heads, chunks: 4)
        inputs = every_gate(1 if packed else 2, PACKED[-1], D, dtype=dtype)
        options = {}
        if packed:
            heads = inputs["q"].shape[2]
            inputs["initial_state"] = torch.randn(len(PACKED) - 1, heads, D, D, device="cuda")
            options = {"cu_seqlens": torch.tensor(PACKED, device="cuda")}
        assert_error_within_reference(inputs, **options)

    @pytest.mark.parametrize("D", HEAD_DIMS)
    def test_segments_change_nothing_but_roundings(self, D, monkeypatch):
        inputs = on_gpu(1, 8192, 4, D)
        assert segment_count(1, 4, 8192 // 64) > 1
        cut = run(inputs)
        monkeypatch.setattr(cuda_plan, "segment_count", lambda sequences, heads, chunks: 1)
        for name, x in run(inputs).items():
            assert relative(cut[name], x) < 8e-3, name

    @pytest.mark.parametrize(("H", "HV", "K", "V"), [(4, 8, 64, 64), (8, 8, 32, 80), (4, 8, 128, 64)])
    @pytest.mark.parametrize("packed", [False, True])
    def test_of_heads_that_the_kernels_do_not_have(self, packed, H, HV, K, V):
        """More value heads than key heads, and V other than K."""
        inputs = {name: x.cuda() for name, x in kda_inputs(1, 200, HV, K, V, dtype=torch.bfloat16).items()}
        inputs |= {name: inputs[name][:, :, :: HV // H].contiguous() for name in ("q", "k")}
        options = {}
        if packed:
            options["cu_seqlens"] = torch.tensor([0, 70, 70, 200], device="cuda")
            inputs["initial_state"] = inputs["initial_state"].repeat(3, 1, 1, 1)
        got = outputs_and_gradients(kda_attention, inputs, backend="cuda", **options)
        want, allowed = kda_truth(inputs, **options), kda_rounded_reference(inputs, **options)
        for name, x in want.items():
            assert relative(got[name], x) <= 2 * relative(allowed[name], x) + 1e-6, name

    def test_with_beta_of_zero_and_one(self):
        inputs = every_gate(2, 300, 64)
        inputs["beta"] = (inputs["beta"] > 0.5).float()
        assert_error_within_reference(inputs)

    @pytest.mark.parametrize("D", HEAD_DIMS)
    def test_with_beta_of_one_in_every_token(self, D):
        inputs = every_gate(2, 300, D)
        inputs["beta"] = torch.ones_like(inputs["beta"])
        assert_error_within_reference(inputs)

    @pytest.mark.parametrize("D", HEAD_DIMS)
    def test_with_beta_of_zero_in_every_token(self, D):
        inputs = every_gate(2, 300, D)
        inputs["beta"] = torch.zeros_like(inputs["beta"])
        assert_error_within_reference(inputs)

    def test_with_one_key_repeated_and_beta_one(self):
        inputs = every_gate(2, 300, 64)
        inputs["k"] = inputs["k"][:, :1].expand_as(inputs["k"]).contiguous()
        inputs["beta"] = torch.ones_like(inputs["beta"])
        assert_error_within_reference(inputs)

    def test_with_a_gate_of_minus_infinity(self):
        inputs = on_gpu(2, 200, 2, 64)
        inputs["g"][:, 70:72] = -torch.inf
        reset = {name: x.clone() for name, x in inputs.items()}
        reset["g"][:, 70:72] = -1e4
        with torch.no_grad():
            for got, want in zip(kda_attention(**inputs, backend="cuda"), kda_attention(**reset, backend="cuda")):
                assert torch.equal(got, want)

    def test_float32_inputs_keep_more_digits(self):
        inputs = every_gate(2, 200, 64, dtype=torch.float32)
        got, want = run(inputs), kda_truth(inputs)
        for name, x in want.items():
            assert relative(got[name], x) < 1e-3, name

    @pytest.mark.parametrize("D", HEAD_DIMS)
    @pytest.mark.parametrize("dtype", ELEMENTS)
    def test_of_the_recurrence(self, D, dtype):
        inputs = every_gate(2, 130, D, dtype=dtype)
        with poisoned(), torch.no_grad():
            got = kda_attention(**inputs, backend="cuda_recurrent")
            want = kda_attention(**{name: x.double() for name, x in inputs.items()}, backend="recurrent")
        rounding = {torch.bfloat16: 3e-3, torch.float16: 5e-4, torch.float32: 5e-6}[dtype]
        assert relative(got[0], want[0]) < rounding
        assert relative(got[1], want[1]) < 5e-6


@gpu
@needs_gpu
class TestProperties:
    def test_strided_inputs(self):
        fused = torch.nn.functional.normalize(torch.randn(2, 200, 3, 4, 64, device="cuda"), dim=-1).bfloat16()
        g = -torch.rand(2, 4, 200, 64, device="cuda").transpose(1, 2)
        inputs = dict(zip("qkv", fused.unbind(2))) | {
            "g": g,
            "beta": torch.rand(4, 200, 2, device="cuda").permute(2, 1, 0),
        }
        got, want = run(inputs), run({name: x.contiguous() for name, x in inputs.items()})
        for name, x in want.items():
            assert torch.equal(got[name], x), name
        leaves = [x.detach().requires_grad_() for x in inputs.values()]
        kda_attention(*leaves, backend="cuda")[0].sum().backward()  # a gradient of stride 0
        assert all(x.grad.isfinite().all() for x in leaves)

    @pytest.mark.parametrize("D", HEAD_DIMS)
    def test_bitwise_equal_from_run_to_run(self, D):
        inputs = on_gpu(2, 1500, 4, D)
        first = run(inputs)
        for _ in range(5):
            again = run(inputs)
            for name, x in first.items():
                assert torch.equal(x, again[name]), name

    @pytest.mark.parametrize("T", [300, 8192])
    def test_on_a_second_stream(self, T):
        """Its inputs are written there, late: a kernel on another stream would read what was there before."""
        inputs = on_gpu(1, T, 2, 64)
        want = run(inputs)
        late = {name: torch.full_like(x, torch.nan) for name, x in inputs.items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            for name, x in inputs.items():
                late[name].copy_(x)
            got = run(late)
        stream.synchronize()
        for name, x in want.items():
            assert torch.equal(got[name], x), name

    def test_future_tokens_never_change_past_outputs_of_segments(self):
        one, two = on_gpu(1, 4096, 2, 64, seed=0), on_gpu(1, 4096, 2, 64, seed=1)
        assert segment_count(1, 2, 64) > 1
        o, _ = kda_attention(**one, backend="cuda")
        for t in (1, 1000, 2048, 4000):
            mixed = {name: torch.cat([one[name][:, :t], two[name][:, t:]], 1) for name in ("q", "k", "v", "g", "beta")}
            changed, _ = kda_attention(**mixed, initial_state=one["initial_state"], backend="cuda")
            assert torch.equal(o[:, :t], changed[:, :t]), t

    def test_future_tokens_never_change_past_outputs(self):
        one, two = on_gpu(1, 300, 2, 64, seed=0), on_gpu(1, 300, 2, 64, seed=1)
        o, _ = kda_attention(**one, backend="cuda")
        for t in (1, 7, 64, 100, 150, 191):
            mixed = {name: torch.cat([one[name][:, :t], two[name][:, t:]], 1) for name in ("q", "k", "v", "g", "beta")}
            changed, _ = kda_attention(**mixed, initial_state=one["initial_state"], backend="cuda")
            assert torch.equal(o[:, :t], changed[:, :t]), t

    def test_a_state_carries_on(self):
        inputs = on_gpu(2, 333, 2, 64, dtype=torch.float32)
        whole, final = kda_attention(**inputs, backend="cuda")
        state, parts = inputs.pop("initial_state"), []
        for tokens in (slice(0, 100), slice(100, 101), slice(101, 333)):
            o, state = kda_attention(
                **{name: x[:, tokens] for name, x in inputs.items()}, initial_state=state, backend="cuda"
            )
            parts.append(o)
        assert relative(torch.cat(parts, 1), whole) < 1e-3
        assert relative(state, final) < 1e-3

    def test_a_loss_of_the_state_alone(self):
        inputs = on_gpu(1, 100, 2, 64, dtype=torch.float32)
        results = []
        for backend, dtype in (("cuda", torch.float32), ("recurrent", torch.float64)):
            leaves = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
            loss = kda_attention(**leaves, backend=backend)[1].square().sum()
            results.append(torch.autograd.grad(loss, [leaves[name] for name in ("k", "v", "g", "beta")]))
        for got, want in zip(*results):
            assert relative(got, want) < 2e-3

    def test_the_recurrence_refuses_a_gradient(self):
        inputs = on_gpu(1, 8, 1, 64)
        inputs["q"].requires_grad_()
        with pytest.raises(ValueError, match="has no backward"):
            kda_attention(**inputs, backend="cuda_recurrent")


@gpu
@needs_gpu
class TestTorch:
    @pytest.mark.parametrize("recompute", [False, True])
    @pytest.mark.parametrize("normalize", [False, True])
    def test_opcheck(self, normalize, recompute):
        """Schema, fake, autograd, and tracing with sizes that are symbols."""
        q, k, v, g, beta, state = (x.requires_grad_() for x in on_gpu(2, 100, 2, 64).values())
        forward = (q, k, v, g, beta, state, None, 0.125, normalize, True, recompute)
        torch.library.opcheck(torch.ops.lkda.kda_forward, forward)
        q, k, v, g, beta, state = (x.detach() for x in forward[:6])
        o, _, workspaces, saved, *normalized = torch.ops.lkda.kda_forward(q, k, v, g, beta, state, *forward[6:])
        if recompute:
            assert not workspaces.numel()
            tensors = (*(normalized if normalize else (q, k)), v, g, beta, None, 0.125)
            torch.library.opcheck(torch.ops.lkda.kda_workspaces, tensors)
            workspaces = torch.ops.lkda.kda_workspaces(*tensors)
        inter_chunk = (o, None, v, None, workspaces, saved, True)
        torch.library.opcheck(torch.ops.lkda.kda_inter_chunk_bwd, inter_chunk)
        _, d_saved = torch.ops.lkda.kda_inter_chunk_bwd(*inter_chunk)
        intra_chunk = (o, None, *(normalized if normalize else (q, k)), g, beta, state, None, saved, d_saved, 0.125)
        torch.library.opcheck(torch.ops.lkda.kda_intra_chunk_bwd, intra_chunk)
        torch.library.opcheck(torch.ops.lkda.kda_recurrent, (*(x.detach() for x in forward[:6]), None, 0.125))

    def test_compiles_without_a_graph_break(self):
        def op(**inputs):
            return kda_attention(**inputs, backend="auto")

        inputs = on_gpu(2, 100, 2, 64)
        want = outputs_and_gradients(op, inputs)
        for name, x in outputs_and_gradients(torch.compile(op, fullgraph=True), inputs).items():
            assert torch.equal(x, want[name]), name

    def test_a_second_backward_through_a_kept_graph(self):
        inputs = {name: x.requires_grad_() for name, x in on_gpu(2, 100, 2, 64).items()}
        loss = kda_attention(**inputs, backend="cuda")[0].float().square().sum()
        leaves = list(inputs.values())
        first, second = (torch.autograd.grad(loss, leaves, retain_graph=keep) for keep in (True, False))
        assert all(torch.equal(x, y) for x, y in zip(first, second))

    def test_memory(self):
        """At most 450 MiB beyond the inputs of 1x8192x16x128: workspaces are freed before gradients are allocated."""
        inputs = {name: x.requires_grad_() for name, x in on_gpu(1, 8192, 16, 128).items()}
        grad_o = torch.randn_like(inputs["v"])
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        o, _ = kda_attention(**inputs, backend="cuda")
        torch.autograd.grad(o, list(inputs.values()), grad_o)
        assert torch.cuda.max_memory_allocated() - before <= 450 * 2**20

    @pytest.mark.parametrize("bounds", [None, [0, 300, 300, 1000]])
    def test_replays_in_a_cuda_graph(self, bounds):
        inputs = on_gpu(1, 1000, 2, 64)
        if bounds is not None:
            inputs["initial_state"] = torch.randn(len(bounds) - 1, 2, 64, 64, device="cuda")
            bounds = torch.tensor(bounds, device="cuda")
        inputs = {name: x.requires_grad_() for name, x in inputs.items()}

        def step():
            o, state = kda_attention(**inputs, cu_seqlens=bounds, backend="cuda")
            return o, *torch.autograd.grad(o.float().square().sum() + state.sum(), list(inputs.values()))

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            step()
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            for name in ("q", "k", "v"):
                inputs[name].copy_(inputs[name].flip(1))
            if bounds is not None:
                bounds[1:3] -= 111  # other sequences, the same shapes
        graph.replay()
        torch.cuda.synchronize()
        for got, want in zip(captured, step()):
            assert torch.equal(got, want)
