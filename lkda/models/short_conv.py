"""The short causal depthwise convolution with SiLU of Mamba and KDA."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from lkda.checks import InputError
from lkda.ops import short_convolution
from lkda.ops.checks import check_shape
from lkda.ops.rows.cpu import can_take, convolve_rows

_drawn_later: ContextVar[bool] = ContextVar("drawn_later", default=False)


@contextmanager
def convolutions_drawn_later() -> Iterator[None]:
    """Leaves the filters of convolutions that are built inside without values.

    `build_model` initialises them after all other weights: the weights of a seed depend on the order of sampling.
    """
    token = _drawn_later.set(True)
    try:
        yield
    finally:
        _drawn_later.reset(token)


class ShortConvolution(nn.Module):
    """y_t = SiLU(sum_s w_s x_{t-s}) per channel, with s < width and no bias.

    The weight is [channels, 1, width], with the newest token last. Its initialisation is N(0, std), or uniform within
    1/sqrt(width) where `std` is None, as in nn.Conv1d.
    """

    def __init__(self, channels: int, width: int, *, std: float | None = None) -> None:
        super().__init__()
        if width < 1:
            raise InputError(
                f"conv_width must be at least 1 (0 in a mixer's options means no convolution), got {width}."
            )
        if std is not None and not 0 <= std < math.inf:
            raise InputError(f"conv_std must be a number of 0 or more, or null (uniform), got {std!r}.")
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.width, self.std = width, std
        if not _drawn_later.get():
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the filters again."""
        if self.std is not None:
            nn.init.normal_(self.weight, std=self.std)
        else:
            bound = self.width**-0.5
            nn.init.uniform_(self.weight, -bound, bound)

    def init_state(self, batch_size: int, *, device: torch.device | None = None) -> Tensor:
        """The state before the first token: zeros [B, width - 1, channels] for the last width - 1 inputs."""
        w = self.weight
        return torch.zeros(batch_size, self.width - 1, len(w), device=device or w.device, dtype=w.dtype)

    def forward(self, x: Tensor, *, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, T, channels] -> y of the same shape, and the state after it [B, width - 1, channels].

        Mixers convolve q, k and v with one call of `lkda.ops.short_convolutions` instead.
        """
        return short_convolution(x, self.weight, state=state)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, channels] -> y of the same shape, and the state after it, which may be the given one, changed.

        Raises: ValueError for a state of another number of sequences, channels or tokens.
        """
        check_shape("a short convolution", "x", x, "B C", {"C": len(self.weight)})
        want = (len(x), self.width - 1, len(self.weight))
        if state.shape != want:
            raise InputError(f"a short convolution needs a state of {list(want)}, got {list(state.shape)}.")
        if can_take(x, self.weight, state):
            return convolve_rows(x, self.weight, state), state
        y, state = self.forward(x.unsqueeze(1), state=state)
        return y.squeeze(1), state
