"""The head's loss in pieces is the loss of all its logits at once, with its gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lkda.ops.cross_entropy import cpu, cuda, op
from lkda.ops.cross_entropy.op import linear_cross_entropies, linear_cross_entropy
from lkda.targets import IGNORE_INDEX

CLASSES, WIDTH = 50, 16


def inputs(tokens: int, *, device: str = "cpu", classes: int = CLASSES) -> tuple[Tensor, Tensor, Tensor]:
    """x and weight in float64, and targets of which every seventh is not predicted."""
    draw = torch.Generator(device).manual_seed(0)
    x = torch.randn(tokens, WIDTH, dtype=torch.float64, generator=draw, device=device)
    weight = torch.randn(classes, WIDTH, dtype=torch.float64, generator=draw, device=device)
    targets = torch.randint(classes, (tokens,), generator=draw, device=device)
    targets[::7] = IGNORE_INDEX
    return x, weight, targets


def gradients(loss: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(3 * loss, of)


@pytest.mark.parametrize("tokens", [1, 127, 128, 1000])
def test_pieces_give_the_whole(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_LOGITS", 128 * CLASSES)
    x, weight, targets = inputs(tokens)
    targets[-1] = 3
    for tensor in (x, weight):
        tensor.requires_grad_()
    want = F.cross_entropy(x @ weight.mT, targets)
    got = linear_cross_entropy(x, weight, targets)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    for mine, theirs in zip(gradients(got, x, weight), gradients(want, x, weight), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-14)
    each = F.cross_entropy(x @ weight.mT, targets, reduction="none")
    torch.testing.assert_close(linear_cross_entropies(x, weight, targets), each.float())


def test_without_targets_it_is_zero() -> None:
    x, weight, targets = inputs(10)
    targets[:] = IGNORE_INDEX
    for tensor in (x, weight):
        tensor.requires_grad_()
    loss = linear_cross_entropy(x, weight, targets)
    assert float(loss) == 0
    assert not any(gradient.any() for gradient in gradients(loss, x, weight))


def test_without_tokens_it_is_zero() -> None:
    x, weight, targets = inputs(0)
    for tensor in (x, weight):
        tensor.requires_grad_()
    loss = linear_cross_entropy(x, weight, targets)
    assert float(loss) == 0
    grad_x, grad_weight = gradients(loss, x, weight)
    assert grad_x.shape == x.shape
    assert not grad_weight.any()
    assert linear_cross_entropies(x, weight, targets).shape == (0,)


@pytest.mark.parametrize("wrong", [CLASSES, 10**6, -1, -99])
@pytest.mark.parametrize("loss", [linear_cross_entropy, linear_cross_entropies])
def test_a_target_that_is_no_class_is_refused(loss: Any, wrong: int) -> None:
    x, weight, targets = inputs(10)
    targets[4] = wrong
    with pytest.raises(ValueError, match=f"from 0 to {CLASSES - 1}, or -100 .* got {wrong}"):
        loss(x, weight, targets)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, t: (x, w, t.int()), "targets must be int64, got torch.int32"),
        (lambda x, w, t: (x, w, t[:4]), r"targets must be \[N\] = \[10\], got \[4\]"),
        (lambda x, w, t: (x, w[:, :3], t), r"weight must be \[V, d\]"),
        (lambda x, w, t: (x.unsqueeze(0), w, t), r"x must be \[N, d\]"),
        (lambda x, w, t: (x, w.long(), t), "weight must be a floating-point tensor"),
    ],
)
def test_what_does_not_fit_is_said(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*change(*inputs(10)))


def test_a_second_derivative_is_refused_also_where_a_first_one_is_wanted() -> None:
    """A penalty of the gradient, added to the loss, would otherwise silently change nothing."""
    x, weight, targets = inputs(10)
    x.requires_grad_()
    loss = linear_cross_entropy(x, weight, targets)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(F.cross_entropy(x @ weight.mT, targets), x)[0])
    for penalized in (gradient.square().sum(), loss + gradient.square().sum()):
        with pytest.raises(RuntimeError, match="first derivatives only"):
            torch.autograd.grad(penalized, x, retain_graph=True)


def test_it_breaks_no_compiled_graph() -> None:
    x, weight, targets = inputs(300)
    x.requires_grad_()

    def loss(y: Tensor) -> Tensor:
        return linear_cross_entropy(2 * y, weight, targets)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    (got,), (want,) = gradients(compiled(x), x), gradients(loss(x), x)
    torch.testing.assert_close(got, want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("classes", [1000, 32000, 16387])
def test_the_kernel_agrees_with_float64(dtype: torch.dtype, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of logits that were rounded to the dtype, the loss to float32 and the gradients to the dtype."""
    monkeypatch.setattr(op, "_LOGITS", 256 * classes)
    x, weight, targets = inputs(700, device="cuda", classes=classes)
    rounded, wide = x.to(dtype).requires_grad_(), x.to(dtype).double().requires_grad_()
    narrow = weight.float().requires_grad_()
    same = weight.float().to(dtype).double().requires_grad_()
    got, want = linear_cross_entropy(rounded, narrow, targets), F.cross_entropy(wide @ same.mT, targets)
    error = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-3}[dtype]  # float32 products may be TF32
    torch.testing.assert_close(got.double(), want, rtol=error, atol=0)
    for mine, theirs in zip(gradients(got, rounded, narrow), gradients(want, wide, same), strict=True):
        assert (mine.double() - theirs).norm() < 2 * error * theirs.norm()


