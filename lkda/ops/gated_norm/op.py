"""The public function: it checks its arguments, chooses a backend and runs it."""

from __future__ import annotations

from torch import Tensor

from lkda.checks import InputError
from lkda.ops.checks import check_alike
from lkda.ops.gated_norm import cpu, cuda
from lkda.ops.gated_norm.reference import gated_norm_torch
from lkda.ops.runtime.backend import Backend, choose

EPS = 1e-5

BACKENDS: dict[str, Backend] = {
    "cuda": Backend(cuda.gated_norm_cuda, cuda.reason_cannot_run),
    "cpu": Backend(cpu.gated_norm_cpu, cpu.reason_cannot_run),
    "torch": Backend(gated_norm_torch),
}


def gated_rms_norm(
    x: Tensor, gate: Tensor | None, weight: Tensor, *, eps: float = EPS, backend: str = "auto"
) -> Tensor:
    """x / sqrt(mean of x^2 + eps) * weight * sigmoid(gate), over the last dimension, computed in float32 at least.

    Args:
        x: [..., D].
        gate: of x's shape and dtype, before the sigmoid. None for no gate.
        weight: [D].
        eps: added to the mean.
        backend: auto | cuda | cpu | torch.
    Returns: of x's shape and dtype.
    Raises: ValueError if a shape, dtype or device does not fit; the message names the tensor.
    """
    fn = "gated_rms_norm"
    if weight.dim() != 1 or x.shape[-1:] != weight.shape:
        raise InputError(f"{fn}: weight must be [D] for x [..., D], got {list(weight.shape)} for x {list(x.shape)}.")
    if gate is not None and gate.shape != x.shape:
        raise InputError(f"{fn}: gate must have x's shape {list(x.shape)}, got {list(gate.shape)}.")
    check_alike(fn, {"x": x, "gate": gate, "weight": weight}, same_dtype=("x", "gate"))
    word = choose(fn, BACKENDS, backend, device=x.device, head_dim=x.shape[-1], dtype=x.dtype)
    return BACKENDS[word].run(x, gate, weight, float(eps))
