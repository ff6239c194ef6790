"""Loss by source of a text that has several, one after another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lkda.targets import IGNORE_INDEX


class Source(Protocol):
    """Tokens `begin` to `end` of the text, which are `bytes` long as UTF-8."""

    @property
    def name(self) -> str: ...
    @property
    def begin(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def bytes(self) -> int: ...


class SourceLoss:
    """The mean loss over the targets of each source.

    Args:
        sources: of the whole text, in order.
        device: of the losses.
    """

    def __init__(self, sources: Sequence[Source], device: torch.device) -> None:
        self.sources = sources
        self.ends = torch.tensor([source.end for source in sources], device=device)
        # One more, for the padding after the text.
        self.nats = torch.zeros(len(sources) + 1, dtype=torch.float64, device=device)
        self.counts = torch.zeros(len(sources) + 1, dtype=torch.int64, device=device)
        self.next = 0

    def update(self, losses: Tensor, targets: Tensor) -> None:
        """Add the losses of the next batch of the text, [B, T] as its targets. Targets of IGNORE_INDEX do not count."""
        # The target of token n of the text is its token n + 1, which decides the source.
        places = torch.arange(self.next + 1, self.next + 1 + targets.numel(), device=self.ends.device)
        source = torch.searchsorted(self.ends, places, right=True)
        counted = targets.flatten() != IGNORE_INDEX
        self.nats.index_add_(0, source, losses.flatten().double() * counted)
        self.counts.index_add_(0, source, counted.long())
        self.next += targets.numel()

    def compute(self) -> dict[str, dict[str, float]]:
        """{source: {"loss": nats per token, "bits_per_byte", "tokens": number of targets}}, without sources that had no
        target."""
        found = {}
        for source, nats, count in zip(self.sources, self.nats.tolist(), self.counts.tolist(), strict=False):
            if count:
                bytes_per_token = source.bytes / (source.end - source.begin)
                bits = nats / count / (math.log(2) * bytes_per_token)
                found[source.name] = {"loss": nats / count, "bits_per_byte": bits, "tokens": count}
        return found
