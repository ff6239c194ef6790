"""The decoding step of simplified linear attention on a GPU."""

from __future__ import annotations

import pytest
import torch

from lkda.ops import simplified_step_fused
from tests.ops.simplified.step_cases import OUTPUT, check, exact, moved, token, written

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernel is emulated, not run"),
]
DEVICE = torch.device("cuda", 0)


def step(x):
    return simplified_step_fused(**x, backend="cuda")


@pytest.mark.parametrize("width", range(5))
@pytest.mark.parametrize(("B", "H", "D"), [(1, 8, 64), (3, 5, 20), (3, 4, 32), (1024, 8, 128)])
@pytest.mark.parametrize("dtype", list(OUTPUT), ids=str)
def test_against_float64(dtype, B, H, D, width):
    for kind in dict.fromkeys((torch.float32, dtype)):
        x = token(B, H, D, dtype, device=DEVICE, width=width, weight_dtype=kind, cache_dtype=kind)
        want = exact(x)
        check(step(x), x, want)


@pytest.mark.parametrize("B", [1, 3, 1024])
def test_replay_equals_eager(B):
    """A captured step, replayed: the same bits in o, state and caches. Steps follow each other, so a launch that begins
    before the one before it has ended must wait for what that one writes."""
    x = token(B, 4, 64, torch.bfloat16, device=DEVICE, weight_dtype=torch.bfloat16, cache_dtype=torch.bfloat16)
    mine = moved(x, torch.Tensor.clone)
    want = [step(x).clone() for _ in range(15)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    before = [y.clone() for y in written(mine)]
    with torch.cuda.graph(graph, stream=stream):
        outputs = [step(mine) for _ in range(5)]
    for y, start in zip(written(mine), before, strict=True):
        assert torch.equal(y, start)  # capturing runs nothing
    for n in range(3):
        graph.replay()
        for o, truth in zip(outputs, want[5 * n : 5 * n + 5], strict=True):
            assert torch.equal(o, truth)
    for one, two in zip(written(mine), written(x), strict=True):
        assert torch.equal(one, two)


def test_a_sequence_is_the_same_wherever_it_stands():
    x = token(7, 4, 64, torch.bfloat16, device=DEVICE)
    alone = moved(x, lambda y: y[3:4].clone()) | {name: x[name] for name in ("bias", "weights")}
    want, got = step(alone), step(x)
    assert torch.equal(got[3:4], want)
    for one, all_of_them in zip(written(alone), written(x), strict=True):
        assert torch.equal(all_of_them[3:4], one)


def test_it_is_one_launch():
    from lkda.bench.timing import launches

    x = token(2, 4, 64, torch.bfloat16, device=DEVICE, weight_dtype=torch.bfloat16, cache_dtype=torch.bfloat16)
    assert launches(lambda: step(x)) == 1


def test_the_dispatcher_knows_what_it_writes():
    x = token(2, 2, 64, torch.bfloat16, device=DEVICE)
    given = [x[name] for name in ("q", "k", "v", "logits", "bias", "state", "weights", "caches")]
    torch.library.opcheck(torch.ops.lkda.simplified_fused_step, given)
