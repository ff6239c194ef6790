"""The claims of the notes that the project began with, beside what notes.json measured, and why they differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lkda.checks import InputError
from lkda.report.draw.units import length, memory, three
from lkda.report.read.crossings import crossings
from lkda.report.read.files import read_results_file

Row = dict[str, Any]
Cells = tuple[list[str], list[list[str]]]
BASELINE, TUNED = "simplified, baseline", "simplified, tuned"
RECURRENT, CHUNKED = "KDA, recurrent", "KDA, chunked"
NAIVE, FUSED = "softmax, naive", "softmax, fused"
K = 1024
NOT_MEASURED = "not measured"
# A transformer's decoding is measured with this model; see `lkda.report.studies.decode`.
MODEL, BATCH = "small", 1


def part_of(rows: Sequence[Row], part: str) -> list[Row]:
    return [row for row in rows if row["part"] == part]


def exponent(line: Sequence[tuple[float, float | None]]) -> float | None:
    """The slope of the straight line through (log x, log y), by least squares; None with fewer than two points."""
    points = [(math.log(x), math.log(y)) for x, y in line if y]
    if len(points) < 2:
        return None
    x_mean, y_mean = (sum(values) / len(points) for values in zip(*points))
    covariance = sum((x - x_mean) * (y - y_mean) for x, y in points)
    return covariance / sum((x - x_mean) ** 2 for x, _ in points)


def decoding_beside(path: Path, found: dict[str, Any]) -> list[Row]:
    """The rows of decoding that were measured on the same device, from the directories beside that of `path`."""
    rows: list[Row] = []
    for file in sorted(path.absolute().parent.parent.glob("*/decode.json")):
        try:
            other = read_results_file(file, kind="decode")
        except InputError:  # another program's file
            continue
        if other["header"].get("device") == found["header"]["device"]:
            rows += other["rows"]
    return rows


class _Measured:
    """What the claims quote of the rows by length, as text."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = part_of(rows, "length")
        self.by_head = part_of(rows, "head size")

    def value(self, key: str, name: str, T: int) -> float | None:
        return next((row.get(key) for row in self.rows if row["name"] == name and row["T"] == T), None)

    def ms(self, name: str, T: int) -> str:
        found = self.value("ms_median", name, T)
        return NOT_MEASURED if found is None else f"{three(found)} ms"

    def ratio(self, slow: str, fast: str, T: int) -> str:
        return _ratio(self.value("ms_median", slow, T), self.value("ms_median", fast, T))

    def ratios(self, slow: str, fast: str, lengths: Sequence[int]) -> str:
        return ", ".join(f"{self.ratio(slow, fast, T)} at {length(T)}" for T in lengths)

    def bytes_of(self, key: str, name: str, T: int, unit: int = 1) -> str:
        found = self.value(key, name, T)
        return NOT_MEASURED if found is None else memory(unit * found)

    def resources(self, name: str) -> str:
        found = next((row for row in self.rows if row["name"] == name and row.get("registers") is not None), None)
        if found is None:
            return NOT_MEASURED
        return f"{found['registers']} registers, {found['shared_bytes'] / K:.3g} KiB"

    def wide_registers(self, name: str) -> str:
        """Of the largest heads."""
        found = max((row for row in self.by_head if row["name"] == name), key=lambda row: row["D"], default=None)
        return NOT_MEASURED if found is None else str(found["registers"])

    def batched_ratio(self, slow: str, fast: str) -> str:
        """In the larger batch of the rows by head size, at heads of 64."""
        rows = {row["name"]: row for row in self.by_head if row["D"] == 64}
        if slow not in rows or fast not in rows:
            return NOT_MEASURED
        found = _ratio(rows[slow]["ms_median"], rows[fast]["ms_median"])
        return f"{found} for {rows[slow]['B']} sequences of {length(rows[slow]['T'])}"

    def slope(self, name: str) -> str:
        found = exponent([(row["D"], row["ms_median"]) for row in self.by_head if row["name"] == name])
        return NOT_MEASURED if found is None else f"{found:.2f}"

    def crossing(self, slow: str, fast: str) -> str:
        """From which length `slow` is slower, interpolated."""
        lines = ([(row["T"], row["ms_median"]) for row in self.rows if row["name"] == name] for name in (slow, fast))
        found = [x for x, _, above in crossings(*lines) if above]
        return f"The times cross near {length(round(found[-1]))}" if found else "The times do not cross"


