"""A benchmark's rows -> one line for each shape and decay: all times of lkda, beside those of other libraries."""

from __future__ import annotations

from collections.abc import Sequence

from lkda.checks import InputError
from lkda.report.operators.benchmark import Benchmark, Row, implementation, measured

MODES = {"fwd": "forward", "fwd+bwd": "forward + backward"}
SHORT = {"cudnn kimi_delta_attention": "cuDNN", "softmax attention (SDPA)": "softmax"}
GATE_OF_PEERS = "fast"  # the gates of production models; cuDNN takes another, slower path at slow ones


def by_shape(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The headings and the cells as text, in milliseconds; the last column is the peak memory beyond the inputs.

    lkda's times are those of replayed CUDA graphs and of eager calls. The times of other libraries are those of
    replayed graphs, at fast gates only. A cell is empty where nothing was measured. Raises: ValueError where the
    benchmark is not of one backend of lkda.
    """
    backends = {row["backend"] for row in rows if not row.get("peer")}
    if len(backends) != 1:
        raise InputError(f"this table is of one backend of lkda, and the benchmark has {len(backends)}.")
    own = f"lkda {backends.pop()}"
    peers = dict.fromkeys(implementation(row) for row in rows if row.get("peer"))
    head, columns = ["B T H D", "gates"], []
    for name, replay, prefix in (
        *((own, replay, prefix) for replay, prefix in (("graph", ""), ("eager", "eager: "))),
        *((peer, "graph", f"{SHORT.get(peer, peer)}: ") for peer in peers),
    ):
        head += [prefix + words for words in MODES.values()]
        columns += [(name, replay, mode) for mode in MODES]
    timed = {
        (*_line(row), implementation(row), replay, mode): row
        for mode in MODES
        for replay in ("graph", "eager")
        for row in measured(rows, mode=mode, replay=replay)
        if not row.get("peer") or row.get("gate") in (GATE_OF_PEERS, None)
    }
    body = []
    for line in dict.fromkeys(map(_line, rows)):
        times = [timed.get((*line, *column)) for column in columns]
        peak = (timed.get((*line, own, "graph", "fwd+bwd")) or {}).get("peak_mib")
        cells = ["" if row is None else f"{row['ms_median']:.3f}" for row in times]
        body.append([*line, *cells, "" if peak is None else f"{peak:.0f}"])
    return [*head, "peak MiB"], body


def remark(benchmark: Benchmark) -> str:
    """What the numbers are, with the versions of the libraries."""
    versions = benchmark.header.get("versions") or {}
    cudnn = versions.get("nvidia-cudnn-frontend")
    library = f"cuDNN frontend {cudnn}; " if cudnn else ""
    return library + "ms, medians of one process; replayed graphs unless said; other libraries at fast gates only."


def _line(row: Row) -> tuple[str, str]:
    return " ".join(str(row[axis]) for axis in "BTHD"), row.get("gate") or ""
