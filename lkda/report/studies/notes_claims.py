"""The claims of the notes that the project began with, beside what notes.json measured, and why they differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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


def part_of(rows: Sequence[Row], part: str) -> list[Row]:
    return [row for row in rows if row["part"] == part]


def milliseconds(rows: Sequence[Row], name: str, **sizes: int) -> float | None:
    """The time of an implementation at these sizes, or None if it was not measured."""
    fits = (row for row in rows if row["name"] == name and all(row[axis] == size for axis, size in sizes.items()))
    return next((float(row["ms_median"]) for row in fits), None)


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


def claims(rows: Sequence[Row], decoding: Sequence[Row]) -> Cells:
    """A line for each claim: what it is about, what was claimed, what is measured, and why the two differ."""
    by_length, by_head = part_of(rows, "length"), part_of(rows, "head size")

    def ms(name: str, T: int) -> str:
        found = milliseconds(by_length, name, T=T)
        return NOT_MEASURED if found is None else f"{three(found)} ms"

    def ratio(slow: str, fast: str, T: int) -> str:
        found = milliseconds(by_length, slow, T=T), milliseconds(by_length, fast, T=T)
        return NOT_MEASURED if None in found else three(found[0] / found[1])  # type: ignore[operator]

    def of(value: Callable[[Row], float], name: str, T: int) -> float | None:
        return next((value(row) for row in by_length if row["name"] == name and row["T"] == T), None)

    def state(name: str, T: int) -> str:
        found = of(lambda row: row["state_bytes"], name, T)
        return NOT_MEASURED if found is None else memory(found)

    def registers(name: str) -> str:
        found = [row for row in by_length if row["name"] == name and row.get("registers") is not None]
        if not found:
            return NOT_MEASURED
        return f"{found[0]['registers']} registers and {found[0]['shared_bytes'] / K:.1f} KiB of shared memory"

    lines = [
        (
            "simplified attention at 8K tokens",
            "8.5 ms",
            f"{ms(TUNED, 8 * K)} (baseline: {ms(BASELINE, 8 * K)})",
            "Another GPU (RTX 5090), and the notes do not give the batch and the heads. The tensors of 16 heads of 64 have "
            "67 MB here, and an RTX 5090 can move 15 GB in 8.5 ms. So the notes had a batch of about 200, or a kernel "
            "far from the bound of memory.",
        ),
        (
            "KDA at 8K tokens",
            "276 ms",
            f"recurrent {ms(RECURRENT, 8 * K)}, chunked {ms(CHUNKED, 8 * K)}",
            "The recurrent kernel takes one token after another, and the chunked kernels take 64 at a time with tensor "
            f"cores: {ratio(RECURRENT, CHUNKED, 8 * K)} times as fast at 8K and "
            f"{ratio(RECURRENT, CHUNKED, 128 * K)} times at 128K.",
        ),
        (
            "KDA's time over simplified attention's at 8K",
            "32",
            f"chunked over tuned {ratio(CHUNKED, TUNED, 8 * K)}, recurrent over tuned {ratio(RECURRENT, TUNED, 8 * K)}, "
            f"recurrent over baseline {ratio(RECURRENT, BASELINE, 8 * K)}",
            "The ratio is one of implementations. A tuned kernel beside a recurrent one gives a large ratio; two kernels "
            "of the same kind give a small one.",
        ),
        (
            "the tuned simplified kernel over its baseline",
            "2.65 times faster",
            "; ".join(f"{ratio(BASELINE, TUNED, T)} at {length(T)}" for T in (K, 8 * K, 128 * K))
            + _at_batch(by_head, BASELINE, TUNED),
            "The baseline here has one thread per channel and no parallelism over time, so with 16 heads it uses 16 "
            "multiprocessors. The baseline of the notes had 24 KB of shared memory, so it was another kernel.",
        ),
        (
            "registers and shared memory of the simplified kernels",
            "28 to 32 registers; 24 KB, tuned 96 KB",
            f"baseline {registers(BASELINE)}; tuned {registers(TUNED)}",
            "The tuned kernel keeps two chunks in flight and combines the states of all chunks in one launch, which takes "
            "more of both.",
        ),
        (
            "registers and shared memory of KDA",
            "163 registers, 82 KB",
            f"recurrent {registers(RECURRENT)}; chunked {registers(CHUNKED)}",
            "The recurrent kernel here has the state in registers. The chunked kernels fill the multiprocessor with one or "
            "two blocks.",
        ),
        (
            "naive attention",
            "52,184 ms (length not given)",
            f"{ms(NAIVE, 8 * K)} at 8K, {ms(NAIVE, 128 * K)} at 128K; fused {ms(FUSED, 128 * K)} at 128K",
            "Without tensor cores and with one key at a time, the naive kernel takes "
            f"{ratio(NAIVE, FUSED, 128 * K)} times as long as PyTorch's fused one at 128K.",
        ),
        (
            "simplified attention over naive attention at 128K",
            "22,120 times faster",
            f"naive over tuned {ratio(NAIVE, TUNED, 128 * K)}; fused over tuned {ratio(FUSED, TUNED, 128 * K)}",
            "The ratio grows with the length, and most of it is the naive kernel. With 52,184 ms it would give 2.36 ms for "
            "simplified attention at 128K, less than the 8.5 ms that are claimed at 8K: the figures are of different "
            "batches or lengths.",
        ),
        (
            "KDA's cost and the size of a head",
            "quadratic in D",
            "; ".join(f"{name} D^{_slope(by_head, name)}" for name in (RECURRENT, CHUNKED, TUNED))
            + " (time, 16 heads, D from 32 to 128)",
            "The state of a head has D x D entries, so its work is quadratic in D for a fixed number of heads. In a model of "
            "a fixed width the number of heads falls as D grows, and the work is linear in D. The bytes, and the products "
            "inside a chunk, are linear in D, so the chunked kernels grow less than quadratically.",
        ),
        (
            "short contexts",
            "a Transformer is competitive under 4K",
            "fused softmax over KDA chunked: "
            + ", ".join(f"{ratio(FUSED, CHUNKED, T)} at {length(T)}" for T in (K, 4 * K, 8 * K))
            + f". {_crossing(by_length)}",
            "One sequence of 16 heads is too little work for a GPU at these lengths, and it is the launches that count. "
            "With larger batches and in whole models the two cross at other lengths; the pages on speed have them.",
        ),
        (
            "memory of a sequence",
            "constant",
            "state at 1K and 128K: "
            + "; ".join(f"{name} {state(each, K)} and {state(each, 128 * K)}" for name, each in _STATES),
            "It holds for the state that decoding keeps. Reading or training on a sequence takes memory that is linear in "
            f"its length in every mixer: a call of the chunked kernels takes {_peak(of, K)} beyond its inputs at 1K and "
            f"{_peak(of, 128 * K)} at 128K.",
        ),
        (
            "throughput of decoding",
            "6 times that of a Transformer",
            _decoding(decoding),
            "The factor grows with the context and with the batch. The report on Kimi Linear gives 6 times at a context of "
            "1M tokens, for a model of 48B parameters of which one layer in four is attention.",
        ),
    ]
    return ["claim", "claimed", "measured here", "why they differ"], [list(line) for line in lines]


_STATES = (("simplified", TUNED), ("KDA", CHUNKED), ("softmax (keys and values)", FUSED))


def _at_batch(by_head: Sequence[Row], slow: str, fast: str) -> str:
    """The ratio in the larger batch, at the head size of the table."""
    rows = [row for row in by_head if row["D"] == 64]
    found = milliseconds(rows, slow), milliseconds(rows, fast)
    if None in found:
        return ""
    return f"; with a batch of {rows[0]['B']}, {three(found[0] / found[1])} at {length(rows[0]['T'])}"  # type: ignore[operator]


def _slope(by_head: Sequence[Row], name: str) -> str:
    found = exponent([(row["D"], row["ms_median"]) for row in by_head if row["name"] == name])
    return f"? ({NOT_MEASURED})" if found is None else f"{found:.2f}"


def _crossing(by_length: Sequence[Row]) -> str:
    """Where softmax attention becomes slower than KDA, interpolated."""
    lines = ([(row["T"], row["ms_median"]) for row in by_length if row["name"] == name] for name in (FUSED, CHUNKED))
    found = [x for x, _, above in crossings(*lines) if above]
    return f"They cross near {length(round(found[-1]))}." if found else "They do not cross at these lengths."


def _peak(of: Callable[[Callable[[Row], float], str, int], float | None], T: int) -> str:
    found = of(lambda row: row["peak_mib"], CHUNKED, T)
    return NOT_MEASURED if found is None else memory(found * 2**20)


def _decoding(rows: Sequence[Row]) -> str:
    """tokens/s over softmax's at the longest context that both have, batch 1, for each mixer of the first model."""
    speeds = {
        (row["mixer"], row["context"]): row["tokens_per_s"]
        for row in rows
        if row["implementation"] == "lkda" and row["batch"] == 1 and row.get("tokens_per_s") and row["model"] == "small"
    }
    found = []
    for mixer in dict.fromkeys(mixer for mixer, _ in speeds if mixer != "softmax"):
        common = [T for name, T in speeds if name == mixer and ("softmax", T) in speeds]
        if common:
            T = max(common)
            found.append(f"{mixer} {three(speeds[mixer, T] / speeds['softmax', T])} at {length(T)}")
    measured = "; ".join(found)
    return (
        f"model=small, batch 1: {measured}"
        if found
        else f"{NOT_MEASURED}; scripts/benchmark.py task=decode measures it"
    )
