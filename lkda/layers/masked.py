"""Layers that take a padding mask: they compute a padded batch as packed sequences, with shapes that are fixed."""

from __future__ import annotations

import torch
from torch import Tensor

from lkda.checks import InputError
from lkda.models.linear import is_plain
from lkda.models.mixer import State
from lkda.models.mixers import kda, simplified
from lkda.models.recurrent_mixer import RecurrentMixer

# The parts of a padded row: padding on the left, tokens, padding on the right. Any of them may be empty.
_PARTS, _TOKENS = 3, 1


class Masked(RecurrentMixer):
    """A mixer whose `forward` takes a padding mask."""

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        state: State | None = None,
    ) -> tuple[Tensor, State]:
        """Mix whole sequences, or continue them.

        A masked row gives the result that its tokens alone would give. torch.compile(fullgraph=True) takes the layer
        with or without a mask. Only the forms in PyTorch read the lengths of masked or packed sequences, and so cannot
        be traced whole with them. `SimplifiedAttention` has no other form on a CPU.

        Args:
            x: [B, T, d_model].
            attention_mask: [B, T], True or 1 for tokens and False or 0 for padding, which may be on the left, on the
                right or on both sides, but not between tokens. A row may be all padding. None for no padding.
            cu_seqlens: int [N + 1], the boundaries of N sequences packed in one row (B = 1); not with a mask or state.
            state: what an earlier call returned for the same B sequences, or `init_state(B)`; None for new ones.
        Returns: y of x's shape, zero at padding, and the state after the last token of each row, for `state` or `step`.
            With cu_seqlens the state is empty.
        Raises: ValueError if a shape or dtype does not fit; on a CPU also if padding is between tokens.
        """
        name = type(self).__name__
        self._check(name, x, ("B", "T"), state)
        if attention_mask is None:
            return super().forward(x, cu_seqlens=cu_seqlens, state=state)
        if cu_seqlens is not None:
            raise InputError(f"{name}: attention_mask and cu_seqlens cannot be given together.")
        mask = _checked(name, attention_mask, x)
        bounds = bounds_of_parts(mask)
        before = None if state is None else tuple(_among_parts(part) for part in state)
        y, own, after = self._mixed(x.reshape(1, -1, x.shape[-1]), bounds, before)
        y = torch.where(mask.unsqueeze(-1), y.view(x.shape), 0)
        # `step` writes in place, so the parts must be contiguous.
        caches = (part[_TOKENS::_PARTS].contiguous() for part in after)
        return y, (*caches, *self.keep(own[_TOKENS::_PARTS].contiguous()))

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One more token of each sequence, without gradients.

        Args:
            x: [B, d_model].
            state: what `forward`, `step` or `init_state(B)` returned; updated in place.
        Returns: y [B, d_model] and the state after the token.
        Raises: ValueError if a shape or dtype does not fit.
        """
        self._check(type(self).__name__, x, ("B",), state)
        return super().step(x, state)

    def _check(self, name: str, x: Tensor, axes: tuple[str, ...], state: State | None) -> None:
        """Raises InputError unless x is [*axes, d_model] like the weights, and the state one of as many sequences."""
        width, shape = self.num_heads * self.head_dim, list(x.shape) if isinstance(x, Tensor) else []
        if len(shape) != len(axes) + 1 or shape[-1] != width or 0 in shape:
            raise InputError(
                f"{name}: x must be a tensor [{', '.join(axes)}, {width}] with no axis of length 0, got "
                f"{shape or type(x).__name__}."
            )
        weight = self.q_proj.weight
        same = x.dtype == weight.dtype and x.device == weight.device
        if not same and is_plain(self.q_proj) and not torch.is_autocast_enabled(x.device.type):
            raise InputError(
                f"{name}: x must be like the weights, of {weight.dtype} on {weight.device}, got {x.dtype} on "
                f"{x.device}; only under torch.autocast may the dtypes differ."
            )
        if state is None:
            return
        wanted = [list(part.shape) for part in self.init_state(shape[0], device=torch.device("meta"))]
        found = [list(part.shape) for part in state] if isinstance(state, tuple) else type(state).__name__
        if found != wanted:
            raise InputError(
                f"{name}: state must be what an earlier call for {shape[0]} sequences returned, a tuple with shapes "
                f"{wanted}, got {found}."
            )


def _checked(name: str, attention_mask: Tensor, x: Tensor) -> Tensor:
    """The mask as booleans."""
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != x.shape[:2]:
        found = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise InputError(f"{name}: attention_mask must be a tensor [B, T] = {list(x.shape[:2])}, got {found}.")
    if attention_mask.dtype.is_floating_point or attention_mask.device != x.device:
        raise InputError(
            f"{name}: attention_mask must be of booleans, or 0 and 1, on {x.device}, got {attention_mask.dtype} on "
            f"{attention_mask.device}."
        )
    mask = attention_mask.bool()
    if mask.device.type == "cpu" and not torch.compiler.is_compiling() and not _one_run(mask):
        raise InputError(f"{name}: attention_mask has padding between the tokens of a row; only the sides may have it.")
    return mask


def _one_run(mask: Tensor) -> bool:
    """Whether the tokens of each row follow one another."""
    begins = mask & ~torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    return bool((begins.sum(1) <= 1).all())


def bounds_of_parts(mask: Tensor) -> Tensor:
    """The boundaries of the three parts of each row of a mask [B, T] in the row [1, B * T]: int32 [3 B + 1].

    Their number does not depend on the mask, and no value is read from a GPU.
    """
    B, T = mask.shape
    row = torch.arange(B, device=mask.device) * T
    first = row + mask.int().argmax(1)
    starts = torch.stack([row, first, first + mask.sum(1)], 1).flatten()
    return torch.cat([starts, starts.new_full((1,), B * T)]).int()


def _among_parts(part: Tensor) -> Tensor:
    """A part of a state [B, ...] as that of the three parts of each row [3 B, ...], where padding begins with zeros."""
    nothing = torch.zeros_like(part)
    return torch.stack([nothing, part, nothing], 1).flatten(0, 1)


class KimiDeltaAttention(Masked, kda.KimiDeltaAttention):
    """Kimi Delta Attention (arXiv:2510.26692, section 3), with projections, short convolutions, gates and head norm.

        layer = KimiDeltaAttention(512, 8)
        y, state = layer(x, mask)                # x [B, T, 512], mask [B, T] or None
        y, state = layer.step(x, state)          # one more token, x [B, 512]

    Args: see `lkda.models.mixers.kda.KimiDeltaAttention`.
    """


class SimplifiedAttention(Masked, simplified.SimplifiedAttention):
    """Simplified linear attention: per channel a decayed average of v, weighted by sigmoid(k) and gated by q.

        layer = SimplifiedAttention(512, 8)
        y, state = layer(x, mask)                # x [B, T, 512], mask [B, T] or None
        y, state = layer.step(x, state)          # one more token, x [B, 512]

    Args: see `lkda.models.mixers.simplified.SimplifiedAttention`.
    """
