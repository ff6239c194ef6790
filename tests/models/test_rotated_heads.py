"""The norm of heads and their rotation in softmax attention, as one operator on a GPU and as modules elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lkda.models.mixers import softmax
from lkda.models.mixers.softmax import SoftmaxAttention

OPTIONS = ({}, {"qk_norm": True}, {"qk_norm": True, "conv_width": 4})


@pytest.fixture
def by_the_operator(monkeypatch):
    """Mixers take the path of a GPU. The operator's backend is then PyTorch's. Returns the calls of the operator."""
    calls = []

    def counting(q, k, position, **options):
        calls.append("weights" in options)
        return operator(q, k, position, **options)

    operator = softmax.rotary_heads
    monkeypatch.setattr(softmax, "rotary_heads", counting)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    return calls


def mixer_and_input(options):
    torch.manual_seed(0)
    mixer = SoftmaxAttention(32, 2, **options)
    for norm in (mixer.q_norm, mixer.k_norm):
        if norm is not None:
            nn.init.normal_(norm.weight, 1, 0.3)
    return mixer, torch.randn(1, 9, 32)


def outputs_and_gradients(mixer, x, **options):
    y, _ = mixer(x.requires_grad_(), **options)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()])]


@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 4, 9])], ids=["rows", "packed"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_mixer_by_the_operator_equals_one_of_modules(options, cu_seqlens, request):
    mixer, x = mixer_and_input(options)
    want = outputs_and_gradients(mixer, x, cu_seqlens=cu_seqlens)
    calls = request.getfixturevalue("by_the_operator")
    got = outputs_and_gradients(mixer, x, cu_seqlens=cu_seqlens)
    assert calls == ["qk_norm" in options]
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_steps_after_a_prefill_continue_it(options, by_the_operator):
    """The norms of heads are not left out of a step, nor applied twice."""
    mixer, x = mixer_and_input(options)
    with torch.no_grad():
        want, _ = mixer(x)
        _, state = mixer(x[:, :6])
        for t in range(6, 9):
            y, state = mixer.step(x[:, t], state)
            torch.testing.assert_close(y, want[:, t], rtol=1e-4, atol=1e-5)


def test_norms_with_hooks_or_of_other_classes_are_called(by_the_operator):
    mixer, x = mixer_and_input({"qk_norm": True})
    seen = []
    mixer.q_norm.register_forward_hook(lambda module, given, result: seen.append("hook"))
    mixer(x)
    assert seen == ["hook"]
    mixer.q_norm = nn.LayerNorm(16)
    mixer(x)
    assert by_the_operator == []
