"""Draws foreign_models.json of `lkda.bench.foreign_models`: table.json, and the losses where there are several seeds.

The JSON is {"kind": "foreign_models", "header": {device, torch, versions, date}, "rows": [...]}. A row holds the
implementation, the seed, the sizes and what was measured; or the reason why nothing was.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lkda.checks import InputError
from lkda.io import write_together
from lkda.report.draw.style import Picture, Style, picture
from lkda.report.draw.units import memory
from lkda.report.read.files import read_results_file

KIND = "foreign_models"
LAST = 50  # the loss at the end is the mean over this many steps
# The model and the kernels of each implementation, and whether it is lkda with all its parts.
NAMES = {
    "kimi_torch": ("Kimi Linear of transformers", "its own, PyTorch", False),
    "kimi_fla": ("Kimi Linear of transformers", "FLA's", False),
    "kimi_lkda": ("Kimi Linear of transformers", "lkda's", True),
    "fla": ("KDA of FLA", "its own", False),
    "fla_core": ("KDA of FLA", "lkda's chunk_kda alone", False),
    "fla_lkda": ("KDA of FLA", "lkda's", True),
}
# The kernels of each implementation in a legend.
LEGEND = {
    **{"kimi_torch": "PyTorch", "kimi_fla": "FLA's kernels", "kimi_lkda": "lkda's kernels"},
    **{"fla": "FLA's kernels", "fla_core": "lkda's chunk_kda, else FLA's kernels", "fla_lkda": "lkda's kernels"},
}
Row = dict[str, Any]
Case = tuple[str, bool]
SIZES = ("layers", "width", "head_dim", "vocab_size", "rows", "context", "steps")


def grouped(rows: Sequence[Row]) -> dict[Case, list[Row]]:
    """The rows of each implementation, with and without checkpointing, in the order of NAMES.

    Raises: ValueError where they differ in their sizes.
    """
    if len({tuple(row[name] for name in SIZES) for row in rows}) != 1:
        raise ValueError("the rows are of several sizes; measure each into a directory of its own")
    found: dict[Case, list[Row]] = {(name, checkpointing): [] for name in NAMES for checkpointing in (False, True)}
    for row in rows:
        found[row["implementation"], row["checkpointing"]].append(row)
    return {case: same for case, same in found.items() if same}


def last_loss(row: Row) -> float:
    """The mean training loss of the last steps, in nats per token."""
    return statistics.fmean(row["losses"][-LAST:])


def difference_and_spread(rows: Sequence[Row], others: Sequence[Row]) -> tuple[float, float]:
    """Of the losses at the end: the mean of `rows` minus that of `others` over the seeds that both have, and the
    largest difference between two seeds of `others`."""
    ours, theirs = ({row["seed"]: last_loss(row) for row in each} for each in (rows, others))
    shared = sorted(ours.keys() & theirs.keys())
    difference = statistics.fmean(ours[seed] - theirs[seed] for seed in shared)
    return difference, max(theirs.values()) - min(theirs.values())


def redraw(path: Path) -> None:
    """Writes table.json beside a file of `lkda.bench.foreign_models`, and losses.png for several seeds.

    Raises: ValueError where it is not such a file.
    """
    found = read_results_file(path, kind=KIND)
    try:
        groups = grouped(found["rows"])
        table = {"kind": "table", "rows": _table(groups), "note": _note(found["header"], found["rows"][0])}
        files: dict[Path, str | bytes] = {path.parent / "table.json": json.dumps(table, indent=1) + "\n"}
        if any(len(rows) > 1 and not checkpointing for (_, checkpointing), rows in groups.items()):
            files[path.parent / "losses.png"] = _picture(groups).light
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, ZeroDivisionError) as error:
        raise InputError(f"{path} is not of lkda.bench.foreign_models ({error}).") from error
    write_together(files)


def _table(groups: dict[Case, list[Row]]) -> list[dict[str, str]]:
    """A row for each implementation, with medians over its seeds; the reason where nothing was measured."""
    several = max(map(len, groups.values())) > 1
    columns: list[tuple[str, Callable[[list[Row], list[Row]], str]]] = [
        ("training tokens/s", lambda rows, _: f"{_median(rows, 'tokens_per_s'):,.0f}"),
        ("lkda / this", lambda rows, lkda: _ratio(rows, lkda, "tokens_per_s")),
        ("prefill tokens/s", lambda rows, _: f"{_median(rows, 'prefill_tokens_per_s'):,.0f}"),
        ("lkda / this in prefill", lambda rows, lkda: _ratio(rows, lkda, "prefill_tokens_per_s")),
        ("first step, s", lambda rows, _: f"{max(row['first_step_s'] for row in rows):.1f}"),
        ("peak memory", lambda rows, _: memory(_median(rows, "peak_bytes")) if "peak_bytes" in rows[0] else ""),
    ]
    losses = f"loss of the last {LAST} steps, by seed"
    if several:
        columns = [
            (losses, lambda rows, _: ", ".join(f"{last_loss(row):.4f}" for row in rows)),
            ("lkda's minus this", _loss_difference),
        ]
    made = []
    for (name, checkpointing), rows in groups.items():
        model, kernels, _ = NAMES[name]
        done, lkda = _done(rows), _done(groups.get((_of_lkda(model), checkpointing), []))
        cells = {heading: cell(done, lkda) if done else "" for heading, cell in columns}
        again = ", layers computed again" if checkpointing else ""
        made.append({"model": model, "kernels": kernels + again, **cells, **_remark(rows, groups)})
    return made


def _done(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if "reason" not in row]


def _of_lkda(model: str) -> str:
    """The implementation of a model with all of lkda's kernels."""
    return next(name for name, (owner, _, ours) in NAMES.items() if owner == model and ours)


