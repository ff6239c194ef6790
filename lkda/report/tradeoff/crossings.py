"""For each pair of mixers the context at which one overtakes the other: kernel, training step, prefill and decode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from lkda.report.draw.units import length
from lkda.report.read.crossings import crossings
from lkda.report.tradeoff.host_bound import comparable
from lkda.report.tradeoff.measurements import STAGES, Measurement, series


@dataclass(frozen=True)
class Pair:
    """Two mixers at one stage and setting.

    Attributes:
        slower, faster: the series; `faster` is the faster one at the longest context that both have.
        mixers: of `faster` and `slower`.
        own: whether both are lkda's implementations.
        context: where `faster` overtakes, interpolated; None where it is the faster one at all shared contexts.
        shortest, longest: the contexts that both have.
        ratio: tokens/s of `faster` over those of `slower` at the longest.
    """

    stage: str
    where: str
    faster: str
    slower: str
    context: float | None
    shortest: int
    longest: int
    ratio: float
    mixers: tuple[str, str]
    own: bool
    further: tuple[float, ...] = ()  # contexts of earlier crossings, of curves that cross several times

    @property
    def text(self) -> str:
        """The finding in a sentence."""
        if self.shortest == self.longest:
            return f"{self.faster} is faster at {length(self.longest)}, the only context that both have"
        if self.context is None:
            return f"{self.faster} is faster from {length(self.shortest)} to {length(self.longest)}"
        before = f" (they also cross at {', '.join(rounded(x) for x in self.further)})" if self.further else ""
        return f"{self.faster} is faster from a context of about {rounded(self.context)}{before}"


def rounded(context: float) -> str:
    """A context that was interpolated: 736.2 -> 740, 1529.3 -> 1.5K"""
    if context < 1000:
        return f"{float(f'{context:.2g}'):g}"
    return f"{context / 1024:.2g}K" if context < 102_400 else length(context)


def pairs(found: Sequence[Measurement]) -> list[Pair]:
    """Each pair of series of different mixers that have a context in common, by stage, those that cross first."""
    curves = {
        name: points for name, points in series(comparable(found), value="tokens_per_s").items() if name[0] in STAGES
    }
    own = {(one.stage, one.where, one.series) for one in found if one.own}
    result = []
    for (name, points), (other_name, other_points) in combinations(curves.items(), 2):
        if name[:2] != other_name[:2] or name[2] == other_name[2]:
            continue
        speeds, other_speeds = dict(points), dict(other_points)
        shared = sorted(speeds.keys() & other_speeds.keys())
        if not shared:
            continue
        longest = shared[-1]
        last = next((x for x in reversed(shared) if speeds[x] != other_speeds[x]), longest)  # where they do not tie
        faster, slower = (name, other_name) if speeds[last] >= other_speeds[last] else (other_name, name)
        at = [x for x, _, _ in crossings(points, other_points)]
        ratio = speeds[longest] / other_speeds[longest]
        result.append(
            Pair(
                stage=name[0],
                where=name[1],
                faster=faster[3],
                slower=slower[3],
                context=at[-1] if at else None,
                shortest=int(shared[0]),
                longest=int(longest),
                ratio=max(ratio, 1 / ratio),
                mixers=(faster[2], slower[2]),
                own=all((one[0], one[1], one[3]) in own for one in (faster, slower)),
                further=tuple(at[:-1]),
            )
        )
    return sorted(
        result, key=lambda pair: (STAGES.index(pair.stage), pair.context is None, pair.shortest == pair.longest)
    )
