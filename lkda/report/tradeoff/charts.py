"""The charts of the page, as Vega-Lite: accuracy against speed, state, tokens and time, and speed against context."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from lkda.report.draw.chart import SCHEMA, Chart
from lkda.report.tradeoff import host_bound
from lkda.report.tradeoff.measurements import Measurement

Record = dict[str, Any]
Encoding = dict[str, Any]
FEWEST_TICKS = 4  # of an axis
FEW_POINTS = 15  # of a line, each with a large mark
_LEGEND: dict[str, Any] = {
    "orient": "bottom",
    "columns": {"expr": "width < 420 ? 1 : 2"},
    "labelLimit": {"expr": "width < 420 ? width : width / 2 + 10"},
    "symbolOpacity": 1,
    "title": None,
}
_BYTES = (
    "datum.value >= 1073741824 ? format(datum.value / 1073741824, '.3~r') + ' GiB' : datum.value >= 1048576 ? "
    "format(datum.value / 1048576, '.3~r') + ' MiB' : datum.value >= 1024 ? format(datum.value / 1024, '.3~r') + ' KiB'"
    " : datum.value + ' B'"
)
_TOKENS = (
    "datum.value >= 1048576 ? datum.value / 1048576 + 'M' : datum.value >= 1024 ? format(datum.value / 1024, '.3~r') "
    "+ 'K' : datum.value"
)


def _log2(title: str, *, labels: str) -> Encoding:
    axis = {"labelExpr": labels, "grid": False, "labelOverlap": True}
    return {
        "type": "quantitative",
        "title": title,
        "scale": {"type": "log", "base": 2, "nice": False, "padding": 12},
        "axis": axis,
    }


def _powers_of_two(values: Sequence[float]) -> list[float]:
    """Those between the least and the greatest, at most eight of them; where there are few, steps between them too."""
    low, high = math.floor(math.log2(min(values))), math.ceil(math.log2(max(values)))
    for steps in (1, 2, 4):  # parts of the way from a power to the next
        ticks = [2.0**power * (1 + n / steps) for power in range(low, high + 1) for n in range(steps)]
        ticks = [tick for tick in ticks if min(values) <= tick <= max(values)]
        if len(ticks) >= FEWEST_TICKS:
            break
    return ticks[:: math.ceil(len(ticks) / 8) or 1]


def _one_two_five(values: Sequence[float]) -> list[float]:
    """1, 2 and 5 times powers of ten between the least and the greatest value."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    ticks = [float(f"{digit}e{power}") for power in range(low, high + 1) for digit in (1, 2, 5)]
    return [tick for tick in ticks if min(values) <= tick <= max(values)]


def _linear(title: str) -> Encoding:
    return {"type": "quantitative", "title": title, "scale": {"zero": False, "nice": True}, "axis": {"format": "~s"}}


def _log10(title: str, *, format: str) -> Encoding:
    # Without labelExpr, a logarithmic axis leaves most of its labels out where its range is less than a decade.
    axis = {"labelExpr": f"format(datum.value, '{format}')", "labelOverlap": True}
    return {
        "type": "quantitative",
        "title": title,
        "scale": {"type": "log", "nice": False, "padding": 12},
        "axis": axis,
    }


def _tooltip(fields: Mapping[str, str], *, format: Mapping[str, str]) -> list[Encoding]:
    return [
        {"field": name, "title": title} | ({"type": "quantitative", "format": format[name]} if name in format else {})
        for name, title in fields.items()
    ]


def _colour(domain: Sequence[str]) -> Encoding:
    return {
        "condition": {
            "param": "highlighted",
            "field": "series",
            "type": "nominal",
            "scale": {"domain": list(domain)},
            "legend": _LEGEND,
        },
        "value": "#8884",
    }


