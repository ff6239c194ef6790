"""A compiled block on a GPU computes the same bits as an eager one: what differs is only which launches they need."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lkda.models.lm import apply_block
from lkda.training.losses import keeps_less
from tests.models.helpers import small

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the blocks' kernels are not run"),
]
MIXERS = {
    "kda": {},
    "simplified": {},
    "softmax": {},
    "softmax, norm of heads": {"qk_norm": True},
    "softmax, norm of heads, no positions": {"qk_norm": True, "rope_base": None},
    "softmax, convolutions": {"conv_width": 4, "qk_norm": True},
    "mla": {},
    "mla, norm of heads": {"qk_norm": True},
    "mla, rotary positions": {"rope_base": 10000.0},
    "mla, rotary positions, norm of heads": {"rope_base": 10000.0, "qk_norm": True},
}


@pytest.fixture
def deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def outputs_and_gradients(apply, block, x, dy):
    with torch.autocast("cuda", torch.bfloat16):
        y = apply(block, x, None)
    names = [name for name, _ in block.named_parameters()]
    gradients = torch.autograd.grad(y, [x, *block.parameters()], dy)
    return dict(zip(["y", "dx", *names], [y, *gradients], strict=True))


@pytest.mark.parametrize("name", MIXERS)
def test_the_bits_of_a_compiled_block_are_those_of_an_eager_one(name, deterministic):
    word = name.partition(",")[0]
    mixer = {"pattern": [word], "num_heads": 4, word: MIXERS[name]}
    block = small([word], scale=2, d_model=256, mlp_hidden=512, mixer=mixer).blocks[0].cuda()
    for norm in (block.mixer_norm, block.mlp_norm):
        nn.init.normal_(norm.weight, 1, 0.3)
    generator = torch.Generator("cuda").manual_seed(0)
    x, dy = (torch.randn(2, 512, 256, generator=generator, device="cuda") for _ in range(2))
    x.requires_grad_()
    want = outputs_and_gradients(apply_block, block, x, dy)
    torch._dynamo.reset()  # each block compiles `apply_block` anew, and Dynamo has a limit
    compiled = torch.compile(apply_block, dynamic=False, fullgraph=True, backend=keeps_less)
    got = outputs_and_gradients(compiled, block, x, dy)
    assert [found for found, tensor in want.items() if not torch.equal(got[found], tensor)] == []


def test_every_launch_of_the_norms_is_one_of_the_operator(deterministic):
    from lkda.bench.timing import launches

    block = small(["simplified"], d_model=256, mlp_hidden=512, mixer={"pattern": ["simplified"], "num_heads": 4})
    block = block.blocks[0].cuda()
    x = torch.randn(2, 512, 256, device="cuda")

    def run(norms):
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            for norm in norms:
                norm.register_forward_hook(lambda module, given, result: None)
            return launches(lambda: block(x))

    # With hooks, the modules are called: a norm, and its cast for each product that reads it, and one of the additions.
    assert run([]) < run([block.mixer_norm, block.mlp_norm])
