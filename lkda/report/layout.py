"""Draws the packages of lkda and the path of a batch: `python -m lkda.report.layout` writes docs/layout.svg.

The packages, their sub-packages and the arrows between them are read from the import statements in the source files.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from html import escape
from pathlib import Path
from statistics import fmean

from lkda.checks import InputError
from lkda.io import write_atomically

HOME = Path(__file__).parents[1]

# The path of a batch: what a token is at each step, and the file that makes it so.
BATCH_PATH = (
    ("text files -> documents", "data/text/files.py"),
    ("documents -> tokens, once, on disk", "data/text/tokenize.py"),
    ("tokens -> a packed batch: tokens and targets [1, N], cu_seqlens", "data/packing.py"),
    ("batch -> loss, gradients, optimizer step", "training/task.py"),
    ("tokens [1, N] -> logits [1, N, vocab]", "models/lm.py"),
    ("x + mixer(norm(x)), then x + MLP(norm(x))", "models/block.py"),
    ("x [1, N, d] -> q, k, v, gate logits -> y [1, N, d]", "models/mixers/kda.py"),
    ("q, k, v, gate logits [1, N, H, D] -> o; picks the backend", "ops/kda/fused.py"),
    ("the recurrence on a GPU, in CUDA C++", "ops/kda/cuda/"),
)

_FONT = 'font-family="Helvetica, Arial, sans-serif"'
_MARGIN, _BATCH_WIDTH = 24, 456  # widths of the margins and of the path of a batch
_TOP, _BOX, _GAP = 56, 150, 8  # of the first row; the width of a package and of what is between two
_LETTERS, _LINE, _BETWEEN = 18, 13, 40  # of a line in a package; from line to line; from row to row
_COLOURS = {"commands": "#f3e3c3", "data": "#d3e6d0", "report": "#dddddd", "models": "#cfe0f3", "ops": "#f2cfcf"}


@dataclass(frozen=True)
class _Place:
    left: float
    top: float
    width: float
    height: float

    @property
    def bottom(self) -> float:
        return self.top + self.height

    @property
    def middle(self) -> float:
        return self.left + self.width / 2


def dependencies(home: Path = HOME) -> dict[str, set[str]]:
    """Which packages of lkda (the folders of `home`) import which, and `scripts`, which calls `commands`."""
    packages = sorted(path.name for path in home.iterdir() if (path / "__init__.py").is_file())
    found: dict[str, set[str]] = {}
    for package in packages:
        names = {name for path in (home / package).rglob("*.py") for name in _imports(path)}
        tops = {name.split(".")[1] for name in names if name.startswith("lkda.")}
        found[package] = (tops & set(packages)) - {package}
    return found | {"scripts": {"commands"}}


def _imports(path: Path) -> Iterable[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def levels(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The packages in rows, each below all that import it. Raises CycleError where imports run in a circle."""
    above: dict[str, set[str]] = {name: {other for other in graph if name in graph[other]} for name in graph}
    depth: dict[str, int] = {}
    for name in TopologicalSorter(above).static_order():
        depth[name] = max((depth[other] + 1 for other in above[name]), default=0)
    return [sorted(name for name in graph if depth[name] == row) for row in range(max(depth.values()) + 1)]


def arrows(graph: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """(importer, imported), without those that a chain of other arrows implies."""
    return [
        (name, other)
        for name in sorted(graph)
        for other in sorted(graph[name])
        if not any(other in _reached(graph, between) for between in graph[name] - {other})
    ]


def _reached(graph: Mapping[str, set[str]], name: str) -> set[str]:
    return graph[name].union(*(_reached(graph, other) for other in graph[name]))


def sub_packages(package: str, home: Path = HOME) -> list[str]:
    """The folders of code inside a package."""
    return sorted(path.parent.name for path in (home / package).glob("*/__init__.py"))


def svg(home: Path = HOME) -> str:
    """The picture. Raises: ValueError where a file of the path of a batch is not there."""
    missing = [file for _, file in BATCH_PATH if not (home / file).exists()]
    if missing:
        raise InputError(
            f"lkda/{missing[0]} is on the path of a batch and is not there; mend BATCH_PATH in {__file__}."
        )
    graph = dependencies(home)
    rows = levels(graph)
    ways = {pair: _route(rows, *pair) for pair in arrows(graph)}
    inside = {name: _wrapped([f"{inner}/" for inner in sub_packages(name, home)]) for name in graph}
    places = _places(rows, ways, inside)
    right = max(place.left + place.width for place in places.values()) + 2 * _MARGIN
    width, height = right + _BATCH_WIDTH + _MARGIN, max(place.bottom for place in places.values()) + 60
    body = [
        _text(_MARGIN, 34, "Packages: an arrow means “imports”", size=17, bold=True),
        _text(right, 34, "The path of a training batch", size=17, bold=True),
        *(_arrow(places, way) for way in ways.values()),
        *(_package(name, places[name], inside[name]) for row in rows for name in row),
        *_way(right, height),
        _text(_MARGIN, height - 12, "Imports that a chain of arrows implies are not drawn.", size=12),
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" {_FONT}>',
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#444"/></marker></defs>',
            f'<rect width="{width:g}" height="{height:g}" fill="white"/>',
            *body,
            "</svg>\n",
        ]
    )


