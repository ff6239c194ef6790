"""The residual stream of a block and its norms, as one operator on a GPU and as modules elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lkda.models import residual
from tests.models.helpers import small, tokens


@pytest.fixture
def by_the_operator(monkeypatch):
    """Blocks take the path of a GPU. The operator's backend is then PyTorch's. Returns the calls of the operator."""
    calls = []

    def counting(x, y, weight, **options):
        calls.append(None if y is None else y.dtype)
        return operator(x, y, weight, **options)

    operator = residual.residual_norm
    monkeypatch.setattr(residual, "residual_norm", counting)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    return calls


def outputs_and_gradients(block, x):
    y, _ = block(x.requires_grad_())
    return [y, *torch.autograd.grad(y.square().mean(), [x, *block.parameters()])]


def block_and_input(**changes):
    torch.manual_seed(0)
    block = small(["kda"], **changes).blocks[0]
    for norm in (block.mixer_norm, block.mlp_norm):
        if norm is not None:
            nn.init.normal_(norm.weight, 1, 0.3)
    return block, torch.randn(2, 9, block.mixer_norm.weight.numel())


@pytest.mark.parametrize("changes", [{}, {"mlp_hidden": 0}], ids=str)
def test_a_block_by_the_operator_equals_one_of_modules(changes, request):
    block, x = block_and_input(**changes)
    want = outputs_and_gradients(block, x)
    calls = request.getfixturevalue("by_the_operator")
    got = outputs_and_gradients(block, x)
    assert calls == [None] if changes else [None, torch.float32]
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_packed_prompts_and_carried_states(by_the_operator):
    model, x = small(["kda"]), tokens(1, 9)
    state = model.init_state(2, max_tokens=16)
    model.prefill_packed(x, state, cu_seqlens=torch.tensor([0, 4, 9]))
    model.prefill(x, model.init_state(1))
    assert len(by_the_operator) == 2 * 2 * len(model.blocks)


def test_norms_with_hooks_or_of_other_classes_are_called(by_the_operator):
    block, x = block_and_input()
    seen = []
    block.mixer_norm.register_forward_hook(lambda module, given, result: seen.append("hook"))
    block.mlp_norm = nn.LayerNorm(x.shape[-1])
    block(x)
    assert seen == ["hook"]
    assert by_the_operator == []


def test_tensors_of_other_classes_go_to_the_modules(by_the_operator):
    class Shared(nn.Parameter):
        pass

    block, x = block_and_input()
    block.mixer_norm.weight = Shared(block.mixer_norm.weight.detach())
    block(x)
    assert by_the_operator == [torch.float32]


def test_the_norm_has_the_type_of_the_stream_without_autocast(by_the_operator):
    norm, x = nn.RMSNorm(8, eps=1e-5), torch.randn(3, 8).bfloat16()
    s, n = residual.normed_residual(x, x, norm)
    assert (s.dtype, n.dtype) == (torch.bfloat16, torch.bfloat16)
    assert by_the_operator == [torch.bfloat16]