def _remark(rows: list[Row], groups: dict[Case, list[Row]]) -> dict[str, str]:
    """The reason of a row without a result, in a column that stands only where there is one."""
    if not any("reason" in row for same in groups.values() for row in same):
        return {}
    return {"remark": next((row["reason"][:100] for row in rows if "reason" in row), "")}


def _median(rows: Sequence[Row], column: str) -> float:
    return statistics.median(row[column] for row in rows)


def _is_comparison(rows: Sequence[Row], lkda: Sequence[Row]) -> bool:
    return bool(lkda) and lkda[0]["implementation"] != rows[0]["implementation"]


def _ratio(rows: list[Row], lkda: list[Row], column: str) -> str:
    return f"{_median(lkda, column) / _median(rows, column):.2f}" if _is_comparison(rows, lkda) else ""


def _loss_difference(rows: list[Row], lkda: list[Row]) -> str:
    if not _is_comparison(rows, lkda):
        return ""
    difference, spread = difference_and_spread(lkda, rows)
    return f"{difference:+.4f} (between seeds: {spread:.4f})"


def _note(header: dict[str, Any], row: Row) -> str:
    installed = [f"{name} {version}" for name, version in header["versions"].items() if version]
    return (
        f"{header['device']}; {row['layers']} dense layers of {row['width']}, heads of {row['head_dim']}, vocabulary "
        f"{row['vocab_size']:,}, batches of {row['rows']} x {row['context']:,} tokens, {row['steps']} steps of AdamW "
        f"in bf16 autocast; {', '.join(installed)}; {header['date'][:10]}."
    )


def _of_seeds(rows: Sequence[Row]) -> str:
    return f", {len(rows)} seeds" if len(rows) > 1 else ""


def _picture(groups: dict[Case, list[Row]]) -> Picture:
    """The loss of every seed: a colour for each implementation, and one panel for each model."""
    measured = {name: _done(rows) for (name, checkpointing), rows in groups.items() if not checkpointing}
    models = list(dict.fromkeys(NAMES[name][0] for name, rows in measured.items() if rows))

    def draw(style: Style) -> Figure:
        figure = Figure(figsize=(1.5 + 4.5 * len(models), 3.2), layout="constrained")
        for panel, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
            names = [name for name in measured if NAMES[name][0] == model]
            labels = {name: LEGEND[name] + _of_seeds(measured[name]) for name in names}
            lkda, *others = style.implementations
            colours = dict(zip((name for name in names if not NAMES[name][2]), others, strict=False))
            for name, line in zip(names, ("-", "--", ":")):
                for n, row in enumerate(measured[name]):
                    steps, label = range(1, len(row["losses"]) + 1), "_" if n else labels[name]
                    panel.plot(steps, row["losses"], line, color=colours.get(name, lkda), linewidth=1.0, label=label)
            panel.set(title=model, xlabel="step", ylabel="training loss, nats")
            panel.legend(edgecolor="none", framealpha=1, fontsize=9)
        return figure

    return picture(draw)
