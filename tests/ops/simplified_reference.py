"""What the simplified kernels are tested against.

It is the float64 recurrence, computed by doubling (the same sums, in log2 T steps instead of T), so that a hundred
thousand tokens are affordable. The operator has no matrix product, so the reference is the same result, rounded to the
dtype in which a tensor is stored. A kernel's error may be at most twice that of the reference, or that of sums in
float32: 1e-5, and 1e-4 for the gradient of the decay.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lkda.ops.simplified.reference.recurrent import EPS
from tests.ops.cases import relative


def scan(b: Tensor, x: Tensor) -> Tensor:
    """y_t = b_t y_{t-1} + x_t along dimension 1, y_{-1} = 0; b [B, T, H, 1, 1], x [B, T, H, 2, D]."""
    b, y, step = b.clone(), x.clone(), 1
    while step < x.shape[1]:
        y[:, step:] += b[:, step:] * y[:, :-step].clone()
        b[:, step:] *= b[:, :-step].clone()
        step *= 2
    return y


class Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, b, x):
        y = scan(b, x)
        ctx.save_for_backward(b, y)
        return y

    @staticmethod
    def backward(ctx, dy):
        b, y = ctx.saved_tensors
        later = torch.cat([b[:, 1:], torch.zeros_like(b[:, :1])], 1)
        dx = scan(later.flip(1), dy.flip(1)).flip(1)
        before = torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], 1)
        return (dx * before).sum((-1, -2), keepdim=True), dx


def simplified_by_doubling(q, k, v, decay, *, initial_state, cu_seqlens=None):
    """As `simplified_attention`, for float64 inputs with decay [B, T, H]."""
    B, T = q.shape[:2]
    bounds = list(range(0, (B + 1) * T, T)) if cu_seqlens is None else cu_seqlens.tolist()
    q, k, v, b = (x.flatten(0, 1)[None] for x in (q, k, v, decay[..., None, None]))
    write = torch.sigmoid(k)
    x = torch.stack([write * v, write], -2)
    filled = [(n, start, end) for n, (start, end) in enumerate(zip(bounds, bounds[1:])) if start < end]
    sequences, starts, ends = (torch.tensor(row, device=q.device) for row in zip(*filled))
    begins = torch.zeros_like(b[0], dtype=torch.bool).index_fill(0, starts, True)
    entering = torch.zeros_like(x[0]).index_put((starts,), initial_state[sequences])
    y = Scan.apply(torch.where(begins, 0.0, b), x + b * entering)
    o = q * y[..., 0, :] / (y[..., 1, :] + EPS)
    final = initial_state.index_put((sequences,), y[0, ends - 1])
    return o[0].unflatten(0, (B, T)), final


def outputs_and_gradients(
    op: Callable[..., tuple[Tensor, Tensor]], inputs: dict[str, Tensor], **options: object
) -> dict[str, Tensor]:
    """o, final_state and the gradient of each input, for fixed random gradients of both, exact in bfloat16."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    outputs = op(**leaves, **options)
    generator = torch.Generator().manual_seed(1)
    random = [torch.randn(x.shape, generator=generator).bfloat16().to(x.device, x.dtype) for x in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), random)
    return dict(zip(("o", "final_state"), outputs)) | {f"d{name}": x for name, x in zip(leaves, gradients)}


def simplified_truth(inputs: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    """Outputs and gradients in float64, on the very inputs that the kernel gets."""
    return outputs_and_gradients(simplified_by_doubling, {k: x.double() for k, x in inputs.items()}, **options)


def assert_error_within_reference(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, x in want.items():
        stored = relative(x.to(got[name].dtype), x)
        allowed = max(2 * stored, 1e-4 if name == "ddecay" else 1e-5)
        error = relative(got[name], x)
        assert error < allowed, f"{name} errs {error:.1e}, allowed {allowed:.1e}"
