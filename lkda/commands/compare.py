"""Lay runs side by side: a table, plots and a page."""

from __future__ import annotations

import glob
import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig
from rich.console import Console

from lkda.report.comparison import compare as compare_runs
from lkda.report.table import as_rich


def compare(config: DictConfig) -> None:
    """Compares the run directories that `config.runs` finds and writes the result into `config.out`.

    Args:
        config: composed from configs/compare.yaml.
    Raises: ValueError where nothing is found, none of it is a finished run, or `out` cannot be written.
    """
    directories = _find(config.runs)
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write the directory {out}: {error.strerror}.") from error
    kernel_ms = None if config.bench is None else _kernel_times(Path(config.bench))
    result = compare_runs(directories, out, title=config.title, kernel_ms=kernel_ms)
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=120)
    console.print(as_rich(result.rows))
    for note in result.notes:
        console.print(note, style="dim")
    for path, reason in result.skipped:
        console.print(f"left out {path}: {reason}", style="yellow", highlight=False)
    console.print(f"\n{out / 'report.html'} shows it with plots; table.csv, table.md and results.json lie beside it.")


def _find(runs: str | ListConfig) -> list[Path]:
    """The paths that a glob, or each of a list of globs, matches. Raises ValueError where one matches nothing."""
    found: dict[Path, None] = {}
    for pattern in [runs] if isinstance(runs, str) else list(runs):
        paths = sorted(glob.glob(str(pattern), recursive=True))
        if not paths:
            raise ValueError(f"runs={pattern} matches nothing; give run directories, as in runs='outputs/*'.")
        found |= dict.fromkeys(Path(path) for path in paths)
    return list(found)


def _kernel_times(path: Path) -> dict[str, float]:
    """Forward+backward milliseconds of each operator's own kernels, from a benchmark's JSON: its largest shape's."""
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"bench={path} is not a benchmark's JSON ({error}); scripts/benchmark.py writes one."
        ) from error
    chosen: dict[str, tuple[int, float]] = {}
    for row in rows:
        if row["mode"] != "fwd+bwd" or row["replay"] != "eager" or row.get("peer") or row.get("ms_median") is None:
            continue
        if row["backend"] not in ("cuda", "sdpa"):
            continue
        size = row["B"] * row["T"] * row["H"] * row["D"]
        if row["op"] not in chosen or size > chosen[row["op"]][0]:
            chosen[row["op"]] = (size, row["ms_median"])
    return {op: ms for op, (_, ms) in chosen.items()}
