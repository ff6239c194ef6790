"""An operator with first derivatives only says so. A penalty of its gradient would otherwise change nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lkda.ops import gated_rms_norm, kda_attention, linear, short_convolution, simplified_attention
from lkda.ops.products import op as products

B, T, H, D = 1, 70, 2, 32
DRAW = torch.Generator().manual_seed(0)


def drawn(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=DRAW)


def kda(backend: str) -> Callable[[Tensor], Tensor]:
    q, k, g, beta = drawn(B, T, H, D) / D, drawn(B, T, H, D) / D, -drawn(B, T, H, D), drawn(B, T, H)
    return lambda v: kda_attention(q, k, v, g, beta, backend=backend)[0]


def simplified(backend: str) -> Callable[[Tensor], Tensor]:
    q, k, decay = drawn(B, T, H, D), drawn(B, T, H, D), drawn(B, T, H)
    return lambda v: simplified_attention(q, k, v, decay, backend=backend)[0]


OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "kda chunk": kda("chunk"),
    "simplified chunk": simplified("chunk"),
    "short convolution": lambda x: short_convolution(x.flatten(2), drawn(H * D, 1, 4))[0],
    "gated norm": lambda x: gated_rms_norm(x, x, drawn(D)),
}


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_a_penalty_of_the_gradient_is_refused(operator: Callable[[Tensor], Tensor]) -> None:
    x = drawn(B, T, H, D).requires_grad_()
    total = operator(x).sum()
    (want,) = torch.autograd.grad(total, x, retain_graph=True)
    (gradient,) = torch.autograd.grad(total, x, create_graph=True)
    assert torch.equal(gradient, want)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(total + gradient.square().sum(), x)


def test_that_of_a_product_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where PyTorch multiplies, it has a second derivative. oneDNN's product refuses it."""
    x, weight = drawn(64, 32).requires_grad_(), drawn(48, 32).requires_grad_()
    for onednn in {False, products._onednn_is_faster()}:
        monkeypatch.setattr(products, "_onednn_is_faster", lambda onednn=onednn: onednn)
        total = linear(x, weight).sum()
        (gradient,) = torch.autograd.grad(total, x, create_graph=True)
        if not onednn:
            assert torch.autograd.grad(gradient.square().sum(), weight)[0].any()
            continue
        with pytest.raises(RuntimeError, match="first derivatives only"):
            torch.autograd.grad(total + gradient.square().sum(), weight)


def test_the_recurrence_has_them() -> None:
    x = drawn(B, T, H, D).requires_grad_()
    total = simplified("recurrent")(x).square().sum()
    (gradient,) = torch.autograd.grad(total, x, create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), x)[0].any()
