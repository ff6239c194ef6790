"""Models on a GPU: the kernels inside a compiled model, and against the PyTorch forms on a CPU."""

from __future__ import annotations

import pytest
import torch

from lkda.models import linear
from tests.models.helpers import small, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the mixers' kernels are not run"),
]
PATTERNS = [["kda"], ["simplified"], ["kda", "softmax"], ["simplified", "mla"]]


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    """Linear layers of one input are multiplied together here too, where batches are small."""
    monkeypatch.setattr(linear, "FEWEST_TOKENS", 1)


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


OPTIONS = [
    ("kda", {}),
    ("kda", {"conv_width": 0}),
    ("kda", {"conv_width": 3, "gate": "head"}),
    ("kda", {"gate": "none"}),
    ("kda", {"gate_form": "bounded", "lower_bound": -3.0}),
    ("kda", {"gate": "head", "gate_form": "bounded"}),
    ("kda", {"negative_eigenvalues": True, "output_gate": False}),
    ("simplified", {"conv_width": 0}),
    ("simplified", {"output_gate": False}),
    ("softmax", {"rope_base": None}),
    ("mla", {"rope_base": 100.0}),
    ("mla", {"rope_base": 100.0, "qk_rope_head_dim": 32}),
    ("mla", {"rope_base": 100.0, "qk_rope_head_dim": 32, "qk_norm": True}),
    ("mla", {"qk_norm": True}),
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_float32_gradients_equal_those_of_the_plain_forms(name, options, packed):
    """Of every parameter, whatever the mixer's options are; a loss of what follows a carried state as well."""
    model = small([name], d_model=64, scale=2, mixer={"pattern": [name], "num_heads": 2, name: options})
    if options.get("gate_form") == "bounded":
        # A new bounded gate can be closed to 1e-12. The gradients of A_log and dt_bias are then sums of terms that
        # cancel, whose relative error says nothing about the kernels.
        for mixer in model.mixers():
            torch.nn.init.uniform_(mixer.dt_bias, -1, 1)
    x, found = tokens(1, 100), []
    for device in ("cuda", "cpu"):
        model, x = model.to(device), x.to(device)
        if packed:
            logits = model(x, cu_seqlens=torch.tensor([0, 0, 3, 70, 100, 100], device=device))
        else:
            state = model.init_state(1)
            first, state = model.forward_from(x[:, :30], state)
            second, _ = model.forward_from(x[:, 30:], state)
            logits = torch.cat([first, second], 1)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x.roll(-1, 1).flatten())
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        found.append([logits.detach().cpu(), *(g.cpu() for g in gradients)])
    for what, got, want in zip(("logits", *(n for n, _ in model.named_parameters())), *found):
        assert (got - want).norm() < 1e-2 * want.norm(), what
