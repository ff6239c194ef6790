"""KDA's decoding step on a GPU."""

from __future__ import annotations

import pytest
import torch

from lkda.ops import kda_step_fused
from lkda.ops.kda.state import unpack_state
from tests.ops.cases import relative
from tests.ops.kda.step_cases import STATES, copied, exact, state_of, token
from tests.ops.kda.test_step import OUTPUT, ROUNDING

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernel is emulated, not run"),
]
DEVICE = torch.device("cuda", 0)


def steps(x, state, count):
    return [kda_step_fused(**x, state=state, backend="cuda") for _ in range(count)]


@pytest.mark.parametrize("state_dtype", STATES, ids=str)
@pytest.mark.parametrize(("B", "H", "D"), [(1, 32, 128), (3, 5, 64), (3, 4, 32), (1024, 4, 128), (1024, 16, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_against_float64(dtype, B, H, D, state_dtype):
    x, state = token(B, H, D, dtype, device=DEVICE), state_of(B, H, D, state_dtype, device=DEVICE)
    want, after, caches = exact(x, state)
    o = kda_step_fused(**x, state=state, backend="cuda")
    assert relative(o, want) < OUTPUT[dtype]
    assert relative(unpack_state(state), after) < ROUNDING[state_dtype]
    for got, truth in zip(x["caches"], caches):
        torch.testing.assert_close(got.double(), truth, rtol=0, atol=0)


@pytest.mark.parametrize("state_dtype", STATES, ids=str)
@pytest.mark.parametrize("B", [1, 3, 1024])
def test_replay_equals_eager(B, state_dtype):
    """A captured step, replayed: the same bits in o, state and caches; and nothing but o is allocated."""
    x, state = token(B, 4, 64, torch.bfloat16, device=DEVICE), state_of(B, 4, 64, state_dtype, device=DEVICE)
    mine, own = {**x, "caches": copied(x["caches"])}, tuple(copied(state))
    start = copied([*own, *mine["caches"]])
    steps({**x, "caches": copied(x["caches"])}, tuple(copied(state)), 1)  # compiles
    want = steps(x, state, 5)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        (o,) = steps(mine, own, 1)
    for before, y in zip(start, [*own, *mine["caches"]]):
        assert torch.equal(before, y)  # capturing runs nothing
    for y in want:
        graph.replay()
        assert torch.equal(o, y)
    for one, two in zip([*own, *mine["caches"]], [*state, *x["caches"]]):
        assert torch.equal(one, two)


@pytest.mark.parametrize("state_dtype", STATES, ids=str)
def test_a_sequence_is_the_same_wherever_it_stands(state_dtype):
    x, state = token(7, 4, 64, torch.bfloat16, device=DEVICE), state_of(7, 4, 64, state_dtype, device=DEVICE)
    names = ("q", "k", "v", "gate_logits", "beta_logits")
    alone = {**x, **{n: x[n][3:4].clone() for n in names}, "caches": [c[3:4].clone() for c in x["caches"]]}
    own = tuple(part[3:4].clone() for part in state)
    (want,), (got,) = steps(alone, own, 1), steps(x, state, 1)
    assert torch.equal(got[3:4], want)
    assert all(torch.equal(a[3:4], b) for a, b in zip(state, own))


def test_it_is_one_launch():
    from lkda.bench.timing import launches

    x, state = token(2, 4, 64, torch.bfloat16, device=DEVICE), state_of(2, 4, 64, torch.int8, device=DEVICE)
    assert launches(lambda: steps(x, state, 1)) == 1
