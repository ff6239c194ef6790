"""The sections of the page, and the files beside it: report.md, the tables as CSV, and the charts."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lkda.io import write_together
from lkda.report.draw.chart import Chart
from lkda.report.draw.curves import ENOUGH
from lkda.report.draw.page import Section, page
from lkda.report.draw.tables import markdown_table, markdown_text
from lkda.report.draw.units import length, memory
from lkda.report.operators import report as bench_report
from lkda.report.operators.benchmark import KIND as BENCHMARK
from lkda.report.operators.benchmark import Benchmark
from lkda.report.read.files import read_results_file
from lkda.report.read.groups import Group
from lkda.report.studies import notes
from lkda.report.tradeoff import answers, charts, host_bound, records
from lkda.report.tradeoff.crossings import Pair, pairs, rounded
from lkda.report.tradeoff.glossary import glossary
from lkda.report.tradeoff.measurements import STAGES, WHOLE_SET, Measurement, Results, find_results, measurements
from lkda.report.tradeoff.repeat import how_to_repeat

# What the cells of a table are sorted by; -1 stands for a missing number.
Cells = list[list[float | str | None]]
FRONT = (
    "Dashed line and rings: the Pareto front. No other mixer beats these on one measure without losing on the other."
)
CHARTS = ("front_by_speed", "front_by_state", "curves_by_tokens", "curves_by_seconds", "recall_by_state")  # of runs
AGAIN = "measure again"
_DEVICE = 3  # the column of measurement_cells


@dataclass(frozen=True)
class Tradeoff:
    """What is joined.

    Attributes:
        groups: runs by row of the table; empty for benchmarks alone.
        found: the measurements of benchmarks.
        recall: points of synthetic tasks; see `lkda.report.tradeoff.charts.recall`.
        exclusive_device: whether no run shared its device, so that their speeds can be compared.
        how_to_repeat: a paragraph about the commands of the page.
    """

    groups: Sequence[Group]
    found: Sequence[Measurement]
    recall: Sequence[records.Record] = ()
    exclusive_device: bool = True
    how_to_repeat: str = ""

    @property
    def summary(self) -> str:
        """What to choose, in paragraphs."""
        return "\n\n".join(answers.summary(self.groups, self.found))

    def charts(self) -> list[Chart]:
        """The charts that the results allow."""
        return [*self._of_runs(), *self._of_contexts()]

    def _of_runs(self) -> list[Chart]:
        """Those of each quality, and the recall. The names of all but the first quality have its key."""
        drawn = []
        for n, (quality, groups) in enumerate(records.by_quality(self.groups)):
            ending = f"_{_file_name(quality.key)}" if n else ""
            drawn += [replace(chart, name=chart.name + ending) for chart in self._of_quality(quality, groups)]
        return drawn + ([charts.recall(self.recall)] if self.recall else [])

    def _of_quality(self, quality: records.Quality, groups: Sequence[Group]) -> list[Chart]:
        drawn, where = [], records.caption_of(groups)
        speeds = records.by_speed(groups, self.found, quality, exclusive_device=self.exclusive_device)
        if speeds:
            caption = " ".join([f"{where}. {FRONT}", *records.of_other_models(groups, self.found)])
            title = f"{quality.title.capitalize()} against speed"
            drawn.append(charts.against("front_by_speed", title, caption, speeds, x="tokens/s", y=quality.title))
        title, x = f"{quality.title.capitalize()} against memory", "state of one sequence"
        states = records.by_state(groups, quality)
        drawn.append(
            charts.against("front_by_state", title, f"{where}. {FRONT}", states, x=x, y=quality.title, bytes_=True)
        )
        return drawn + self._curves(quality, groups, where)

    def _curves(self, quality: records.Quality, groups: Sequence[Group], where: str) -> list[Chart]:
        drawn = []
        y, of_y = records.course_of(groups, quality)
        smoothed = (
            f" The lines are of training, smoothed: a run has fewer than {ENOUGH} validations."
            if y.startswith("train/")
            else ""
        )
        for column, heading, name in (
            ("tokens", "training tokens", "tokens"),
            ("seconds", "training time, s", "seconds"),
        ):
            if column == "seconds" and not self.exclusive_device:
                continue
            curves = records.curve_records(groups, x=column, y=y)
            if curves:
                title = f"{of_y.capitalize()} against {heading}"
                caption = f"{where}.{smoothed}" if smoothed else where
                drawn.append(charts.curves(f"curves_by_{name}", title, caption, curves, x=heading, y=of_y))
        return drawn

    def _of_contexts(self) -> list[Chart]:
        drawn = [
            charts.by_context(self.found, stage=stage, value=value)
            for value in ("tokens_per_s", "memory")
            for stage in STAGES
        ]
        return [chart for chart in drawn if chart is not None]

    def first_section(self) -> Section:
        """What to choose: the sentence on top, and the table of answers."""
        found = answers.answers(self.groups, self.found)
        head = ["question", "context", "mixer", "figures", "measured with"]
        body = [[one.question, length(one.context) if one.context else "", one.mixer, one.why, one.of] for one in found]
        sort_by: Cells = [[one.question, one.context or -1, one.mixer, one.why, one.of] for one in found]
        return Section(
            lead=self.summary,
            hints=[
                "Choose a question and a context below the headings to find the answer for your case, or type a "
                'context as a whole number, such as 8,192, into the field Search. In "1.24 times kda", the speed is '
                "compared with that of the second fastest mixer.",
                *([self.how_to_repeat] if self.how_to_repeat else []),
            ],
            head=head,
            body=body,
            names=5,
            sortable=True,
            sort_by=sort_by,
            lists=(0, 1, 2),
            notes=self._left_out(),
        )

    def chart_section(self) -> Section:
        """All charts."""
        notes = [
            "Point at a mark, or tap it, for its figures. Drag to move a chart, turn the wheel with ctrl to zoom, and "
            "double-click to go back. Click a name in the legend to highlight it."
        ]
        return Section("Charts", notes=notes, charts=self.charts())

    def crossing_section(self) -> Section:
        """Which mixer overtakes which, and where."""
        head, body, sort_by = crossing_cells(pairs(self.found))
        notes = [
            "The context from which one is faster is interpolated between the measured contexts, on logarithmic axes. "
            "Blank: the same mixer is faster at every context measured for both.",
            *self._left_out(),
            *self._noise(),
        ]
        heading = "Where one mixer overtakes another"
        lists = (0, 1, 2)
        return Section(heading, head=head, body=body, names=4, sortable=True, sort_by=sort_by, notes=notes, lists=lists)

    def _left_out(self) -> list[str]:
        """A sentence where the host's time left answers and crossings out."""
        return [note] if (note := host_bound.note(self.found)) else []

    def _noise(self) -> list[str]:
        """A sentence where some measurements are noisy."""
        noisy = sum(one.noisy and one.tokens_per_s is not None for one in self.found)
        said = f"{noisy} of the measurements, marked as noisy below, differed by more than a fifth when repeated. "
        return [f"{said}What depends on them is uncertain."] if noisy else []

    def measurement_section(self) -> Section:
        """Every measurement, with its file and its command."""
        head, body, sort_by = measurement_cells(self.found)
        devices = {one.device for one in self.found}
        hints = [f"All of these are of {next(iter(devices))}."] if len(devices) == 1 else []
        hints.append("memory: of decode the state of one sequence, of all other stages the peak of the device.")
        notes = _not_measured(self.found)
        notes += [host_bound.MEANING, *self._left_out()] if self._left_out() else []
        notes += self._noise()
        lists: tuple[int, ...] = (0, 1, 3, 4)
        if len(devices) == 1:  # its column would be the same in every row
            head, lists = _without(head, _DEVICE), (0, 1, 3)
            body, sort_by = [_without(line, _DEVICE) for line in body], [_without(line, _DEVICE) for line in sort_by]
        return Section(
            "All measurements",
            hints=[" ".join(hints)],
            head=head,
            body=body,
            names=3,
            sortable=True,
            sort_by=sort_by,
            notes=notes,
            lists=lists,
        )

    def explained(self, sections: Sequence[Section]) -> Section:
        """The first of the sections, with a glossary of all."""
        mixers = [*(group.mixer for group in self.groups), *(one.mixer for one in self.found)]
        models = [*(str(group.runs[0].summary.get("model")) for group in self.groups)]
        models += [one.model for one in self.found if one.model]
        return replace(sections[0], terms=glossary(sections, mixers=mixers, models=models))

    def sections(self) -> list[Section]:
        """What the benchmarks add to the page, below the runs."""
        return [self.crossing_section(), self.measurement_section()] if self.found else []

    def files(
        self, title: str, *, table: str, notes: Sequence[str], pictures: Mapping[str, str] = MappingProxyType({})
    ) -> dict[str, str | bytes]:
        """report.md, the tables of the benchmarks as CSV, and each chart as SVG and PNG.

        Args:
            table: that of the runs, in Markdown; empty without runs.
            notes: below it.
            pictures: files beside report.md that it shows below the charts, by heading.
        """
        drawn = self.charts()
        first, below = self.first_section(), self.sections()
        parts = [markdown_text(f"# {title}\n\n{first.lead}")]
        parts += [markdown_table(first.head, first.body, names=5)] if first.body else []
        parts += [table, *map(markdown_text, notes)] if table else []
        for chart in drawn:
            parts.append(markdown_text(f"## {chart.title}\n\n{chart.caption}\n\n![{chart.title}]({chart.name}.svg)"))
        parts += [markdown_text(f"## {heading}\n\n![{heading}]({name})") for heading, name in pictures.items()]
        for section in below:
            parts += [f"## {section.heading}", markdown_table(section.head, section.body, names=4)]
            parts += map(markdown_text, section.notes)
        files: dict[str, str | bytes] = {"report.md": "\n\n".join(part.rstrip() for part in parts if part) + "\n"}
        for chart in drawn:
            files |= chart.files
        if self.found:
            for name, (head, _, sort_by) in (
                ("crossings.csv", crossing_cells(pairs(self.found))),
                ("measurements.csv", measurement_cells(self.found)),
            ):
                files[name] = _csv(head, sort_by)
        return files


