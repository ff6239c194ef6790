"""The public function: it checks its arguments, chooses a backend and runs it."""

from __future__ import annotations

import math
import sys

from torch import Tensor

from lkda.checks import InputError, check_count
from lkda.ops.checks import check_shape
from lkda.ops.runtime.backend import Backend, choose
from lkda.ops.sampling import cpu, cuda
from lkda.ops.sampling.reference import sample_torch

BACKENDS: dict[str, Backend] = {
    "cuda": Backend(cuda.sample_cuda, cuda.cannot_run),
    "cpu": Backend(cpu.sample_cpu, cpu.reason_cannot_run),
    "torch": Backend(sample_torch),
}
# Below it the likeliest token has all the probability in float32.
SMALLEST_TEMPERATURE = 1e-20


def check_sampling(*, temperature: float, top_k: int | None, top_p: float, min_p: float) -> None:
    """Raises ValueError for values that `sample_tokens` cannot sample with."""
    if not _is_number(temperature) or temperature < 0:
        raise InputError(
            f"generate: temperature must be a number of 0 or more (0: always the likeliest token), got {temperature!r}."
        )
    if not _is_number(top_p) or not 0 < top_p <= 1:
        raise InputError(f"generate: top_p must be above 0 and at most 1 (1: all tokens), got {top_p!r}.")
    if not _is_number(min_p) or not 0 <= min_p <= 1:
        raise InputError(f"generate: min_p must be from 0 to 1 (0: all tokens), got {min_p!r}.")
    if top_k is not None:
        check_count("generate: top_k", top_k, least=1)


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) <= sys.float_info.max


def sample_tokens(
    logits: Tensor,
    *,
    keys: Tensor,
    positions: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Sample one token per row. A row's token depends on its logits, key and position alone.

    Args:
        logits: [B, V].
        keys: int64 [B], of `draw_key`.
        positions: int64 [B], the number of the draw.
        temperature: the logits are divided by it; 0 takes the likeliest token.
        top_k: sample from the top_k likeliest tokens, and those as likely as the last of them; None: from all.
        top_p: in (0, 1]; of these, sample from the smallest set of likeliest tokens that has this share of the
            probability, and those as likely as the last of them.
        min_p: in [0, 1]; of these, sample from those that are at least min_p times as likely as the likeliest.
        backend: auto | cuda | cpu | torch.
    Returns: int64 [B]; -1 where the largest logit is not a finite number.
    Raises: ValueError for a value out of its range or a tensor that does not fit.
    """
    fn = "sample_tokens"
    check_sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    sizes: dict[str, int] = {}
    check_shape(fn, "logits", logits, "B V", sizes)
    check_shape(fn, "keys", keys, "B", sizes)
    check_shape(fn, "positions", positions, "B", sizes)
    word = choose(fn, BACKENDS, backend, device=logits.device, head_dim=sizes["V"], dtype=logits.dtype)
    temperature = 0.0 if temperature < SMALLEST_TEMPERATURE else float(temperature)
    return BACKENDS[word].run(logits, keys, positions, temperature, top_k or 0, float(top_p), float(min_p))
