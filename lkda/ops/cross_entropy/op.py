"""The loss of a head, without all of its logits at once: linear layer and cross-entropy, some tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from lkda.checks import InputError
from lkda.ops.checks import check_alike, check_shape
from lkda.ops.cross_entropy.cpu import can_take, rows_cpu
from lkda.ops.cross_entropy.cuda import rows_cuda
from lkda.ops.derivatives import refusing_second_derivatives
from lkda.ops.products.op import product
from lkda.ops.runtime.jit import reason_cannot_run
from lkda.ops.runtime.kernel_inputs import ELEMENTS
from lkda.targets import IGNORE_INDEX

# Logits of a piece: 2^26 of them are 128 MiB in bf16.
_LOGITS = 2**26


def rows_torch(logits: Tensor, targets: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each row of `logits` [N, V], 0 where the target is IGNORE_INDEX, and the gradient of `scale` times
    their sum, [N, V] in the logits' dtype. Computed in float32, or float64 where the logits are. The loss of a target
    that is no class is NaN."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    wide = wide - wide.amax(1, keepdim=True)  # the logarithm of the sum would be lost in logits of 1e30
    has_target = targets != IGNORE_INDEX
    place = targets.clamp(0, logits.shape[1] - 1).unsqueeze(1)
    log_sum = wide.logsumexp(1, keepdim=True)
    losses = (log_sum - wide.gather(1, place)).squeeze(1)
    losses = torch.where(has_target, losses.masked_fill(place.squeeze(1) != targets, torch.nan), 0.0)
    gradient = (wide - log_sum).exp_().scatter_add_(1, place, wide.new_full(place.shape, -1.0))
    return losses, (gradient * torch.where(has_target, scale, 0.0).unsqueeze(1)).to(logits.dtype)


def _rows(logits: Tensor, targets: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    aligned = logits.shape[1] * logits.element_size() % 16 == 0
    if logits.is_cuda and aligned and logits.dtype in ELEMENTS and reason_cannot_run(logits.device) is None:
        return rows_cuda(logits, targets, scale)
    if can_take(logits):
        return rows_cpu(logits, targets, scale)
    return rows_torch(logits, targets, scale)


def _pieces(tokens: int, vocab_size: int) -> int:
    """Tokens of a piece: a multiple of 128, as many as _LOGITS allows."""
    return min(tokens, max(128, _LOGITS // vocab_size // 128 * 128))


def _product_into(out: Tensor, x: Tensor, y: Tensor) -> None:
    """out = x y."""
    if out.is_cuda:
        torch.mm(x, y, out=out)  # without a copy
    else:
        out.copy_(product(x, y))


def _add_product(total: Tensor, x: Tensor, y: Tensor, *, first: bool) -> None:
    """total += x y, in the total's dtype; what the total holds before the first product is ignored."""
    kind = total.dtype
    if x.dtype != kind and x.is_cuda:  # the product adds the total itself, which a launch of its own would read again
        if first:
            torch.mm(x, y, out_dtype=kind, out=total)
        else:
            torch.addmm(total, x, y, out_dtype=kind, out=total)
        return
    found = product(x.to(kind), y.to(kind))
    if first:
        total.copy_(found)
    else:
        total.add_(found)


@torch.library.custom_op("lkda::linear_cross_entropy", mutates_args=())
def _forward(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check_classes(targets, len(weight))
    rows = weight.to(x.dtype)
    has_target = (targets != IGNORE_INDEX).sum().clamp(min=1)
    scale = 1.0 / has_target.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    piece = _pieces(len(x), len(weight))
    kind = torch.promote_types(weight.dtype, torch.float32)
    if not len(x):
        return scale.new_zeros(()), torch.empty_like(x), torch.zeros_like(weight)
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight, dtype=kind)
    losses = []
    for start in range(0, len(x), piece):
        part = slice(start, start + piece)
        loss, gradient = _rows(product(x[part], rows.mT), targets[part], scale)
        losses.append(loss)
        _product_into(grad_x[part], gradient, rows)
        _add_product(grad_weight, gradient.mT, x[part], first=start == 0)
    return torch.cat(losses).sum() * scale, grad_x, grad_weight.to(weight.dtype)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((), dtype=kind), torch.empty_like(x), torch.empty_like(weight)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])


@refusing_second_derivatives
def _backward(ctx, grad, *_):
    grad_x, grad_weight = ctx.saved_tensors
    return grad_x * grad, grad_weight * grad, None


_forward.register_autograd(_backward, setup_context=_setup_context)


def _check(fn: str, x: Tensor, weight: Tensor, targets: Tensor) -> None:
    """Raises ValueError unless the shapes, types and devices fit."""
    sizes: dict[str, int] = {}
    check_shape(fn, "x", x, "N d", sizes)
    check_shape(fn, "weight", weight, "V d", sizes)
    check_shape(fn, "targets", targets, "N", sizes)
    check_alike(fn, {"x": x, "weight": weight}, same_dtype=())
    if targets.dtype != torch.int64:
        raise InputError(f"{fn}: targets must be int64, got {targets.dtype}.")
    if targets.device != x.device:
        raise InputError(f"{fn}: targets is on {targets.device} and x on {x.device}; move one of them.")


def _check_classes(targets: Tensor, classes: int) -> None:
    """Raises ValueError for a target on a CPU that is no class. To look at those of a GPU would wait for it: there the
    loss is NaN."""
    if targets.is_cpu and len(targets):
        given = targets[targets != IGNORE_INDEX]
        wrong = given[(given < 0) | (given >= classes)]
        if len(wrong):
            raise InputError(
                f"a target must be from 0 to {classes - 1}, or {IGNORE_INDEX} where nothing is predicted; "
                f"got {int(wrong[0])}."
            )


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The mean of cross_entropy(x weightᵀ, targets) over the targets that are not IGNORE_INDEX, in nats.

    The logits exist for some tokens at a time, and the gradients are computed with them, in the forward.

    Args:
        x: [N, d], of the type that the product is to have.
        weight: [V, d], of x's type or float32; its gradient is summed in float32 at least.
        targets: [N] int64.
    Returns: a scalar in float32, or float64 where x is; 0 where no target is left. It has no second derivatives.
    Raises: ValueError if a shape, dtype or device does not fit, and on a CPU for a target that is no class; on a GPU
        such a target makes the loss NaN.
    """
    _check("linear_cross_entropy", x, weight, targets)
    loss: Tensor = _forward(x, weight, targets)[0]
    return loss


@torch.no_grad()
def linear_cross_entropies(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Of each target, [N] in float32, 0 where it is IGNORE_INDEX; without gradients. Arguments as of the mean."""
    _check("linear_cross_entropies", x, weight, targets)
    _check_classes(targets, len(weight))
    rows, piece = weight.to(x.dtype), max(1, _pieces(len(x), len(weight)))
    parts = zip(x.split(piece), targets.split(piece), strict=True)
    losses = [
        torch.nn.functional.cross_entropy(
            product(y, rows.mT).float(), wanted, ignore_index=IGNORE_INDEX, reduction="none"
        )
        for y, wanted in parts
    ]
    return torch.cat(losses)
