"""The simplified kernels against float64. On a CUDA machine: pytest -m gpu tests/ops (torch and pytest suffice)."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lkda.ops import simplified_attention, simplified_step
from lkda.ops.simplified.cuda import core as cuda
from tests.ops.cases import poisoned, relative, simplified_inputs
from tests.ops.simplified_reference import assert_error_within_reference, outputs_and_gradients, simplified_truth

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: the kernels are compiled, not run"
)

PACKED = [0, 0, 5, 69, 69, 169, 170, 1500, 1501, 1600, 2000, 2000]


def on_gpu(*shape, memory=30.0, dtype=torch.bfloat16, seed=0):
    inputs = simplified_inputs(*shape, memory=memory, dtype=dtype, seed=seed)
    return {name: x.cuda() for name, x in inputs.items()}


def mixed_decays(decay):
    """Neighbouring heads remember for ever, 100,000 tokens, a hundred, one, and now and then nothing at all."""
    B, T, H = decay.shape
    memories = torch.tensor([torch.inf, 1e5, 100.0, 1.0])[torch.arange(H) % 4]
    decay = (1 - torch.rand(B, T, H) / memories).clamp_min(1e-30)
    return torch.where(torch.rand(B, T, H) < 0.01, 1e-30, decay)


def run(inputs, backend="cuda", **options):
    with poisoned():
        return outputs_and_gradients(simplified_attention, inputs, backend=backend, **options)


def test_the_truth_is_the_recurrence():
    inputs = simplified_inputs(2, 37, 2, 8)
    want = outputs_and_gradients(simplified_attention, inputs, backend="recurrent")
    for name, x in simplified_truth(inputs).items():
        assert relative(x, want[name]) < 1e-12, name
    inputs = simplified_inputs(1, 40, 2, 8)
    options = {"cu_seqlens": torch.tensor([0, 0, 7, 8, 30, 40, 40])}
    inputs["initial_state"] = torch.rand(6, 2, 2, 8, dtype=torch.float64)
    want = outputs_and_gradients(simplified_attention, inputs, backend="recurrent", **options)
    for name, x in simplified_truth(inputs, **options).items():
        assert relative(x, want[name]) < 1e-12, name


@gpu
@needs_gpu
class TestError:
    @pytest.mark.parametrize("T", [1, 7, 8, 63, 64, 65, 1000])
    @pytest.mark.parametrize("D", cuda.HEAD_DIMS)
    @pytest.mark.parametrize("dtype", cuda.ELEMENTS)
    def test_at_every_head_size_dtype_and_length(self, D, T, dtype):
        inputs = on_gpu(2, T, 3, D, dtype=dtype)
        assert_error_within_reference(run(inputs), simplified_truth(inputs))

    @pytest.mark.parametrize("memory", [1e5, 1.0, "mixed"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_at_every_decay_across_spans_of_chunks(self, memory, dtype):
        inputs = on_gpu(1, 9000, 4, 64, dtype=dtype, memory=30.0 if memory == "mixed" else memory)
        if memory == "mixed":
            inputs["decay"] = mixed_decays(inputs["decay"].cpu()).cuda()
        assert_error_within_reference(run(inputs), simplified_truth(inputs))

    @pytest.mark.parametrize("T", [16384, 131072])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_over_long_sequences_with_long_memory(self, T, dtype):
        inputs = on_gpu(1, T, 2, 64, dtype=dtype, memory=1e5)
        assert_error_within_reference(run(inputs), simplified_truth(inputs))

    @pytest.mark.parametrize("D", cuda.HEAD_DIMS)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_of_packed_sequences_with_empty_ones(self, D, dtype):
        inputs = on_gpu(1, PACKED[-1], 2, D, dtype=dtype)
        inputs["initial_state"] = torch.rand(len(PACKED) - 1, 2, 2, D, device="cuda")
        bounds = torch.tensor(PACKED, device="cuda")
        assert_error_within_reference(run(inputs, cu_seqlens=bounds), simplified_truth(inputs, cu_seqlens=bounds))

    def test_without_an_initial_state_and_with_a_decay_per_head(self):
        inputs = on_gpu(2, 300, 2, 64, dtype=torch.float32)
        del inputs["initial_state"]
        inputs["decay"] = torch.tensor([0.9, 0.9999], device="cuda")
        want = outputs_and_gradients(
            simplified_attention, {k: x.double() for k, x in inputs.items()}, backend="recurrent"
        )
        assert_error_within_reference(run(inputs), want)

    @pytest.mark.parametrize("D", cuda.HEAD_DIMS)
    def test_of_the_baseline(self, D):
        inputs = on_gpu(2, 300, 2, D)
        want = simplified_truth(inputs)
        with poisoned(), torch.no_grad():
            o, final = simplified_attention(**inputs, backend="cuda_baseline")
        assert_error_within_reference(
            {"o": o, "final_state": final}, {name: want[name] for name in ("o", "final_state")}
        )

    def test_of_decoding(self):
        inputs = on_gpu(2, 50, 3, 64)
        want = simplified_truth(inputs)
        state, outputs = inputs["initial_state"], []
        for t in range(50):
            o, state = simplified_step(*(inputs[name][:, t] for name in ("q", "k", "v", "decay")), state)
            outputs.append(o)
        got = {"o": torch.stack(outputs, 1), "final_state": state}
        assert_error_within_reference(got, {name: want[name] for name in got})


@gpu
@needs_gpu
class TestProperties:
    def test_strided_inputs(self):
        fused = torch.randn(2, 200, 3, 4, 64, device="cuda", dtype=torch.bfloat16)
        inputs = dict(zip("qkv", fused.unbind(2))) | {"decay": torch.rand(4, 200, 2, device="cuda").permute(2, 1, 0)}
        packed = {name: x.contiguous() for name, x in inputs.items()}
        awkward = {name: torch.empty_like(x.mT).mT.copy_(x) if x.dim() == 4 else x for name, x in inputs.items()}
        want = run(packed)
        for layout in (inputs, awkward):
            leaves = [x.requires_grad_() if x.is_leaf else x.detach().requires_grad_() for x in layout.values()]
            o, state = simplified_attention(*leaves, backend="cuda")
            assert torch.equal(o, want["o"])
            assert torch.equal(state, want["final_state"])
            o.sum().backward()  # a gradient of stride 0
            assert all(x.grad.isfinite().all() for x in leaves)

    @pytest.mark.parametrize("D", cuda.HEAD_DIMS)
    def test_bitwise_equal_from_run_to_run(self, D):
        inputs = on_gpu(2, 5000, 8, D)
        first = run(inputs)
        noise = torch.cuda.Stream()
        for _ in range(5):
            with torch.cuda.stream(noise):  # other work changes which blocks run when
                torch.randn(2048, 2048, device="cuda") @ torch.randn(2048, 2048, device="cuda")
            again = run(inputs)
            for name, x in first.items():
                assert torch.equal(x, again[name]), name

    def test_future_tokens_never_change_past_outputs(self):
        one, two = on_gpu(1, 700, 2, 64, seed=0), on_gpu(1, 700, 2, 64, seed=1)
        o, _ = simplified_attention(**one, backend="cuda")
        for t in (1, 64, 100, 513):
            mixed = {name: torch.cat([one[name][:, :t], two[name][:, t:]], 1) for name in ("q", "k", "v", "decay")}
            changed, _ = simplified_attention(**mixed, initial_state=one["initial_state"], backend="cuda")
            assert torch.equal(o[:, :t], changed[:, :t])

    @pytest.mark.parametrize("dtype", cuda.ELEMENTS)
    def test_extreme_keys_stay_finite(self, dtype):
        inputs = on_gpu(1, 300, 2, 64, dtype=dtype)
        inputs["initial_state"] = torch.zeros_like(inputs["initial_state"])
        for keys in (-100.0, 100.0, 100 * torch.randn_like(inputs["k"]).sign()):
            inputs["k"] = torch.zeros_like(inputs["k"]) + keys
            for name, x in run(inputs).items():
                assert x.isfinite().all(), name

    def test_a_state_carries_on(self):
        inputs = on_gpu(2, 333, 2, 64, dtype=torch.float32)
        whole, final = simplified_attention(**inputs, backend="cuda")
        state, parts = inputs.pop("initial_state"), []
        for tokens in (slice(0, 100), slice(100, 101), slice(101, 333)):
            part = {name: x[:, tokens] for name, x in inputs.items()}
            o, state = simplified_attention(**part, initial_state=state, backend="cuda")
            parts.append(o)
        assert relative(torch.cat(parts, 1), whole) < 1e-6
        assert relative(state, final) < 1e-6

    def test_the_baseline_refuses_a_gradient(self):
        inputs = on_gpu(1, 8, 1, 64)
        inputs["q"].requires_grad_()
        with pytest.raises(ValueError, match="has no backward"):
            simplified_attention(**inputs, backend="cuda_baseline")


@gpu
@needs_gpu
class TestTorch:
    def test_opcheck(self):
        inputs = [x.requires_grad_() for x in on_gpu(2, 100, 2, 64).values()]
        torch.library.opcheck(torch.ops.lkda.simplified_forward, (*inputs, None, True))
        q, k, v, decay, state = (x.detach() for x in inputs)
        entering = torch.ops.lkda.simplified_forward(q, k, v, decay, state, None, True)[2]
        torch.library.opcheck(torch.ops.lkda.simplified_backward, (q, None, q, k, v, decay, state, None, entering))
        torch.library.opcheck(torch.ops.lkda.simplified_baseline, (q, k, v, decay, state, None))
        torch.library.opcheck(torch.ops.lkda.simplified_step, (q[:, 0], k[:, 0], v[:, 0], decay[:, 0], state))

    def test_a_call_without_the_dispatcher_equals_a_dispatched_one(self):
        class Watching(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                return function(*args, **(kwargs or {}))

        inputs = on_gpu(2, 100, 2, 64)
        want = run(inputs)
        with Watching():
            for name, x in run(inputs).items():
                assert torch.equal(x, want[name]), name

    def test_compiles_without_a_graph_break(self):
        def op(**inputs):
            return simplified_attention(**inputs, backend="auto")

        inputs = on_gpu(2, 100, 2, 64)
        compiled = torch.compile(op, fullgraph=True)
        want = outputs_and_gradients(op, inputs)
        for name, x in outputs_and_gradients(compiled, inputs).items():
            assert torch.equal(x, want[name]), name

    def test_replays_in_a_cuda_graph(self):
        inputs = {name: x.requires_grad_() for name, x in on_gpu(2, 1000, 2, 64).items()}

        def step():
            o, state = simplified_attention(**inputs, backend="cuda")
            return o, *torch.autograd.grad(o.float().square().sum() + state.sum(), list(inputs.values()))

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            step()
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            for name, x in on_gpu(2, 1000, 2, 64, seed=5).items():
                inputs[name].copy_(x)
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        for got, want in zip(captured, step()):
            assert torch.equal(got, want)

    def test_runs_on_the_current_stream(self):
        inputs = on_gpu(1, 500, 2, 64)
        want, _ = simplified_attention(**inputs, backend="cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            late = {name: x * 1 for name, x in inputs.items()}  # exists only after the sleep, on this stream
            got, _ = simplified_attention(**late, backend="cuda")
        stream.synchronize()
        assert torch.equal(got, want)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
    def test_runs_on_the_device_of_the_tensors(self):
        inputs = on_gpu(1, 500, 2, 64)
        want = run(inputs)
        for name, x in run({name: x.to("cuda:1") for name, x in inputs.items()}).items():
            assert x.device.index == 1
            assert torch.equal(x.cpu(), want[name].cpu())

    def test_first_use_takes_seconds_and_the_next_process_none(self, tmp_path):
        program = """
import time, torch
from lkda.ops import simplified_attention
q, k, v = (torch.randn(1, 100, 1, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
decay = torch.rand(1, 100, 1, device="cuda")
(q * 2).sum().backward()
torch.cuda.synchronize()
start, of_this_process = time.perf_counter(), time.process_time()
simplified_attention(q, k, v, decay, backend="cuda")[0].sum().backward()
torch.cuda.synchronize()
print(time.perf_counter() - start, time.process_time() - of_this_process)
"""
        environment = os.environ | {"LKDA_CACHE": str(tmp_path)}
        seconds = []
        for _ in range(2):
            done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            seconds.append([float(word) for word in done.stdout.split()])
        print("first use, cold and warm cache, seconds, and those of a core:", seconds)
        (_, cold), (_, warm) = seconds  # of a core, because other tests may run beside this one
        assert cold < 5
        assert warm < 0.2
