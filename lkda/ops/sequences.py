"""Cutting the sequences of a batch into chunks, in a layout in which a scan over time runs all sequences in parallel.

The chunks number m of all sequences lie side by side. The sequences are sorted by decreasing length, so the ones that
still have a chunk at step m are always the first few. [B, T] batches and packed rows with cu_seqlens have the same
layout.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_longest = WeakTensorKeyDictionary()  # bounds -> (their version, the longest sequence)


def lengths_of(batch: int, length: int, cu_seqlens: Tensor | None) -> list[int]:
    """Tokens in each sequence: `batch` times `length`, or as cu_seqlens [N + 1] says, which is read from its device."""
    if cu_seqlens is None:
        return [length] * batch
    bounds = cu_seqlens.tolist()
    return [end - start for start, end in zip(bounds, bounds[1:])]


def bounds_of(batch: int, length: int, cu_seqlens: Tensor | None) -> Tensor:
    """The bounds of the sequences in the rows [batch * length], int32 [N + 1] and contiguous."""
    if cu_seqlens is None:
        return torch.arange(0, batch * length + 1, length, dtype=torch.int32)
    return cu_seqlens.to(torch.int32).contiguous()


def longest(cu_seqlens: Tensor, length: int) -> int:
    """The number of tokens of the longest sequence. In a traced or captured call, where that cannot be read, it is
    `length`, that of the whole row.

    Reading it waits for the device. It is read once per batch, by the first layer that asks. Tensors made in inference
    mode have no version number, so for them every layer reads it.
    """
    if torch.compiler.is_compiling() or (cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()):
        return length
    if cu_seqlens.is_inference():
        return int(cu_seqlens.diff().max())
    version, tokens = _longest.get(cu_seqlens, (None, 0))
    if version != cu_seqlens._version:
        tokens = int(cu_seqlens.diff().max())
        _longest[cu_seqlens] = (cu_seqlens._version, tokens)
    return tokens


def positions(cu_seqlens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """For each of `length` tokens of a packed row: its position in its sequence, and the number of that sequence.

    This does not wait for the device.
    """
    tokens = torch.arange(length, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens.long(), tokens, right=True) - 1
    return tokens - cu_seqlens.long()[sequence], sequence


class Chunks:
    """The layout of chunks of `size` tokens. The last chunk of a sequence is padded.

    Attributes:
        count: M, the number of all chunks.
        alive: for each step m of the scan the number of sequences that still have a chunk. The step's chunks are the
            next `alive[m]` ones.
    """

    def __init__(self, lengths: list[int], size: int, device: torch.device) -> None:
        lengths = [operator.index(n) for n in lengths]  # torch.compile may have symbols
        counts = [-(-n // size) for n in lengths]
        order = sorted(range(len(lengths)), key=lambda n: -counts[n])
        self.size = size
        self.count = sum(counts)
        self.alive = [sum(c > m for c in counts) for m in range(max(counts, default=0))]
        self._uniform = len(set(lengths)) == 1 and lengths[0] % size == 0
        self._sequences = len(lengths)
        self._order = torch.tensor(order, device=device)
        if self._uniform:
            return
        starts = [0]
        for n in lengths:
            starts.append(starts[-1] + n)
        total = starts[-1]
        index = torch.full((self.count, size), total)  # row `total` is the padding
        offset = 0
        for m, alive in enumerate(self.alive):
            for row, n in enumerate(order[:alive]):
                tokens = min(size, lengths[n] - m * size)
                first = starts[n] + m * size
                index[offset + row, :tokens] = torch.arange(first, first + tokens)
            offset += alive
        self._index = index.flatten().to(device)
        flat = self._index.cpu()
        inverse = torch.empty(total + 1, dtype=torch.long)
        inverse[flat] = torch.arange(len(flat))
        self._inverse = inverse[:total].to(device)

    def cut(self, x: Tensor, dtype: torch.dtype, *, fill: float = 0.0) -> Tensor:
        """[B, T, H, ...] -> [M, H, size, ...] in `dtype`, contiguous. Padding is `fill`."""
        _, _, heads, *rest = x.shape
        if self._uniform:
            x = x.reshape(self._sequences, -1, self.size, heads, *rest).transpose(0, 1)
        else:
            rows = x.reshape(-1, heads, *rest)
            x = torch.cat([rows, rows.new_full((1, heads, *rest), fill)])[self._index]
        return x.reshape(self.count, self.size, heads, *rest).transpose(1, 2).to(dtype).contiguous()

    def join(self, y: Tensor, like: Tensor) -> Tensor:
        """[M, H, size, ...] -> the shape and dtype of `like` [B, T, H, ...]; the inverse of `cut`."""
        y = y.transpose(1, 2).to(like.dtype)
        if self._uniform:
            y = y.reshape(-1, self._sequences, self.size, *y.shape[2:]).transpose(0, 1)
            return y.reshape(like.shape)
        return y.reshape(-1, *y.shape[2:])[self._inverse].reshape(like.shape)

    def sort(self, state: Tensor) -> Tensor:
        """[N, ...] in the caller's order -> sorted by decreasing length."""
        return state[self._order]

    def unsort(self, state: Tensor) -> Tensor:
        """The inverse of `sort`."""
        out = torch.empty_like(state)
        out[self._order] = state
        return out
