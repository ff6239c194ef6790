"""The KDA layer as one function, on a GPU. pytest -m gpu tests/ops/kda"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lkda.ops.kda.cuda.layer import SAVED_FOR_BACKWARD
from lkda.ops.kda.cuda.plan import sizes_of
from tests.ops.cases import relative
from tests.ops.kda.test_layer import as_one, in_pieces, kda_layer_inputs
from tests.ops.layer_cases import outputs_and_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernels are emulated, not run"),
]
PACKED = [0, 0, 1, 3, 64, 66, 300, 301, 900, 1000, 1000]
PRODUCTS = {"dlatent", "dweight", "dout_latent", "dout_weight"}  # cuBLAS may choose another algorithm


def on_gpu(B, T, **options):
    return {name: x.cuda() for name, x in kda_layer_inputs(B, T, **options).items()}


def assert_equal(got, want, *, except_for=frozenset()):
    assert got.keys() == want.keys()
    for name, x in want.items():
        if name in except_for:
            assert relative(got[name], x) < 1e-2, name
        else:
            assert torch.equal(got[name], x), name


@pytest.mark.parametrize("save_for_backward", SAVED_FOR_BACKWARD)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize(
    ("B", "T", "packed", "options"),
    [
        (2, 500, False, {}),
        (1, 1000, True, {"decay": "head"}),
        (2, 65, False, {"decay": "none", "gated": False}),
        (1, 8192, False, {}),  # in segments
    ],
)
def test_equals_its_pieces(B, T, packed, options, dim, dtype, save_for_backward):
    cu_seqlens = torch.tensor(PACKED, dtype=torch.int32, device="cuda") if packed else None
    inputs = on_gpu(B, T, heads=8, dim=dim, dtype=dtype, **options)
    want = outputs_and_gradients(in_pieces(dim, cu_seqlens), inputs)
    got = outputs_and_gradients(as_one(dim, cu_seqlens, save_for_backward), inputs)
    assert_equal(got, want, except_for=PRODUCTS)


@pytest.mark.parametrize("save_for_backward", SAVED_FOR_BACKWARD)
class TestAsAnOperator:
    def test_a_call_without_the_dispatcher_equals_a_dispatched_one(self, save_for_backward):
        class Watching(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                return function(*args, **(kwargs or {}))

        inputs = on_gpu(2, 300)
        want = outputs_and_gradients(as_one(save_for_backward=save_for_backward), inputs)
        with Watching():
            got = outputs_and_gradients(as_one(save_for_backward=save_for_backward), inputs)
        assert_equal(got, want)

    @pytest.mark.parametrize("options", [{}, {"decay": "none", "gated": False}])
    def test_compiles_without_a_graph_break(self, options, save_for_backward):
        inputs = on_gpu(2, 300, **options)
        want = outputs_and_gradients(as_one(save_for_backward=save_for_backward), inputs)
        got = outputs_and_gradients(torch.compile(as_one(save_for_backward=save_for_backward), fullgraph=True), inputs)
        assert_equal(got, want, except_for=PRODUCTS)

    def test_opcheck(self, save_for_backward):
        given = {name: x.requires_grad_() for name, x in on_gpu(2, 70).items()}
        order = ("x", "w0", "w1", "w2", "latent", "weight", "beta_logits", "A_log", "dt_bias", "out_latent")
        tensors = [given[name] for name in (*order, "out_weight", "norm_weight")]
        options = (None, 32, True, -3.0, 2.0, 32**-0.5, 1e-5, save_for_backward)
        torch.library.opcheck(torch.ops.lkda.kda_layer, (*tensors, *options))
        plain = [x.detach() for x in tensors]
        y, final, *more = torch.ops.lkda.kda_layer(*plain, *options)
        given = (torch.randn_like(y), torch.randn_like(final), *(torch.randn_like(last) for last in more[:3]))
        torch.library.opcheck(torch.ops.lkda.kda_layer_backward, (*given, *more[3:], *plain, *options))

    def test_replays_in_a_cuda_graph(self, save_for_backward):
        leaves = {name: x.requires_grad_() for name, x in on_gpu(2, 300).items()}

        def step():
            y, *_ = as_one(save_for_backward=save_for_backward)(**leaves)
            return y, *torch.autograd.grad(y.float().square().sum(), list(leaves.values()))

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            step()
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            leaves["x"].copy_(leaves["x"].flip(1))
        graph.replay()
        torch.cuda.synchronize()
        for got, want in zip(captured, step(), strict=True):
            assert relative(got, want) < 1e-3


def test_each_step_of_keeps_keeps_more():
    """Bytes per token and head between forward and backward, beyond the inputs."""
    inputs = {name: x.requires_grad_() for name, x in on_gpu(2, 2048, heads=8, dim=64).items()}

    def requested():  # without what the allocator rounds up, which depends on what was allocated before
        return torch.cuda.memory_stats()["requested_bytes.all.current"]

    def kept(op):
        torch.cuda.synchronize()
        before = requested()
        results = op(**inputs)
        return (requested() - before - sum(x.nbytes for x in results)) / (2 * 2048 * 8)

    found = [kept(as_one(64, save_for_backward=save_for_backward)) for save_for_backward in SAVED_FOR_BACKWARD]
    # The states (130), v~ (128), o (128) and the workspaces; for so few heads also what joins the segments.
    joined = sizes_of(torch.empty(2, 2048, 8, 64, dtype=torch.bfloat16), None).transitions / (2 * 2048 * 8)
    for got, want in zip(found, (0, 520, 520 + 258 + 128 + joined), strict=True):
        assert want <= got < want + 20
    assert kept(in_pieces(64)) > found[-1] + 3 * 128 + 256 + 2 * 128 - 20  # q, k, v, g and the logits of both gates
