"""Context parallelism: several devices divide each row of a batch among themselves, and each has consecutive tokens.

A layer whose state is affine in the state that enters a part, S -> A S + Z, exchanges only A and Z of each part, which
do not grow with its length. Convolutions exchange their last inputs, and softmax attention its keys and values. All are
exact, forward and backward. The backward of an exchange is an exchange too, so every device must run the backward of
every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lkda.ops import softmax_attention

# The most entries of a mask of softmax attention; PyTorch converts them to floats.
_MASK_ENTRIES = 2**24


@dataclass(frozen=True)
class SequencePart:
    """The part of a batch's rows that this device has.

    The batch is [R, T], or packed as [1, R * T] with cu_seqlens, whose sequences then begin at the start of each row's
    part too. "First" and "last" are the sequences in which a row's part begins and ends.

    Args:
        group: the devices that divide the rows, in the order of the parts.
        number, count: the number of this part, from 0, and how many parts there are.
        before: [R] int64, tokens of the first sequence that are in earlier parts; 0 if it begins here.
        cu_seqlens: of this part; None for a batch [R, T].
        documents: for a packed batch, the number of the document of each token in the parts up to this one,
            [R, (number + 1) * T].
    """

    group: Any
    number: int
    count: int
    before: Tensor
    cu_seqlens: Tensor | None = None
    documents: Tensor | None = None

    @property
    def rows(self) -> int:
        return len(self.before)

    @property
    def sequences(self) -> int:
        """The number of states that an operator takes for this batch."""
        return self.rows if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    def _ends(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """The first and the last sequence of each row, and the tokens of the last one in this part, [R]."""
        rows = torch.arange(self.rows, device=self.before.device)
        if self.cu_seqlens is None:
            return rows, rows, torch.full_like(rows, length)
        bounds = self.cu_seqlens[:-1].long()
        # Empty sequences at the end begin where the row ends, and are none of these.
        first = torch.searchsorted(bounds, rows * length)
        last = torch.searchsorted(bounds, (rows + 1) * length) - 1
        return first, last, (rows + 1) * length - bounds[last]

    def by_row(self, x: Tensor) -> Tensor:
        """[B, T, ...] of the batch -> [R, T, ...]."""
        return x if self.cu_seqlens is None else x.reshape(self.rows, -1, *x.shape[2:])

    def convolution_states(self, x: Tensor, width: int) -> Tensor:
        """The inputs before each sequence, [sequences, width - 1, channels], for a convolution of x [B, T,
        channels]."""
        rows = self.by_row(x)
        length, kept = rows.shape[1], width - 1
        first, _, of_last = self._ends(length)
        places = torch.arange(kept, 0, -1, device=x.device)
        tail = rows[:, length - kept :] * (places <= of_last.unsqueeze(1)).unsqueeze(-1)
        arrived = _FromPrevious.apply(tail, self.group, self.number)
        return self._placed(arrived, first)

    def _placed(self, entering: Tensor, first: Tensor) -> Tensor:
        """Initial states of all sequences: `entering` [R, ...] for those that began in earlier parts, else zeros."""
        continues = (self.before > 0).view(-1, *[1] * (entering.dim() - 1))
        states = entering.new_zeros(self.sequences, *entering.shape[1:])
        return states.index_copy(0, first, torch.where(continues, entering, 0.0))

    def initial_states(self, entering: Tensor, *, length: int) -> Tensor:
        """The initial states of an operator: [sequences, ...] from `entering` [R, ...].

        Args:
            length: T, the tokens of a row in this part.
        """
        return self._placed(entering, self._ends(length)[0])

    def last_of(self, states: Tensor, *, length: int) -> Tensor:
        """The states [R, ...] after the last sequence of each row, of `states` [sequences, ...] after all."""
        return states[self._ends(length)[1]]

    def is_whole(self, *, length: int) -> Tensor:
        """[R] bool: whether one sequence fills the row's part."""
        first, last, _ = self._ends(length)
        return first == last

    def entering(self, A: Tensor, Z: Tensor, *, matrix: bool) -> Tensor:
        """The state that enters this part of each row, from the maps S -> A S + Z of all parts; zeros for part 0.

        Args:
            A: [R, ..., K, K] for a matrix product, or a factor for each entry of S, of Z's shape after broadcasting.
            Z: [R, ..., K, V].
            matrix: which of the two A is.
        """
        if not matrix:
            A = A.expand_as(Z)
        entered: Tensor = _Entering.apply(A, Z, matrix, self.group, self.number)
        return entered

    def with_earlier(self, x: Tensor) -> Tensor:
        """x [B, T, ...] of this part and all earlier ones, [R, (number + 1) * T, ...]."""
        joined: Tensor = _WithEarlier.apply(self.by_row(x), self.group, self.number)
        return joined

    def positions(self, positions: Tensor) -> Tensor:
        """The positions [T] or [R * T] in whole sequences of tokens, from those in the sequences of this part."""
        if self.cu_seqlens is None:
            return positions + self.number * len(positions)
        length = len(positions) // self.rows
        first, _, _ = self._ends(length)
        ends = self.cu_seqlens.long()[first + 1] - torch.arange(self.rows, device=first.device) * length
        inside = torch.arange(length, device=first.device) < ends.unsqueeze(1)
        return positions + (inside * self.before.unsqueeze(1)).flatten()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, backend: str) -> Tensor:
        """Causal softmax attention of this part's q [B, T, H, K] to k and v of this and all earlier parts."""
        k, v = self.with_earlier(k), self.with_earlier(v)
        if self.documents is None:
            return softmax_attention(q, k, v, backend=backend)
        queries = self.by_row(q).transpose(1, 2)
        keys, values = k.transpose(1, 2), v.transpose(1, 2)
        T, S = queries.shape[2], keys.shape[2]
        blocks, rows = [], max(1, _MASK_ENTRIES // (S * self.rows))
        places = torch.arange(S, device=q.device)
        for start in range(S - T, S, rows):
            mine = slice(start, min(start + rows, S))
            seen = places <= places[mine].unsqueeze(1)
            mask = seen & (self.documents[:, mine].unsqueeze(2) == self.documents.unsqueeze(1))
            block = queries[:, :, start - (S - T) : mine.stop - (S - T)]
            blocks.append(F.scaled_dot_product_attention(block, keys, values, attn_mask=mask.unsqueeze(1)))
        return torch.cat(blocks, 2).transpose(1, 2).reshape(*q.shape[:3], -1)


def _gathered(x: Tensor, group: Any) -> list[Tensor]:
    """x of every part, which all have its shape."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return parts


class _FromPrevious(torch.autograd.Function):
    """x of the previous part; zeros for part 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, number: int) -> Tensor:
        ctx.group, ctx.number = group, number
        parts = _gathered(x, group)
        return parts[number - 1] if number else torch.zeros_like(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        parts = _gathered(grad, ctx.group)
        later = ctx.number + 1
        return (parts[later] if later < len(parts) else torch.zeros_like(grad)), None, None


class _WithEarlier(torch.autograd.Function):
    """x [R, T, ...] of the parts 0, 1, ..., number, joined over T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, number: int) -> Tensor:
        ctx.group, ctx.number = group, number
        return torch.cat(_gathered(x, group)[: number + 1], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        count, T = dist.get_world_size(ctx.group), grad.shape[1] // (ctx.number + 1)
        # Summed in float32, so that the sum has one rounding.
        whole = grad.new_zeros(
            grad.shape[0], count * T, *grad.shape[2:], dtype=torch.promote_types(grad.dtype, torch.float32)
        )
        whole[:, : grad.shape[1]] = grad
        dist.all_reduce(whole, group=ctx.group)
        return whole[:, ctx.number * T : (ctx.number + 1) * T].to(grad.dtype), None, None


class _Entering(torch.autograd.Function):
    """S_0 = 0, S_{c+1} = A_c S_c + Z_c: the S of this part.

    With the gradient dS_c of each part's S, G_c = dS_c + A_c^T G_{c+1} is the whole gradient of S_c, and
    dZ_c = G_{c+1}, dA_c = G_{c+1} S_c^T.
    """

    @staticmethod
    def forward(ctx: Any, A: Tensor, Z: Tensor, matrix: bool, group: Any, number: int) -> Tensor:
        of_all = _gathered(torch.cat([A, Z], -1), group)
        maps = [both.split([A.shape[-1], Z.shape[-1]], -1) for both in of_all]
        S = torch.zeros_like(Z)
        for earlier in range(number):
            S = _times(maps[earlier][0], S, matrix=matrix) + maps[earlier][1]
        ctx.save_for_backward(S, *(A for A, _ in maps))
        ctx.matrix, ctx.group, ctx.number = matrix, group, number
        return S

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        S, *maps = ctx.saved_tensors
        grads = _gathered(grad, ctx.group)
        G = torch.zeros_like(grad)
        for later in range(len(grads) - 1, ctx.number, -1):
            transposed = maps[later].mT if ctx.matrix else maps[later]
            G = grads[later] + _times(transposed, G, matrix=ctx.matrix)
        dA = torch.matmul(G, S.mT) if ctx.matrix else G * S
        return dA, G, None, None, None


def _times(A: Tensor, S: Tensor, *, matrix: bool) -> Tensor:
    return torch.matmul(A, S) if matrix else A * S


def states_before(x: Tensor, weights: Sequence[Tensor], part: SequencePart) -> list[Tensor]:
    """The states before each sequence for convolutions with `weights` [C, 1, width] of x, whose channels lie side by
    side, in the dtype of the weights."""
    width = weights[0].shape[-1]
    return [
        y.to(w.dtype) for y, w in zip(part.convolution_states(x, width).split([len(w) for w in weights], -1), weights)
    ]
