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

LEAVE_OUT_POSITIONS = "or rope_base=null for no position encoding"


def check_rope_base(mixer: str, base: float | None) -> None:
    """Raises InputError unless the base of the rotary frequencies is a number above 0, or None for no positions."""
    if base is not None and not 0 < base < math.inf:
        raise InputError(
            f"mixer.{mixer}.rope_base must be a number above 0, got {base}: choose one, {LEAVE_OUT_POSITIONS}."
        )


class CachedAttention(Mixer):
    """Softmax attention to growing caches (see `lkda.models.growing_cache`), two or more.

    The state holds these caches, their length, and the caches of the convolutions.
    """

    op: ClassVar[str | None] = "softmax"
    backend: str
    o_proj: nn.Linear

    @abstractmethod
    def entry_shapes(self) -> Sequence[tuple[int, ...]]:
        """The shapes of what the caches hold for a token: (..., width) each."""

    def entry_dtypes(self) -> Sequence[torch.dtype]:
        """The data types of the caches."""
        return [self.o_proj.weight.dtype] * len(self.entry_shapes())

    @abstractmethod
    def convolutions(self) -> list[ShortConvolution]:
        """The short convolutions, in the order of their caches."""

    @abstractmethod
    def inputs(
        self, x: Tensor, *, cu_seqlens: Tensor | None, state: State | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Sequence[Tensor]]:
        """q [B, T, H, K], the entries [B, ..., T, width] of the tokens of x from which `keys_and_values` computes, and
        the caches of the convolutions."""

    @abstractmethod
    def keys_and_values(self, *caches: Tensor) -> tuple[Tensor, Tensor]:
        """k [B, S, H, K] and v [B, S, H, V] of caches [B, ..., S, width]."""

    def stored(self, *entries: Tensor) -> Sequence[Tensor]:
        """The entries of all caches, from those that `inputs` returns, which come first."""
        return entries

    def attended_and_stored(self, *entries: Tensor) -> tuple[tuple[Tensor, Tensor], Sequence[Tensor]]:
        """`keys_and_values` and `stored` of the same tokens."""
        return self.keys_and_values(*entries), self.stored(*entries)

    def split_state(self, state: State) -> tuple[State, Tensor, State]:
        """The growing caches, their length, and the caches of the convolutions."""
        count = len(self.entry_shapes())
        return state[:count], state[count], state[count + 1 :]

    def forward(
        self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        refuse_packed_state(cu_seqlens, state)
        if state is not None:
            self.check_state(state, len(x))
        q, entries, convolved = self.inputs(x, cu_seqlens=cu_seqlens, state=state)
        if cu_seqlens is not None:
            return self._output(q, self.keys_and_values(*entries), None, cu_seqlens), ()
        if state is None:
            length = new_length(x.shape[0], None, x.device)
            attended, stored = self.attended_and_stored(*entries)
            return self._output(q, attended, None, None), (*stored, length, *convolved)
        before, length, _ = self.split_state(state)
        caches, lengths = append_many(before, self.stored(*entries), length)
        y = self._output(q, self.keys_and_values(*caches), lengths, None)
        return y, (*(before if is_preallocated(length) else caches), length, *convolved)

    def forward_packed(self, x: Tensor, state: State, *, cu_seqlens: Tensor) -> tuple[Tensor, State]:
        caches, length, _ = self.split_state(state)
        if not is_preallocated(length):
            return super().forward_packed(x, state, cu_seqlens=cu_seqlens)
        self.check_state(state, len(cu_seqlens) - 1)
        q, entries, convolved = self.inputs(x, cu_seqlens=cu_seqlens, state=None)
        attended, stored = self.attended_and_stored(*entries)
        fill_packed(caches, stored, length, cu_seqlens.diff().tolist())
        return self._output(q, attended, None, cu_seqlens), (*caches, length, *convolved)

    def token_positions(self, x: Tensor, cu_seqlens: Tensor | None, state: State | None) -> Tensor:
        """The position of each token of x [B, T, ...] in its sequence, [T], or [B, T] where the lengths before them
        differ."""
        caches, length, _ = self.split_state(state) if state is not None else ((), None, ())
        if length is not None and x.shape[1] == 1 and is_preallocated(length):
            return length
        new = torch.arange(x.shape[1], device=x.device)
        if self.part is not None:
            return self.part.positions(new if cu_seqlens is None else positions(cu_seqlens, x.shape[1])[0])
        if cu_seqlens is not None:
            return positions(cu_seqlens, x.shape[1])[0]
        if length is None:
            return new
        return new + (length if is_preallocated(length) else caches[0].shape[-2])

    def check_state(self, state: State, sequences: int) -> None:
        """Raises ValueError unless it is a state of this mixer, for so many sequences."""
        shapes = [(sequences, *shape) for shape in self.entry_shapes()]
        count = len(shapes) + 1 + len(self.convolutions())
        found = [(*cache.shape[:-2], *cache.shape[-1:]) for cache in state[: len(shapes)]]
        if len(state) != count or found != shapes or len(state[len(shapes)]) != sequences:
            raise InputError(
                f"a state of {sequences} sequences of this mixer has caches of {shapes} per token and {count} parts in "
                f"all, got {found} and {len(state)}: give the state of this model for this batch."
            )

    def state_fits_cpp(self, x: Tensor, state: State) -> bool:
        """Whether a step can be in C++ on a CPU, from x [B, channels] on, with this state changed in place."""
        caches, length, convolved = self.split_state(state)
        if not can_take(x) or not len(x) or not is_preallocated(length) or not length.is_contiguous():
            return False
        # Of a cache that was cut, the entries of each sequence and head lie side by side.
        entries = [cache[(0,) * (cache.dim() - 2)] for cache in caches]
        return can_take(x, *self.filters(), *entries, *convolved)

    def _output(
        self, q: Tensor, attended: Sequence[Tensor], lengths: Sequence[int] | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        """y of q [B, T, H, K] and what `keys_and_values` returns; `lengths` as `append_many` returns them."""
        k, v = (y.to(q.dtype) for y in attended)
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
        device = device or self.o_proj.weight.device
        entries = zip(self.entry_shapes(), self.entry_dtypes(), strict=True)
        caches = [new_cache(batch_size, max_tokens, shape, dtype, device) for shape, dtype in entries]
        convolved = (convolve.init_state(batch_size, device=device) for convolve in self.convolutions())
        return *caches, new_length(batch_size, max_tokens, device), *convolved

    def cut_state(self, state: State, tokens: int) -> State:
        caches, length, convolved = self.split_state(state)
        return *(cut(cache, tokens) for cache in caches), length, *convolved

    def filters(self) -> list[Tensor]:
        return [convolve.weight for convolve in self.convolutions()]

    def state_bytes(self, context: int) -> int:
        cached = sum(weight.numel() - len(weight) for weight in self.filters())
        entries = zip(self.entry_shapes(), self.entry_dtypes(), strict=True)
        per_token = sum(math.prod(shape) * dtype.itemsize for shape, dtype in entries)
        return context * per_token + cached * self.o_proj.weight.element_size()

    def projection_flops(self) -> float:
        """FLOPs of one token in the linear layers and convolutions."""
        return linear_flops(self) + sum(2.0 * weight.numel() for weight in self.filters())


def refuse_full(cache: Tensor, length: Tensor) -> None:
    """Raises ValueError if a sequence has no room for a token; for the steps in C++."""
    if is_full(length, cache.shape[-2]):
        raise full_cache_error(cache.shape[-2], int(length.max()) + 1)
