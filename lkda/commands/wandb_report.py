"""Sends a comparison to Weights & Biases: its tables, its charts, and its page, as a run of the job type "report"."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lkda.report.draw.chart import Chart
from lkda.report.draw.page import Section
from lkda.report.training.comparison import Comparison
from lkda.training.wandb_connection import begin_online_or_offline, run_identity

if TYPE_CHECKING:
    import wandb

JOB_TYPE = GROUP = "report"


def send_report(comparison: Comparison, out: Path, *, project: str) -> str | None:
    """Log a comparison to the project, online if possible, else offline below `out`. A second call updates the run.

    Args:
        out: the directory of the comparison, with its report.html.
    Returns: the reason why it is offline; None if it was sent.
    """
    import wandb

    names = [run.name for run in comparison.runs]
    config = {"title": comparison.title, "runs": names, "benchmarks": [result.name for result in comparison.results]}

    def begin(settings: dict[str, Any]) -> wandb.Run:
        return wandb.init(
            project=project,
            name=comparison.title,
            group=GROUP,
            job_type=JOB_TYPE,
            id=run_identity(out),
            dir=out,
            config=config,
            **settings,
        )

    begun, reason = begin_online_or_offline(begin)
    with begun as run:
        found: dict[str, Any] = {"report": wandb.Html(str(out / "report.html"), inject=False)}
        found |= {f"tables/{name}": _table(section) for name, section in comparison.tables().items()}
        for chart in comparison.tradeoff.charts():
            found |= dict(_panels(chart))
        run.log(found)
        run.summary["answer"] = comparison.tradeoff.summary
    return reason


def _table(section: Section) -> wandb.Table:
    """The table with numbers as numbers; an empty cell where one is missing."""
    import wandb

    orders = section.sort_by or [[None] * len(section.head) for _ in section.body]
    rows = [
        [_value(cell, order) for cell, order in zip(cells, by, strict=True)]
        for cells, by in zip(section.body, orders, strict=True)
    ]
    return wandb.Table(columns=list(section.head), data=rows, allow_mixed_types=True)


def _value(cell: str, order: float | str | None) -> float | str | None:
    if order is None or isinstance(order, str):
        return cell
    return None if order == -1 else order


def _panels(chart: Chart) -> Iterator[tuple[str, Any]]:
    """A Vega chart of W&B's own for each setting of the chart's menu, by its key.

    W&B has no logarithmic axes without a definition on its server. The page, which is logged too, has them.
    """
    import wandb

    layer = chart.spec["layer"][0]
    encoding = layer["encoding"]
    titles = {entry["field"]: entry["title"] for entry in encoding["tooltip"] if entry["title"]}
    records = chart.spec["data"]["values"]
    settings = dict.fromkeys(record.get("setting", "") for record in records)
    keys: list[str] = []
    for setting in settings:
        shown = [record for record in records if record.get("setting", "") == setting]
        rows = [[record.get(field) for field in titles] for record in shown]
        table = wandb.Table(columns=list(titles.values()), data=rows, allow_mixed_types=True)
        x, y = (titles[encoding[axis]["field"]] for axis in "xy")
        title = chart.title if len(settings) == 1 else f"{chart.title}: {setting}"
        key = f"{chart.name}/{re.sub(r'[^A-Za-z0-9]+', '_', setting).strip('_') or 'all'}"
        key += f"_{len(keys)}" if key in keys else ""  # of other letters, such as those of another alphabet
        keys.append(key)
        if layer["mark"]["type"] == "line":
            yield key, wandb.plot.line(table, x, y, stroke=titles[encoding["detail"]["field"]], title=title)
        else:
            yield key, wandb.plot.scatter(table, x, y, title=title)


def offline_runs(directories: Sequence[Path]) -> dict[Path, list[Path]]:
    """The directories of runs that were logged offline and not sent since, each with W&B's directories in it."""
    found = {
        directory: [path for path in sorted(directory.glob("wandb/offline-run-*")) if not any(path.glob("*.synced"))]
        for directory in directories
    }
    return {directory: paths for directory, paths in found.items() if paths}


def sync_command(found: Mapping[Path, Sequence[Path]], *, project: str) -> str:
    """The command that sends these runs to the project."""
    paths = " ".join(shlex.quote(str(path)) for paths in found.values() for path in paths)
    return f"wandb sync --project {shlex.quote(project)} {paths}"
