"""Caches that grow by one entry per token, such as keys and values. They are preallocated, or grow by copying.

Such a cache is a tensor [B, ..., S, width], whose last dimension but one counts tokens. A length [B, 1] (int64, on the
device of the cache) beside it says how many of the S entries of each sequence are filled; the others are zeros. With a
length of [B, 0] the cache is not preallocated: all S entries are filled, and appending copies the cache.

The steps of a preallocated cache have static shapes, as a CUDA graph needs. In PyTorch they attend to all S entries and
mask those that are not filled; `cut` makes S smaller where the sequences are short.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lkda.checks import InputError
from lkda.ops import softmax_attention
from lkda.ops.precision import at_least_float32


def new_cache(
    batch_size: int, max_tokens: int | None, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """An empty cache [batch_size, *shape[:-1], max_tokens, shape[-1]]; without `max_tokens` S is 0."""
    *heads, width = shape
    return torch.zeros(batch_size, *heads, max_tokens or 0, width, device=device, dtype=dtype)


def new_length(batch_size: int, max_tokens: int | None, device: torch.device) -> Tensor:
    """The length of empty caches: zeros [batch_size, 1], or [batch_size, 0] without `max_tokens`."""
    return torch.zeros(batch_size, max_tokens is not None, dtype=torch.int64, device=device)


def is_preallocated(length: Tensor) -> bool:
    return length.shape[1] == 1


def cut(cache: Tensor, tokens: int) -> Tensor:
    """The first `tokens` entries of a preallocated cache, as a view."""
    return cache.narrow(-2, 0, min(tokens, cache.shape[-2]))


def append_one(caches: Sequence[Tensor], entries: Sequence[Tensor], length: Tensor) -> list[Tensor]:
    """Append one token to each sequence: entries [B, ..., 1, width]. Returns the caches.

    Preallocated caches and the length are changed in place. On a GPU, where the host does not know the length, the last
    entry of a full cache is overwritten.

    Raises: ValueError for a full cache on a CPU.
    """
    if not is_preallocated(length):
        return [torch.cat([past, new.to(past.dtype)], -2) for past, new in zip(caches, entries)]
    S = caches[0].shape[-2]
    if length.device.type == "cpu" and int(length.max()) >= S:
        raise full_cache_error(S, int(length.max()) + 1)
    place = length.clamp(max=S - 1)
    for cache, new in zip(caches, entries):
        at = place.view(-1, *[1] * (cache.dim() - 1)).expand_as(new)
        cache.scatter_(-2, at, new.to(cache.dtype))
    length.add_(1)
    return list(caches)


def filled(caches: Sequence[Tensor], length: Tensor) -> tuple[Sequence[Tensor], Tensor | None]:
    """The caches to attend to, and the mask [B, S] of the entries that are not filled; None where all of them are.

    A single sequence on a CPU, where the host may read the length, needs no mask.
    """
    if not is_preallocated(length):
        return caches, None
    if length.device.type == "cpu" and len(length) == 1:
        return [cut(cache, int(length)) for cache in caches], None
    return caches, torch.arange(caches[0].shape[-2], device=length.device) >= length


def append_many(
    caches: Sequence[Tensor], entries: Sequence[Tensor], length: Tensor
) -> tuple[list[Tensor], list[int] | None]:
    """Append T tokens to each sequence: entries [B, ..., T, width].

    Preallocated caches and the length are changed in place; the host waits for the device to read the length.

    Returns: the filled part of the caches, and the length of each sequence, which ends with the new entries; None where
        all sequences have one length, and end where the caches end.
    Raises: ValueError if the tokens do not fit.
    """
    if not is_preallocated(length):
        return [torch.cat([past, new.to(past.dtype)], -2) for past, new in zip(caches, entries)], None
    T, S, before = entries[0].shape[-2], caches[0].shape[-2], length.flatten().tolist()
    if max(before) + T > S:
        raise full_cache_error(S, max(before) + T)
    for row, start in enumerate(before):
        for cache, new in zip(caches, entries):
            cache[row].narrow(-2, start, T).copy_(new[row])
    filled = [cut(cache, max(before) + T) for cache in caches]
    length.add_(T)
    return filled, [start + T for start in before] if len(set(before)) > 1 else None


def attend_each(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], *, backend: str) -> Tensor:
    """Softmax attention of sequences of unequal lengths, one after another, so that it needs no mask [B, T, S].

    Args:
        q: [B, T, H, K], the last T tokens of each sequence.
        k, v: [B, S, H, K] and [B, S, H, V], of which each sequence has the first `lengths` entries.
        backend: of `softmax_attention`.
    """
    rows = [
        softmax_attention(q[row, None], k[row, None, :n], v[row, None, :n], backend=backend)
        for row, n in enumerate(lengths)
    ]
    return torch.cat(rows)


def fill_packed(caches: Sequence[Tensor], entries: Sequence[Tensor], length: Tensor, lengths: Sequence[int]) -> None:
    """Fill empty preallocated caches in place: entries [1, ..., T, width] of len(lengths) sequences in one row.

    Raises: ValueError if a sequence does not fit.
    """
    S = caches[0].shape[-2]
    if max(lengths) > S:
        raise full_cache_error(S, max(lengths))
    for cache, packed in zip(caches, entries):
        for row, new in enumerate(packed[0].split(list(lengths), -2)):
            cut(cache[row], new.shape[-2]).copy_(new)
    length.copy_(torch.tensor(lengths, device=length.device).unsqueeze(1))


def masked_softmax(scores: Tensor, empty: Tensor | None, *, scale: float) -> Tensor:
    """softmax(scale * scores) over S, of scores [B, H, S], in float32 at least, in their dtype.

    Args:
        empty: the mask [B, S] of the entries that get no weight; None: there are none.
    """
    return softmax_of_filled(at_least_float32(scores) * scale, empty).to(scores.dtype)


def softmax_of_filled(scores: Tensor, empty: Tensor | None) -> Tensor:
    """softmax over S of scores [B, H, S], which may be overwritten. Its sums are in float32 at least."""
    if empty is not None:
        scores = scores.masked_fill_(empty.unsqueeze(1), -torch.inf)
    return scores.softmax(-1)


def full_cache_error(size: int, tokens: int) -> InputError:
    """The error for a sequence of `tokens` tokens in a cache of `size`."""
    return InputError(
        f"the state holds {size} tokens per sequence, and a sequence would have {tokens}: give init_state a larger "
        "max_tokens."
    )
