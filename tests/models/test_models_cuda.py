"""Models on a GPU: the kernels inside a compiled model, and against the plain forms on a CPU."""

from __future__ import annotations

import pytest
import torch

from tests.models.helpers import small, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the mixers' kernels are not run"),
]
PATTERNS = [["kda"], ["simplified"], ["kda", "softmax"], ["simplified", "mla"]]


def model_and_tokens(pattern: list[str], **changes):
    """Heads of 32, which every kernel takes."""
    return small(pattern, d_model=64, **changes).cuda(), tokens(2, 100).cuda()


def gradient(model, logits):
    (found,) = torch.autograd.grad(logits.float().square().mean(), model.embed_tokens.weight)
    return found


@pytest.mark.parametrize("pattern", PATTERNS, ids="_".join)
def test_a_model_compiles_without_a_graph_break(pattern):
    model, x = model_and_tokens(pattern)
    compiled = torch.compile(model, fullgraph=True)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        want, got = model(x), compiled(x)
    assert (got - want).norm() < 0.02 * want.norm()
    wanted, gotten = gradient(model, want), gradient(model, got)
    assert (gotten - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("pattern", PATTERNS, ids="_".join)
def test_float32_logits_equal_those_of_the_plain_forms(pattern):
    model, x = model_and_tokens(pattern)
    got = model(x).cpu()
    want = model.cpu()(x.cpu())
    assert model.resolve_backends(torch.device("cuda", 0), torch.float32).get(pattern[0]) == "cuda"
    assert (got - want).norm() < 5e-3 * want.norm()