def _ratio(slow: float | None, fast: float | None) -> str:
    return three(slow / fast) if slow and fast else NOT_MEASURED


def claims(rows: Sequence[Row], decoding: Sequence[Row]) -> Cells:
    """A line for each claim: what it is about, what was claimed, what is measured, and why the two differ."""
    head = ["claim", "claimed", "measured here", "why they differ"]
    found = _Measured(rows)
    lines = [*_times(found), *_ratios(found), *_resources(found), *_costs(found), _throughput(decoding)]
    return head, [list(line) for line in lines]


Line = tuple[str, str, str, str]


def _times(x: _Measured) -> list[Line]:
    return [
        (
            "time of simplified attention at 8K tokens",
            "8.5 ms",
            f"tuned {x.ms(TUNED, 8 * K)}, baseline {x.ms(BASELINE, 8 * K)}",
            "It was another GPU, an RTX 5090, and the notes give neither batch nor heads. The tensors of 16 heads of "
            "64 have 67 MB at this length, and that GPU can move 15 GB in 8.5 ms. So either the batch was about 200 "
            "times as large as here, or the kernel was far from the lower bound.",
        ),
        (
            "time of KDA at 8K tokens",
            "276 ms",
            f"recurrent {x.ms(RECURRENT, 8 * K)}, chunked {x.ms(CHUNKED, 8 * K)}",
            "GPU and batch, as above. The recurrent kernel takes one token after another. The chunked kernels take 64 "
            f"at once on tensor cores, and are faster by a factor of {x.ratios(RECURRENT, CHUNKED, (8 * K, 128 * K))}.",
        ),
        (
            "time of naive attention",
            "52,184 ms (length not given)",
            f"{x.ms(NAIVE, 8 * K)} at 8K, {x.ms(NAIVE, 128 * K)} at 128K; fused {x.ms(FUSED, 128 * K)} at 128K",
            "GPU and batch, as above. The naive kernel takes one key at a time, without tensor cores. PyTorch's fused "
            f"kernel is faster by a factor of {x.ratio(NAIVE, FUSED, 128 * K)} at 128K.",
        ),
    ]


def _ratios(x: _Measured) -> list[Line]:
    return [
        (
            "KDA's time divided by simplified attention's, at 8K",
            "32",
            f"KDA chunked / simplified tuned = {x.ratio(CHUNKED, TUNED, 8 * K)}, KDA recurrent / simplified tuned = "
            f"{x.ratio(RECURRENT, TUNED, 8 * K)}, KDA recurrent / simplified baseline = "
            f"{x.ratio(RECURRENT, BASELINE, 8 * K)}",
            "The ratio depends on which kernels are compared. It is large for a recurrent kernel beside a tuned one, "
            "and small for two kernels of the same kind.",
        ),
        (
            "baseline divided by tuned, simplified attention",
            "2.65",
            f"{x.ratios(BASELINE, TUNED, (K, 8 * K, 128 * K))}; {x.batched_ratio(BASELINE, TUNED)}",
            "The baseline here is simpler than that of the notes, which had 24 KB of shared memory. It has a thread "
            "per channel and no parallelism over time, so 16 heads use 16 multiprocessors.",
        ),
        (
            "naive attention divided by simplified attention, at 128K",
            "22,120",
            f"softmax naive / simplified tuned = {x.ratio(NAIVE, TUNED, 128 * K)}, softmax fused / simplified tuned = "
            f"{x.ratio(FUSED, TUNED, 128 * K)}",
            "Most of the ratio is the naive kernel. The claims do not fit together: if the 52,184 ms are of 8K tokens, "
            "the ratio is 6,139 there and 16 times as much at 128K; if they are of 128K, simplified attention takes "
            "2.36 ms there, less than the 8.5 ms at 8K.",
        ),
    ]


