"""The base of mixers that attend to a growing cache with an entry per token."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from lkda.checks import InputError
from lkda.models.growing_cache import (
    append_many,
    attend_each,
    cut,
    fill_packed,
    full_cache_error,
    is_preallocated,
    new_cache,
    new_length,
)
from lkda.models.mixer import Mixer, State, linear_flops, refuse_packed_state
from lkda.models.short_conv import ShortConvolution
from lkda.ops import softmax_attention
from lkda.ops.sequences import positions
from lkda.ops.softmax.cpu.step import can_take, is_full


class CachedAttention(Mixer):
    """Softmax attention to two growing caches (see `lkda.models.growing_cache`).

    The state holds the two caches, their length, and the caches of the convolutions.
    """

    op: ClassVar[str | None] = "softmax"
    backend: str
    o_proj: nn.Linear

    @abstractmethod
    def entry_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of what the caches hold for a token: (..., width) each."""

    @abstractmethod
    def convolutions(self) -> list[ShortConvolution]:
        """The short convolutions, in the order of their caches."""

    @abstractmethod
    def inputs(
        self, x: Tensor, *, cu_seqlens: Tensor | None, state: State | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Sequence[Tensor]]:
        """q [B, T, H, K], the entries [B, ..., T, width] of the tokens of x, and the caches of the convolutions."""

    @abstractmethod
    def keys_and_values(self, *caches: Tensor) -> tuple[Tensor, Tensor]:
        """k [B, S, H, K] and v [B, S, H, V] of caches [B, ..., S, width]."""

    def forward(
        self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        refuse_packed_state(cu_seqlens, state)
        if state is not None:
            self.check_state(state, len(x))
        q, entries, convolved = self.inputs(x, cu_seqlens=cu_seqlens, state=state)
        caches, lengths = list(entries), None
        length = new_length(x.shape[0], None, x.device) if state is None else state[2]
        if state is not None:
            caches, lengths = append_many(state[:2], caches, length)
        y = self._output(q, caches, lengths, cu_seqlens)
        if cu_seqlens is not None:
            return y, ()
        return y, (*(caches if state is None or not is_preallocated(length) else state[:2]), length, *convolved)

    def forward_packed(self, x: Tensor, state: State, *, cu_seqlens: Tensor) -> tuple[Tensor, State]:
        if not is_preallocated(state[2]):
            return super().forward_packed(x, state, cu_seqlens=cu_seqlens)
        self.check_state(state, len(cu_seqlens) - 1)
        q, entries, convolved = self.inputs(x, cu_seqlens=cu_seqlens, state=None)
        fill_packed(state[:2], entries, state[2], cu_seqlens.diff().tolist())
        return self._output(q, entries, None, cu_seqlens), (*state[:3], *convolved)

    def token_positions(self, x: Tensor, cu_seqlens: Tensor | None, state: State | None) -> Tensor:
        """The position of each token of x [B, T, ...] in its sequence, [T], or [B, T] where the lengths before them
        differ."""
        if state is not None and x.shape[1] == 1 and is_preallocated(state[2]):
            return state[2]
        new = torch.arange(x.shape[1], device=x.device)
        if self.part is not None:
            return self.part.positions(new if cu_seqlens is None else positions(cu_seqlens, x.shape[1])[0])
        if cu_seqlens is not None:
            return positions(cu_seqlens, x.shape[1])[0]
        if state is None:
            return new
        return new + (state[2] if is_preallocated(state[2]) else state[0].shape[-2])

    def check_state(self, state: State, sequences: int) -> None:
        """Raises ValueError unless it is a state of this mixer, for so many sequences."""
        count = 3 + len(self.convolutions())
        shapes = [(sequences, *shape) for shape in self.entry_shapes()]
        found = [(*cache.shape[:-2], *cache.shape[-1:]) for cache in state[:2]]
        if len(state) != count or found != shapes or len(state[2]) != sequences:
            raise InputError(
                f"a state of {sequences} sequences of this mixer has caches of {shapes} per token and {count} parts in "
                f"all, got {found} and {len(state)}: give the state of this model for this batch."
            )

    def state_fits_cpp(self, x: Tensor, state: State) -> bool:
        """Whether a step can be in C++ on a CPU, from x [B, channels] on, with this state changed in place."""
        if not can_take(x) or not len(x) or not is_preallocated(state[2]) or not state[2].is_contiguous():
            return False
        # Of a cache that was cut, the entries of each sequence and head lie side by side.
        entries = [cache[(0,) * (cache.dim() - 2)] for cache in state[:2]]
        return can_take(x, *self.filters(), *entries, *state[3:])

    def _output(
        self, q: Tensor, caches: Sequence[Tensor], lengths: Sequence[int] | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        """y of q [B, T, H, K] and the caches; `lengths` as `append_many` returns them."""
        k, v = (y.to(q.dtype) for y in self.keys_and_values(*caches))
        if self.part is not None:
            o = self.part.attend(q, k, v, backend=self.backend)
        elif lengths is not None:
            o = attend_each(q, k, v, lengths, backend=self.backend)
        else:
            longest = self.longest_sequence
            o = softmax_attention(q, k, v, cu_seqlens=cu_seqlens, longest=longest, backend=self.backend)
        return self.o_proj(o.flatten(-2))

    def init_state(
        self, batch_size: int, *, max_tokens: int | None = None, device: torch.device | None = None
    ) -> State:
        w = self.o_proj.weight
        device = device or w.device
        first, second = (new_cache(batch_size, max_tokens, shape, w, device) for shape in self.entry_shapes())
        caches = (convolve.init_state(batch_size, device=device) for convolve in self.convolutions())
        return first, second, new_length(batch_size, max_tokens, device), *caches

    def cut_state(self, state: State, tokens: int) -> State:
        return cut(state[0], tokens), cut(state[1], tokens), *state[2:]

    def filters(self) -> list[Tensor]:
        return [convolve.weight for convolve in self.convolutions()]

    def state_bytes(self, context: int) -> int:
        cached = sum(weight.numel() - len(weight) for weight in self.filters())
        entries = sum(math.prod(shape) for shape in self.entry_shapes())
        return (context * entries + cached) * self.o_proj.weight.element_size()

    def projection_flops(self) -> float:
        """FLOPs of one token in the linear layers and convolutions."""
        return linear_flops(self) + sum(2.0 * weight.numel() for weight in self.filters())


def refuse_full(cache: Tensor, length: Tensor) -> None:
    """Raises ValueError if a sequence has no room for a token; for the steps in C++."""
    if is_full(length, cache.shape[-2]):
        raise full_cache_error(cache.shape[-2], int(length.max()) + 1)