def _file_name(key: str) -> str:
    return key.replace("/", "_")


def remove_stale(out: Path, written: Collection[Path], *, plots: Sequence[str] = ()) -> None:
    """Removes the charts and tables of an earlier page in `out` that the page of today does not have.

    Args:
        written: the files of today.
        plots: names of PNG files that the page may have beside its charts.
    """
    by_context = [f"{stage.replace(' ', '_')}_{what}" for stage in STAGES for what in ("time", "memory")]
    of_others = [f"{name}_{_file_name(key)}" for name in CHARTS for key in records.KEYS]
    names = [f"{name}.{ending}" for name in (*CHARTS, *of_others, *by_context) for ending in ("svg", "png")]
    for name in [*names, *(f"{name}.png" for name in plots), "crossings.csv", "measurements.csv"]:
        if out / name not in written:
            (out / name).unlink(missing_ok=True)


def write_whole_set(results: Sequence[Results], path: Path, *, title: str) -> None:
    """Writes results of benchmarks to `path`, and beside it report.html and what `Tradeoff.files` makes."""
    repeat = how_to_repeat([], [result.header.get("git_commit") for result in results])
    joined = Tradeoff([], measurements(results), how_to_repeat=repeat)
    content = {"kind": WHOLE_SET, "title": title, "benchmarks": [asdict(result) for result in results]}
    crossing, measured = joined.sections()
    sections = [joined.first_section(), crossing, joined.chart_section(), *notes_sections(results), measured]
    operators = benchmark_of(results)
    sections += [replace(bench_report.table_section(operators), sortable=True)] if operators else []
    sections[0] = joined.explained(sections)
    files = joined.files(title, table="", notes=())
    files |= {path.name: json.dumps(content, indent=1) + "\n", "report.html": page(title, sections)}
    written = {path.parent / name: text for name, text in files.items()}
    write_together(written)
    remove_stale(path.parent, written)


