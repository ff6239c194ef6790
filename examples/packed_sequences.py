"""Calls the KDA operator on packed sequences of different lengths, and carries their states from call to call.

    python examples/packed_sequences.py

The example needs only torch and lkda. It takes about a second on a CPU.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from lkda.ops import kda_attention

H, K, V = 2, 32, 32  # heads, key channels and value channels per head


def main() -> float:
    """Computes three sequences in one call and in two calls. Returns the largest difference between the results."""
    torch.manual_seed(0)
    lengths = [5, 80, 43]
    total = sum(lengths)
    q, k = (F.normalize(torch.randn(1, total, H, K), dim=-1) for _ in range(2))  # unit norm per head
    v = torch.randn(1, total, H, V)
    g = -F.softplus(torch.randn(1, total, H, K))  # log decay per token and channel, <= 0
    beta = torch.sigmoid(torch.randn(1, total, H))  # write strength per token

    # The three sequences are packed into one row [1, total]. cu_seqlens holds their boundaries: 0, 5, 85, 128.
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    o, state = kda_attention(q, k, v, g, beta, cu_seqlens=cu_seqlens)
    print(f"o {list(o.shape)}, one state per sequence {list(state.shape)}")

    # The first call computes the first half of each sequence. The second call continues from the states of the first.
    difference = 0.0
    pieces: list[list[int]] = [[], []]
    for begin, end in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:]):
        middle = (begin + end) // 2
        pieces[0] += range(begin, middle)
        pieces[1] += range(middle, end)
    carried = None
    for piece, sizes in zip(pieces, ([n // 2 for n in lengths], [n - n // 2 for n in lengths])):
        at = torch.tensor(piece)
        boundaries = torch.tensor([0, *sizes]).cumsum(0)
        part, carried = kda_attention(
            *(x[:, at] for x in (q, k, v, g, beta)), cu_seqlens=boundaries, initial_state=carried
        )
        difference = max(difference, (part - o[:, at]).abs().max().item())
    assert carried is not None
    difference = max(difference, (carried - state).abs().max().item())
    print(f"largest difference between one call and two: {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()
