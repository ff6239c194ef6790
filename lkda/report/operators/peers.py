"""A benchmark's rows -> one line for each shape, with the times of all implementations side by side."""

from __future__ import annotations

from collections.abc import Sequence

from lkda.report.operators.benchmark import Row, implementation, measured, shape

MODES = ("fwd", "fwd+bwd")


def side_by_side(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The headings and the cells as text: milliseconds of the device, forward / forward and backward.

    The times are those of replayed CUDA graphs, which leave the host out. A cell is empty where nothing was measured.
    """
    times = {
        (shape(row), row.get("gate") or "", implementation(row), mode): f"{row['ms_median']:.3f}"
        for mode in MODES
        for row in measured(rows, mode=mode, replay="graph")
    }
    names = list(dict.fromkeys(implementation(row) for row in rows))
    lines = list(dict.fromkeys((shape(row), row.get("gate") or "") for row in rows))
    body = [
        [*line, *(" / ".join(filter(None, (times.get((*line, name, mode)) for mode in MODES))) for name in names)]
        for line in lines
    ]
    return ["B x T x H x D", "gate", *names], body