# Drag to move, pinch or hold ctrl and turn the wheel to zoom, so that a turn of the wheel alone scrolls the page.
_INTERACTIVE: list[dict[str, Any]] = [
    {
        "name": "zoomed",
        "select": {"type": "interval", "zoom": "wheel![event.ctrlKey]"},
        "bind": "scales",
    },
    {"name": "highlighted", "select": {"type": "point", "fields": ["series"]}, "bind": "legend"},
]


def _choice(settings: Sequence[str]) -> dict[str, Any]:
    """A menu of settings above the chart, where there are several."""
    if len(settings) < 2:
        return {}
    menu = {"input": "select", "options": list(settings), "name": "Shown: "}
    return {"params": [{"name": "setting", "value": settings[0], "bind": menu}]}


def _chosen(settings: Sequence[str]) -> list[dict[str, str]]:
    return [{"filter": "datum.setting === setting"}] if len(settings) > 1 else []


def _domain(records: Sequence[Record]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The series, and for each the mixer whose colour it has. A model of another package has a colour of its own."""
    named = {record["series"]: record["mixer"] for record in records}
    return tuple(named), tuple(mixer if name.startswith(mixer) else name for name, mixer in named.items())


def by_context(found: Sequence[Measurement], *, stage: str, value: str) -> Chart | None:
    """Time per token, or memory, against the context: a line for each series. None where no series has two contexts.

    Args:
        value: tokens_per_s, drawn as microseconds per token, or memory.
    """
    measured = [one for one in found if one.stage == stage and getattr(one, value) and one.tokens_per_s]
    settings = _with_several_contexts(measured)
    if not settings:
        return None
    records: list[Record] = [
        {"context": one.context, "us": 1e6 / float(one.tokens_per_s or 1), "memory": one.memory, "series": one.series}
        | {"mixer": one.mixer, "setting": one.where, "tokens_per_s": one.tokens_per_s, "file": one.file}
        for one in measured
        if one.where in settings
    ]
    domain, mixers = _domain(records)
    of_time = value == "tokens_per_s"
    of_memory = "state of one sequence" if stage == "decode" else "peak memory"
    x = _log2("context, tokens", labels=_TOKENS)
    x["axis"] = x["axis"] | {"values": sorted({record["context"] for record in records})}
    lines = {
        "params": _INTERACTIVE,
        "mark": {"type": "line", "point": {"size": 55, "filled": True}, "strokeWidth": 2},
        "encoding": {
            "x": {"field": "context", **x},
            "y": _microseconds(records) if of_time else _memory(of_memory, records),
            "color": _colour(domain),
            "detail": {"field": "series"},
            "tooltip": _tooltip_of_context(None if of_time else of_memory),
        },
    }
    what = "time per token" if of_time else of_memory
    left_out = host_bound.note(found) if stage == "prefill" and of_time else ""
    return Chart(
        f"{stage.replace(' ', '_')}_{'time' if of_time else 'memory'}",
        f"{stage.capitalize()}: {what} against the context",
        f"{settings[0]}. {left_out}" if left_out else settings[0],
        _spec(records, settings, lines),
        domain,
        mixers,
    )


def _with_several_contexts(measured: Sequence[Measurement]) -> list[str]:
    """The settings in which a series was measured at several contexts, those with the most such series first."""
    contexts: dict[tuple[str, str], set[int]] = {}
    for one in measured:
        contexts.setdefault((one.where, one.series), set()).add(one.context)
    lines = [where for (where, _), several in contexts.items() if len(several) > 1]
    return sorted(set(lines), key=lambda where: (-lines.count(where), where))


def _microseconds(records: Sequence[Record]) -> Encoding:
    y = {"field": "us", **_log10("time per token, microseconds", format=",.3~r")}
    ticks = _one_two_five([record["us"] for record in records])
    if len(ticks) >= FEWEST_TICKS:  # else those of the library, which are closer
        y["axis"] = y["axis"] | {"values": ticks}
    return y


def _memory(title: str, records: Sequence[Record]) -> Encoding:
    y = {"field": "memory", **_log2(title, labels=_BYTES)}
    y["axis"] = y["axis"] | {"values": _powers_of_two([record["memory"] for record in records]), "grid": True}
    return y


def _tooltip_of_context(of_memory: str | None) -> list[Encoding]:
    shown = {
        "series": "mixer",
        "context": "context, tokens",
        "tokens_per_s": "tokens/s",
        "us": "microseconds per token",
    }
    shown |= {} if of_memory is None else {"memory": f"{of_memory}, bytes"}
    shown |= {"setting": "setting", "file": "file"}
    return _tooltip(shown, format={"context": ",", "tokens_per_s": ",.0f", "us": ",.4~r", "memory": ",.0f"})


def _spec(records: Sequence[Record], settings: Sequence[str], *layers: Mapping[str, Any]) -> dict[str, Any]:
    """A specification whose menu chooses among the settings of the records."""
    return {
        "$schema": SCHEMA,
        **_choice(settings),
        "data": {"values": list(records)},
        "transform": _chosen(settings),
        "layer": list(layers),
    }


def against(
    name: str, title: str, caption: str, records: Sequence[Record], *, x: str, y: str, bytes_: bool = False
) -> Chart:
    """Accuracy against speed or state: a mark for each run and for each mean over seeds, and the Pareto front.

    Args:
        records: of runs and of means, as `lkda.report.tradeoff.records.points` makes them.
        x, y: titles of the axes.
        bytes_: whether x is a number of bytes.
    """
    domain, mixers = _domain(records)
    settings = list(dict.fromkeys(record["setting"] for record in records))
    across = {"field": "x", **(_log2(x, labels=_BYTES) if bytes_ else _log10(x, format=".3~s"))}
    across["scale"] = across["scale"] | {"padding": 40}  # the names of the first and the last mark need room
    across["axis"] = across["axis"] | {"labelSeparation": 6}
    up = {"field": "y", **_linear(y)}
    up["scale"] = up["scale"] | {"padding": 20}
    up["axis"] = {"format": ".4~r"}
    tooltip = _tooltip(
        {"series": "mixer", "run": "run", "seed": "seed", "y": y, "x": f"{x}, bytes" if bytes_ else x}
        | {"configuration": "configuration", "setting": "speed of"},
        format={"y": ".4f", "x": ",.0f"},
    )
    tooltip = [entry for entry in tooltip if entry["field"] != "setting" or not bytes_]
    position = {"x": across, "y": up}
    shown = position | {"color": _colour(domain), "tooltip": tooltip}
    runs = {
        "params": _INTERACTIVE,
        "transform": [{"filter": "datum.run !== 'mean over seeds'"}],
        "mark": {"type": "point", "size": 45, "filled": True, "opacity": 0.55},
        "encoding": shown,
    }
    means = {
        "transform": [{"filter": "datum.run === 'mean over seeds'"}],
        "mark": {"type": "point", "size": 130, "filled": True, "opacity": 1},
        "encoding": shown,
    }
    line, *rings_and_names = _front(position, tooltip)
    return Chart(name, title, caption, _spec(records, settings, runs, line, means, *rings_and_names), domain, mixers)


def _front(position: Encoding, tooltip: list[Encoding]) -> list[dict[str, Any]]:
    """The layers of the Pareto front: a dashed line, a ring around each of its models, and their names."""
    front = [{"filter": "datum.run === 'mean over seeds' && datum.front"}]
    edges = "scale('x', datum.x) < 70 ? 'left' : scale('x', datum.x) > width - 70 ? 'right' : 'center'"
    line = {
        "type": "line",
        "strokeDash": [5, 4],
        "strokeWidth": 1.5,
        "color": {"expr": "faint_ink"},
        "interpolate": "linear",
    }
    ring = {"type": "point", "size": 330, "filled": False, "strokeWidth": 1.8, "color": {"expr": "faint_ink"}}
    name: dict[str, Any] = {
        "type": "text",
        "align": {"expr": edges},  # within the chart on a narrow screen
        "dy": -17,
        "fontSize": 12,
        "limit": 220,
    }
    # A name hides the grid lines behind it: it is drawn twice, first with a wide outline in the colour of the page.
    outline = name | {"color": {"expr": "page"}, "stroke": {"expr": "page"}, "strokeWidth": 5, "strokeJoin": "round"}
    names = position | {"text": {"field": "series"}}
    return [
        {"transform": front, "mark": line, "encoding": position | {"order": {"field": "x", "type": "quantitative"}}},
        {"transform": front, "mark": ring, "encoding": position | {"tooltip": tooltip}},
        {"transform": front, "mark": outline, "encoding": names},
        {"transform": front, "mark": name | {"color": {"expr": "ink"}}, "encoding": names},
    ]


def curves(name: str, title: str, caption: str, records: Sequence[Record], *, x: str, y: str) -> Chart:
    """A quantity of the validations of each run: a line for each run, coloured by its row of the table."""
    domain, mixers = _domain(records)
    tooltip = _tooltip(
        {
            "series": "mixer",
            "run": "run",
            "seed": "seed",
            "step": "step",
            "x": x,
            "y": y,
            "configuration": "configuration",
        },
        format={"step": ",", "x": ",.0f", "y": ".4f"},
    )
    across, up = _linear(x), _linear(y)
    up["axis"] = {"format": ".4~r"}
    runs: dict[str, list[float]] = defaultdict(list)
    for record in records:
        runs[record["run"]].append(record["y"])
    # Without the steep beginning, of which a line shows the last part only; drag the chart to see the rest.
    up["scale"] |= {"domain": [min(map(min, runs.values())), max(max(ys[len(ys) // 8 :]) for ys in runs.values())]}
    size = 35 if max(map(len, runs.values())) <= FEW_POINTS else 8
    spec = {
        "$schema": SCHEMA,
        "data": {"values": list(records)},
        "layer": [
            {
                "params": _INTERACTIVE,
                "mark": {"type": "line", "point": {"size": size}, "strokeWidth": 1.6, "clip": True},
                "encoding": {
                    "x": {"field": "x", **across},
                    "y": {"field": "y", **up},
                    "color": _colour(domain),
                    "detail": {"field": "run"},
                    "tooltip": tooltip,
                },
            }
        ],
    }
    return Chart(name, title, caption, spec, domain, mixers)


def recall(records: Sequence[Record]) -> Chart:
    """Accuracy of a synthetic task against the bytes of the state: a line for each kind of model over its widths.

    Args:
        records: {series, mixer, setting (the subset of the validation), x (bytes), y, width, seeds, rate}.
    """
    domain, mixers = _domain(records)
    settings = list(dict.fromkeys(record["setting"] for record in records))
    tooltip = _tooltip(
        {"series": "mixer", "setting": "subset", "width": "d_model", "x": "state, bytes", "y": "accuracy"}
        | {"rate": "learning rate", "seeds": "seeds"},
        format={"x": ",.0f", "y": ".1%"},
    )
    up = {"field": "y", "type": "quantitative", "title": "accuracy at the target positions", "axis": {"format": "%"}}
    lines = {
        "params": _INTERACTIVE,
        "mark": {"type": "line", "point": {"size": 60}, "strokeWidth": 2},
        "encoding": {
            "x": {"field": "x", **_log2("state of one sequence", labels=_BYTES)},
            "y": up | {"scale": {"domain": [0, 1]}},
            "color": _colour(domain),
            "detail": {"field": "series"},
            "tooltip": tooltip,
        },
    }
    spec = _spec(records, settings, lines)
    return Chart("recall_by_state", "Recall against the size of the state", settings[0], spec, domain, mixers)