def rows_with_wrong_targets(rows: Any, device: str) -> tuple[list[float], Tensor]:
    """The losses of six rows whose targets are a class, none, and no class, beside that of PyTorch for the first."""
    logits = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).to(device)
    targets = torch.tensor([5, IGNORE_INDEX, 64, 10**9, -1, -(10**9)], device=device)
    want = F.cross_entropy(logits[:1], targets[:1])
    return rows(logits, targets, torch.ones((), device=device))[0].tolist(), want


def check_wrong_targets(losses: list[float], want: Tensor) -> None:
    assert losses[0] == pytest.approx(float(want), rel=1e-5)
    assert losses[1] == 0
    assert all(math.isnan(loss) for loss in losses[2:])


def test_without_a_check_of_the_host_a_target_that_is_no_class_has_the_loss_nan() -> None:
    check_wrong_targets(*rows_with_wrong_targets(op.rows_torch, "cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_in_the_kernel_a_target_that_is_no_class_has_the_loss_nan() -> None:
    check_wrong_targets(*rows_with_wrong_targets(cuda.rows_cuda, "cuda"))


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_rows_in_cpp_are_those_in_pytorch(dtype: torch.dtype, allowed: float) -> None:
    draw = torch.Generator().manual_seed(0)
    logits = 30 * torch.randn(9, 77, dtype=dtype, generator=draw)
    logits[1, 3:] = -1e30
    logits[2, 5] = 1e4
    targets = torch.randint(77, (9,), generator=draw)
    targets[3] = IGNORE_INDEX
    if not cpu.can_take(logits):
        pytest.skip("no C++ compiler")
    scale = torch.tensor(0.3, dtype=dtype)
    want = op.rows_torch(logits, targets, scale)
    for got, wanted in zip(cpu.rows_cpu(logits.clone(), targets, scale), want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=allowed, atol=allowed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("level", [-1e30, 1e30])
def test_equal_logits_are_equally_likely_however_large(dtype: torch.dtype, level: float) -> None:
    logits, targets, scale = torch.full((2, 64), level, dtype=dtype), torch.tensor([3, IGNORE_INDEX]), torch.tensor(1.0)
    forms = [op.rows_torch, *([cpu.rows_cpu] if cpu.can_take(logits) else [])]
    for rows in forms:
        losses, gradient = rows(logits.clone(), targets, scale)
        torch.testing.assert_close(losses.double(), torch.tensor([64.0, 1.0]).double().log())
        want = torch.full((2, 64), 1 / 64, dtype=torch.float64)
        want[0, 3] -= 1
        want[1] = 0
        torch.testing.assert_close(gradient.double(), want)


def test_a_row_without_finite_logits_has_no_number() -> None:
    logits = torch.tensor([[0.0, float("inf")], [float("-inf"), float("-inf")], [float("nan"), 0.0]])
    losses, _ = op.rows_torch(logits, torch.zeros(3, dtype=torch.int64), torch.tensor(1.0))
    assert losses.isnan().all()
