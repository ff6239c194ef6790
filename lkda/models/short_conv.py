"""Short causal depthwise convolution with SiLU, as in Mamba, KDA and their kin."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ShortConvolution(nn.Module):
    """y_t = SiLU(sum_s w_s x_{t-s}), s < width, per channel, no bias.

    The weight is [channels, 1, width], the newest token last. Computed as `width` shifted multiply-adds: on a CPU that
    is as fast as a grouped convolution forward and backward, and a packed row needs only a mask.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(
                f"conv_width must be at least 1 (0 in a mixer's options means no convolution), got {width}."
            )
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.width = width

    def init_state(self, batch_size: int, *, device: torch.device | None = None) -> Tensor:
        """The last width - 1 inputs, [B, width - 1, channels], zeros."""
        w = self.weight
        return torch.zeros(batch_size, self.width - 1, len(w), device=device or w.device, dtype=w.dtype)

    def forward(
        self, x: Tensor, *, position: Tensor | None = None, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x [B, T, channels] -> y of that shape, state [B, width - 1, channels].

        Args:
            position: [T], of each token in its sequence, where sequences are packed.
            state: the inputs before x; zeros where None.
        """
        T, taps = x.shape[1], self.weight.to(x.dtype)[:, 0].unbind(-1)
        past = self.init_state(len(x), device=x.device) if state is None else state
        window = torch.cat([past.to(x.dtype), x], 1)
        y = window[:, self.width - 1 :] * taps[-1]
        for s in range(1, self.width):
            shifted = window[:, self.width - 1 - s : self.width - 1 - s + T]
            if position is not None:
                shifted = torch.where((position >= s).unsqueeze(-1), shifted, 0)
            y = torch.addcmul(y, shifted, taps[-1 - s])
        return F.silu(y), window[:, T:].to(past.dtype)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, channels]"""
        y, state = self.forward(x.unsqueeze(1), state=state)
        return y.squeeze(1), state


def positions(cu_seqlens: Tensor, length: int) -> Tensor:
    """[length]: how far each token of a packed row is from the start of its sequence. No word with the host."""
    tokens = torch.arange(length, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens.long(), tokens, right=True) - 1
    return tokens - cu_seqlens.long()[sequence]