def _resources(x: _Measured) -> list[Line]:
    return [
        (
            "resources of the simplified kernels",
            "28 to 32 registers; 24 KB of shared memory, tuned 96 KB",
            f"baseline {x.resources(BASELINE)}; tuned {x.resources(TUNED)}",
            "The tuned kernel here copies one chunk while it computes two others, and combines the states of all "
            "chunks in the same launch.",
        ),
        (
            "resources of the KDA kernel",
            "163 registers; 82 KB",
            f"recurrent {x.resources(RECURRENT)}; chunked {x.resources(CHUNKED)}",
            "The recurrent kernel has the state in registers; for heads of 128 it uses "
            f"{x.wide_registers(RECURRENT)}. The chunked kernels fill a multiprocessor with one or two blocks.",
        ),
    ]


def _costs(x: _Measured) -> list[Line]:
    states = (("simplified", TUNED), ("KDA", CHUNKED), ("keys and values of softmax", FUSED))
    return [
        (
            "KDA's cost by head size",
            "quadratic in D",
            f"exponents of D for 16 heads: recurrent {x.slope(RECURRENT)}, chunked {x.slope(CHUNKED)}, simplified "
            f"{x.slope(TUNED)}",
            "The state of a head has D x D entries, so the work on it is quadratic for a fixed number of heads, and "
            "linear in a model of fixed width, which has fewer heads as D grows. The times grow more slowly than the "
            "work up to D = 128: the recurrent kernel waits for one token after another, and the chunked kernels move "
            "bytes, which are linear in D.",
        ),
        (
            "short contexts",
            "a Transformer is competitive under 4K",
            f"softmax fused / KDA chunked: {x.ratios(FUSED, CHUNKED, (K, 4 * K, 8 * K))}",
            f"{x.crossing(FUSED, CHUNKED)} for one sequence of 16 heads. That is too little work to fill the device, "
            "and with larger batches and in whole models the two cross at other lengths.",
        ),
        (
            "memory of a sequence",
            "constant",
            "at 1K and 128K: "
            + "; ".join(
                f"{name} {x.bytes_of('state_bytes', each, K)} and {x.bytes_of('state_bytes', each, 128 * K)}"
                for name, each in states
            ),
            "It holds for the state that decoding keeps. To read a sequence at once, every mixer needs memory that is "
            f"linear in its length: a call of chunked KDA takes {x.bytes_of('peak_mib', CHUNKED, K, 2**20)} beside its "
            f"inputs at 1K and {x.bytes_of('peak_mib', CHUNKED, 128 * K, 2**20)} at 128K.",
        ),
    ]


def _throughput(rows: Sequence[Row]) -> Line:
    """tokens/s of decoding over softmax's, at the longest context that both have, for each mixer."""
    speeds = {
        (row["mixer"], row["context"]): row["tokens_per_s"]
        for row in rows
        if (row["implementation"], row["model"], row["batch"]) == ("lkda", MODEL, BATCH) and row.get("tokens_per_s")
    }
    found = []
    for mixer in dict.fromkeys(mixer for mixer, _ in speeds if mixer != "softmax"):
        common = [T for name, T in speeds if name == mixer and ("softmax", T) in speeds]
        if common:
            T = max(common)
            found.append(f"{mixer} {three(speeds[mixer, T] / speeds['softmax', T])} at {length(T)}")
    measured = f"model={MODEL}, batch {BATCH}, by context: {', '.join(found)}" if found else NOT_MEASURED
    return (
        "decoding throughput divided by that of a Transformer",
        "6",
        measured,
        "The factor grows with the context and with the batch. Kimi Linear's report (arXiv:2510.26692) gives up to 6 "
        "for a context of 1M tokens, for a model in which one layer of four is attention.",
    )