def _route(rows: Sequence[Sequence[str]], name: str, other: str) -> list[str]:
    """The places that an arrow touches, a row each: the importer, a narrow gap in each row between, the imported."""
    at = {package: number for number, row in enumerate(rows) for package in row}
    return [name, *(f"{name}>{other}>{row}" for row in range(at[name] + 1, at[other])), other]


def _places(
    rows: Sequence[Sequence[str]], ways: Mapping[tuple[str, str], list[str]], inside: Mapping[str, Sequence[str]]
) -> dict[str, _Place]:
    """Where each package, and each gap that an arrow passes through, lies: below those that point to it.

    Args:
        inside: the lines in the box of each package below its name. The highest box of a row gives its height.
    """
    found: dict[str, _Place] = {}
    stops = [[*packages, *_gaps(ways, number)] for number, packages in enumerate(rows)]
    widest = max(_row_width(row, inside) for row in stops)
    top = float(_TOP)
    for number, row in enumerate(stops):
        above = {
            stop: [found[way[at]].middle for way in ways.values() for at in range(len(way) - 1) if way[at + 1] == stop]
            for stop in row
        }
        left = _MARGIN + (widest - _row_width(row, inside)) / 2
        height = 36.0 + _LINE * max(len(inside[name]) for name in rows[number])
        for stop in sorted(above, key=lambda stop: (fmean(above[stop] or [0]), stop)):
            found[stop] = _Place(left, top, _width(stop, inside), height)
            left += found[stop].width + _GAP
        top += height + _BETWEEN
    return found


def _gaps(ways: Mapping[tuple[str, str], list[str]], row: int) -> list[str]:
    return [stop for way in ways.values() for stop in way[1:-1] if stop.endswith(f">{row}")]


def _width(stop: str, packages: Mapping[str, object]) -> float:
    return _BOX if stop in packages else _GAP


def _row_width(row: Sequence[str], packages: Mapping[str, object]) -> float:
    return sum(_width(stop, packages) + _GAP for stop in row) - _GAP


def _package(name: str, place: _Place, lines: Sequence[str]) -> str:
    x, y = place.left, place.top
    title = f"{name}/" if name == "scripts" else f"lkda/{name}/"
    box = _box(x, y, place.width, place.height, name)
    texts = [_text(x + 8, y + 20, title, size=12.5, bold=True)]
    texts += [_text(x + 8, y + 36 + _LINE * n, line, size=11) for n, line in enumerate(lines)]
    return "\n".join([box, *texts])


def _wrapped(words: list[str]) -> list[str]:
    lines: list[str] = []
    for word in words:
        if lines and len(f"{lines[-1]} {word}") <= _LETTERS:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _arrow(places: Mapping[str, _Place], way: Sequence[str]) -> str:
    first, *between, last = (places[stop] for stop in way)
    points = [(first.middle, first.bottom)]
    points += [(stop.middle, y) for stop in between for y in (stop.top, stop.bottom)]
    return _line([*points, (last.middle, last.top - 2)])


def _line(points: Sequence[tuple[float, float]]) -> str:
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="#444" stroke-width="1.3" marker-end="url(#head)"/>'


def _way(x: float, height: float) -> list[str]:
    """A column of stations, x its left edge, from the text at the top to the kernel at the bottom."""
    step = (height - _TOP - 34) / len(BATCH_PATH)
    found = []
    for number, (what, file) in enumerate(BATCH_PATH):
        y = _TOP + number * step
        found.append(_box(x, y, _BATCH_WIDTH, step - 18, file.split("/")[0]))
        found.append(_text(x + 10, y + 19, what, size=13))
        found.append(_text(x + 10, y + 36, f"lkda/{file}", size=11.5, colour="#444"))
        if number + 1 < len(BATCH_PATH):
            middle = x + _BATCH_WIDTH / 2
            found.append(_line([(middle, y + step - 18), (middle, y + step - 2)]))
    return found


def _box(x: float, y: float, width: float, height: float, package: str) -> str:
    colour = _COLOURS.get(package, "#e8e0f0")
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="{colour}" stroke="#666"/>'


def _text(x: float, y: float, text: str, *, size: float, bold: bool = False, colour: str = "#111") -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{colour}"{weight}>{escape(text)}</text>'


def main() -> None:
    """Writes docs/layout.svg of the working directory."""
    try:
        write_atomically(Path("docs/layout.svg"), svg())
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
