"""Where two measured curves cross."""

from __future__ import annotations

import math
from collections.abc import Sequence

Points = Sequence[tuple[float, float]]


def crossings(one: Points, other: Points) -> list[tuple[float, float, bool]]:
    """Where two curves cross: (x, y, whether `one` is above `other` beyond it), by ascending x.

    Between two values of x that both have, each curve is a straight line in the logarithms. Curves that only touch do
    not cross.

    Args:
        one, other: points (x, y), x and y above 0.
    """
    others = dict(other)
    shared = [(x, y, math.log(y / others[x])) for x, y in sorted(one) if x in others]
    apart = [(x, y, ratio) for x, y, ratio in shared if ratio]
    found = []
    for (x, y, before), (next_x, next_y, after) in zip(apart, apart[1:]):
        if (before < 0) != (after < 0):
            share = before / (before - after)
            found.append((x * (next_x / x) ** share, y * (next_y / y) ** share, after > 0))
    return found