def redraw(path: Path) -> None:
    """Writes what `write_whole_set` does beside a whole set's file. Raises: InputError where it is not one."""
    found = read_results_file(path, kind=WHOLE_SET)
    write_whole_set(find_results([path]), path, title=str(found.get("title")))


def benchmark_of(results: Sequence[Results]) -> Benchmark | None:
    """The operators' times on the device of the first file that holds some, or None."""
    found = [result for result in results if result.kind == BENCHMARK]
    same = [result for result in found if result.header.get("device") == found[0].header.get("device")]
    return Benchmark(found[0].header, [row for result in same for row in result.rows]) if found else None


def notes_sections(results: Sequence[Results]) -> list[Section]:
    """The table of the project's notes, their lessons and their claims, from `scripts/benchmark.py task=notes`."""
    sections = []
    for result in (result for result in results if result.kind == notes.KIND):
        found = {"header": result.header, "rows": result.rows}
        same = [one for one in results if one.header.get("device") == result.header.get("device")]
        decoding = [row for one in same if one.kind == "decode" for row in one.rows]
        for name, (head, body) in notes.tables(found, decoding).items():
            heading = f"The notes: {notes.TITLES[name][0].lower()}{notes.TITLES[name][1:]}"
            said, hint = [notes.note(found)], notes.shape_of(found, name)
            shown = Section(heading, head=head, body=body, names=notes.NAMES[name], notes=said, sortable=name == "rows")
            sections.append(replace(shown, hints=[hint] if hint else []))
    return sections


def _not_measured(found: Sequence[Measurement]) -> list[str]:
    """What was not measured, a sentence for each reason."""
    absent: dict[str, set[str]] = defaultdict(set)
    for one in found:
        if one.reason:
            absent[one.reason.rstrip(".")].add(one.series)
    return [f"Not measured: {'; '.join(sorted(names))}. Reason: {reason}." for reason, names in sorted(absent.items())]


def crossing_cells(found: Sequence[Pair]) -> tuple[list[str], list[list[str]], Cells]:
    """Headings, cells, and what the cells are sorted by."""
    head = ["stage", "faster", "slower", "finding", "from context", "times faster at the longest context"]
    head += ["longest context", "setting"]
    body: list[list[str]] = []
    order: Cells = []
    for pair in found:
        names = [pair.stage, pair.faster, pair.slower, pair.text]
        context = "" if pair.context is None else rounded(pair.context)
        body.append([*names, context, f"{pair.ratio:.2f}", length(pair.longest), pair.where])
        order.append([*names, pair.context if pair.context is not None else -1, pair.ratio, pair.longest, pair.where])
    return head, body, order


def measurement_cells(
    found: Sequence[Measurement],
) -> tuple[list[str], list[list[str]], Cells]:
    """Headings, cells, and what the cells are sorted by."""
    why_not = ["why not"] if any(one.reason for one in found) else []
    head = ["stage", "mixer", "setting", "device", "context", "tokens/s", "memory", *why_not, "file", AGAIN]
    body: list[list[str]] = []
    order: Cells = []
    for one in found:
        names = [one.stage, one.series, one.setting, one.device]
        marks = " (noisy)" * one.noisy + f" ({host_bound.MARK})" * host_bound.is_host_bound(one)
        speed = "" if one.tokens_per_s is None else f"{one.tokens_per_s:,.0f}{marks}"
        space = "" if one.memory is None else memory(one.memory)
        rest = [*([one.reason] if why_not else []), one.file, one.command]
        body.append([*names, length(one.context), speed, space, *rest])
        order.append([*names, one.context, one.tokens_per_s or -1, one.memory or -1, *rest])
    return head, body, order


def _without(cells: Sequence[Any], n: int) -> list[Any]:
    return [*cells[:n], *cells[n + 1 :]]


def _csv(head: Sequence[str], rows: Sequence[Sequence[float | str | None]]) -> str:
    """A missing number is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(["" if cell == -1 else cell for cell in row] for row in rows)
    return text.getvalue()
