"""Joins groups of runs with measurements: accuracy beside speed and memory, the Pareto front, and what is best."""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lkda.report.draw.curves import ENOUGH, mean_curve, running_mean
from lkda.report.draw.units import count, length, memory
from lkda.report.read.groups import Group, also_differing, settings
from lkda.report.read.runs import Run, reported_split
from lkda.report.tradeoff.crossings import pairs, rounded
from lkda.report.tradeoff.measurements import OF_MODELS, STAGES, Measurement

Record = dict[str, Any]
LOGGED = "training, as the runs logged it"
MEAN = "mean over seeds"
MOST_POINTS, FEWEST_POINTS = 2000, 10  # of all curves of training in a chart, and of one of them
COMMAND = "train_again"  # an entry of a summary: the command that trains the run again


@dataclass(frozen=True)
class Quality:
    """What says how good a model is.

    Attributes:
        key: an entry of a run's summary.
        title: with its unit.
        more_is_better: whether larger values are better.
        write: a value as text.
    """

    key: str
    title: str
    more_is_better: bool
    write: Callable[[float], str]

    def better(self, one: float, other: float) -> bool:
        """Whether `one` is better than `other`."""
        return one > other if self.more_is_better else one < other


def quality_of(groups: Sequence[Group]) -> Quality:
    """Bits per byte for runs of text, accuracy for synthetic tasks, and the loss where both occur."""
    runs = [run for group in groups for run in group.runs]
    split = reported_split(runs)
    if all(run.summary.get("val/bits_per_byte") is not None for run in runs):
        return Quality(f"{split}/bits_per_byte", f"{_SPLITS[split]} bits per byte", False, "{:.3f}".format)
    if all(run.summary.get("val/accuracy") is not None for run in runs):
        return Quality("val/accuracy", "validation accuracy", True, "{:.1%}".format)
    return Quality(f"{split}/loss", f"{_SPLITS[split]} loss, nats per token", False, "{:.3f}".format)


_SPLITS = {"val": "validation", "test": "test"}


def within_spread(group: Group, best: Group, quality: Quality) -> bool | None:
    """Whether the difference from the best is not larger than the larger of both standard deviations over seeds.

    None where either has one seed, so that there is no spread.
    """
    if len(group.runs) < 2 or len(best.runs) < 2:
        return None
    spread = max(statistics.stdev(one.values(quality.key)) for one in (group, best))
    return abs(group.mean(quality.key) - best.mean(quality.key)) <= spread


def best_of(groups: Sequence[Group], quality: Quality) -> Group:
    """The group with the best mean."""
    choose = max if quality.more_is_better else min
    return choose(groups, key=lambda group: group.mean(quality.key))


def on_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For each (cost, gain) whether no other point costs at most as much and gains at least as much, and one of both
    strictly: the Pareto front."""

    def dominated(cost: float, gain: float) -> bool:
        return any(c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in points)

    return [not dominated(cost, gain) for cost, gain in points]


def by_data(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """The groups by the data of their runs, because accuracies on different data cannot be compared."""
    found: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        found[_data_of(group.runs[0])].append(group)
    return dict(found)


def _data_of(run: Run) -> str:
    """The name of the data; of files, which all have one name, with their paths."""
    name, data = str(run.summary.get("data", "unnamed data")), run.config.get("data") or {}
    paths = data.get("val_paths") or data.get("paths")
    return f"{name} ({paths if isinstance(paths, str) else ', '.join(map(str, paths))})" if paths else name


def by_speed(
    groups: Sequence[Group], found: Sequence[Measurement], quality: Quality, *, exclusive_device: bool
) -> list[Record]:
    """Accuracy against tokens/s: of training as the runs logged it, and of each benchmark of at least two of the models
    with the runs' mixer and model. Runs of different data are not compared."""
    parts = by_data(groups)
    if len(parts) > 1:
        return [
            record | {"setting": f"{record['setting']}; {data}"}
            for data, same in parts.items()
            for record in by_speed(same, found, quality, exclusive_device=exclusive_device)
        ]
    records = []
    devices = {run.summary.get("device") for group in groups for run in group.runs}
    if exclusive_device and len(devices) == 1:
        speeds = [(group, lambda run: float(run.summary["tokens_per_s"])) for group in groups]
        records += _points(speeds, quality, setting=LOGGED, more_x_is_better=True)
    settings_found = {(one.stage, one.where, one.context) for one in found if one.stage in OF_MODELS}
    for stage, where, context in sorted(settings_found, key=lambda found: (STAGES.index(found[0]), *found[1:])):
        here = [one for one in found if (one.stage, one.where, one.context) == (stage, where, context)]
        joined = [(group, _constant(speed)) for group in groups if (speed := speed_of(group, here)) is not None]
        if len(joined) > 1:
            setting = f"{stage} at a context of {length(context)}: {where}"
            records += _points(joined, quality, setting=setting, more_x_is_better=True)
    return records


def _constant(value: float) -> Callable[[Run], float]:
    return lambda run: value


def speed_of(group: Group, found: Sequence[Measurement]) -> float | None:
    """tokens/s of lkda's own implementation of the group's mixer and model among measurements of one setting."""
    model = group.runs[0].summary.get("model")
    return next(
        (
            one.tokens_per_s
            for one in found
            if one.tokens_per_s and (one.model, one.series) == (model, group.mixer)  # peers have a title of their own
        ),
        None,
    )


def by_state(groups: Sequence[Group], quality: Quality) -> list[Record]:
    """Accuracy against the bytes of the state of one sequence at the training context, for each data."""
    records = []
    for data, same in by_data(groups).items():
        states = [(group, lambda run: float(run.summary["state_bytes"])) for group in same]
        records += _points(states, quality, setting=data, more_x_is_better=False)
    return records


def _points(
    values: Sequence[tuple[Group, Callable[[Run], float]]], quality: Quality, *, setting: str, more_x_is_better: bool
) -> list[Record]:
    """A record for each run and for each group's mean, with whether the mean is on the Pareto front."""
    means = [
        (
            statistics.fmean(x(run) for run in group.runs),
            statistics.fmean(run.summary[quality.key] for run in group.runs),
        )
        for group, x in values
    ]
    costs = [(-x if more_x_is_better else x, y if quality.more_is_better else -y) for x, y in means]
    records = []
    for (group, x_of), (mean_x, mean_y), front in zip(values, means, on_front(costs), strict=True):
        common = {"series": group.label, "mixer": group.mixer, "setting": setting, "front": front}
        for run in group.runs:
            seed = {"run": run.name, "seed": str(run.summary.get("seed", "")), "configuration": configuration(run)}
            records.append(common | seed | {"x": x_of(run), "y": float(run.summary[quality.key])})
        seeds = ", ".join(str(run.summary.get("seed", "")) for run in group.runs)
        mean = {"run": MEAN, "seed": seeds, "configuration": configuration(group.runs[0])}
        records.append(common | mean | {"x": mean_x, "y": mean_y})
    return records


def configuration(run: Run) -> str:
    """The settings that a reader asks for first."""
    summary, config = run.summary, run.config
    found = [f"model {summary['model']}"] if summary.get("model") else []
    found.append(f"{summary['params']:,.0f} parameters")
    found += [f"context {summary['context']:,}"] if summary.get("context") else []
    found += [f"learning rate {rate:g}"] if isinstance(rate := summary.get("learning_rate"), float) else []
    precision = config.get("trainer", {}).get("precision") or summary.get("precision")
    found += [str(precision)] if precision else []
    return ", ".join([*found, str(summary.get("device", "an unnamed device"))])


def reproduce(group: Group, groups: Sequence[Group]) -> str:
    """The command that trains the first run of a row again; where it is not recorded, with what tells rows apart."""
    run = group.runs[0]
    if COMMAND in run.summary:
        return str(run.summary[COMMAND])
    known = settings(run)
    runs = [one for other in groups for one in other.runs]
    words = [f"{name}={known[key]}" for name, key in _CHOICES if known.get(key)]
    differing = [key for key in also_differing(runs) if "." in key and key not in dict(_CHOICES).values()]
    words += [f"{key}={known[key]}" for key in differing if key in known]
    seed = run.summary.get("seed")
    words += [] if seed is None else [f"seed={seed}"]
    steps = run.config.get("trainer", {}).get("max_steps")
    return " ".join(["python scripts/train.py", *words, *([f"trainer.max_steps={steps}"] if steps else [])])


_CHOICES = (("mixer", "mixer.name"), ("model", "model.name"), ("data", "data.source"))


def curve_records(groups: Sequence[Group], *, x: str, y: str) -> list[Record]:
    """The course of each run: {x, y, step, run, seed, series, mixer, configuration}.

    Args:
        x, y: columns of metrics.csv. A column of training is smoothed and thinned.
    """
    runs = [(group, run) for group in groups for run in group.runs]
    most = max(FEWEST_POINTS, MOST_POINTS // len(runs))
    records = []
    for group, run in runs:
        course, steps = mean_curve([run], x, y), mean_curve([run], "step", y).x
        every = 1
        if y.startswith("train/"):
            course, every = running_mean(course), math.ceil(len(course.x) / most) or 1
        about = {"series": group.label, "mixer": group.mixer, "run": run.name}
        about |= {"seed": str(run.summary.get("seed", "")), "configuration": configuration(run)}
        points = list(zip(course.x, course.y, steps, strict=True))
        records += [{"x": x, "y": y, "step": step, **about} for x, y, step in points[::-every][::-1]]  # with the last
    return records


def course_of(groups: Sequence[Group], quality: Quality) -> tuple[str, str]:
    """The column that shows the course of the runs, and its title: that of the validations, or of training where a run
    has too few of them for a line."""
    y = quality.key.replace("test/", "val/")
    trained = y.replace("val/", "train/")
    runs = [run for group in groups for run in group.runs]
    few = min(sum(y in row for row in run.metrics) for run in runs) < ENOUGH
    if few and all(any(trained in row for row in run.metrics) for run in runs):
        return trained, re.sub("^(validation|test)", "training", quality.title)
    return y, re.sub("^test", "validation", quality.title)


@dataclass(frozen=True)
class Answer:
    """A question that the page is for, and the mixer that answers it.

    Attributes:
        question, mixer: in words.
        why: the figures.
        of: where they are from.
        context: for answers about a context.
        rivals: the number of mixers that were compared.
    """

    question: str
    mixer: str
    why: str
    of: str
    context: int = 0
    rivals: int = 0


def answers(groups: Sequence[Group], found: Sequence[Measurement], quality: Quality | None) -> list[Answer]:
    """The best by accuracy at each limit of memory, and the fastest and the smallest at each context."""
    parts = by_data(groups)
    of_runs = [_by_accuracy(same, quality, _budget(same, data, parts)) for data, same in parts.items() if quality]
    return [*(answer for part in of_runs for answer in part), *_by_context(found)]


def _budget(groups: Sequence[Group], data: str, parts: Mapping[str, Any]) -> str:
    """The budget of the runs, with their data where there are several."""
    return budget_of(groups) + (f", on {data}" if len(parts) > 1 else "")


def _by_accuracy(groups: Sequence[Group], quality: Quality, budget: str) -> list[Answer]:
    result = []
    best = best_of(groups, quality)
    equal = [group for group in groups if group is not best and within_spread(group, best, quality)]
    also = f"; within the spread over seeds: {', '.join(group.label for group in equal)}" if equal else ""
    result.append(
        Answer(f"best {quality.title}, any memory", best.label, _figure(best, quality) + also, f"runs, {budget}")
    )
    states = [(group.mean("state_bytes"), group.mean(quality.key)) for group in groups]
    front = on_front([(state, y if quality.more_is_better else -y) for state, y in states])
    kept = [(state, group) for (state, _), group, is_front in zip(states, groups, front, strict=True) if is_front]
    for state, group in sorted(kept, key=lambda pair: pair[0]):
        if group is not best:
            question = f"best {quality.title} with {memory(state)} of state per sequence or little more"
            result.append(Answer(question, group.label, _figure(group, quality), f"runs, {budget}"))
    smallest = min([best, *equal], key=lambda group: group.mean("state_bytes"))
    none = "no other is as good within the spread over seeds" if len(best.runs) > 1 else "one seed has no spread"
    why = memory(smallest.mean("state_bytes")) + ("" if equal else f"; {none}")
    question = f"least state at {quality.title} equal to the best within the spread over seeds"
    return [*result, Answer(question, smallest.label, why, f"runs, {budget}")]


def budget_of(groups: Sequence[Group]) -> str:
    """The training tokens and the context of the runs, in words."""
    runs = [run for group in groups for run in group.runs]
    tokens = sorted({int(run.summary["tokens"]) for run in runs})
    contexts = sorted({int(run.summary["context"]) for run in runs if run.summary.get("context")})
    budget = count(tokens[0]) + (f" to {count(tokens[-1])}" if len(tokens) > 1 else "") + " training tokens"
    return budget + (f" and a context of {' or '.join(map(length, contexts))}" if contexts else "")


def caption_of(groups: Sequence[Group]) -> str:
    """Model, budget, precision and device of the runs."""
    runs = [run for group in groups for run in group.runs]
    models, devices = (sorted({str(run.summary.get(name) or "") for run in runs}) for name in ("model", "device"))
    precisions = sorted({str(run.config.get("trainer", {}).get("precision") or "") for run in runs})
    parts = ["/".join(models), budget_of(groups), "/".join(precisions), "/".join(devices)]
    return ", ".join(part for part in parts if part)


def _figure(group: Group, quality: Quality) -> str:
    values = group.values(quality.key)
    spread = f" ± {quality.write(statistics.stdev(values))}" if len(values) > 1 else ""
    state = memory(group.mean("state_bytes"))
    return f"{quality.write(statistics.fmean(values))}{spread}, {state} of state per sequence"


def _by_context(found: Sequence[Measurement]) -> list[Answer]:
    """The fastest mixer at each stage, setting and context at which there are several; and the smallest state."""
    result = []
    for stage in ("training step", "prefill", "decode", "kernel"):
        measured = [one for one in found if one.stage == stage and one.tokens_per_s]
        for where, context in dict.fromkeys((one.where, one.context) for one in measured):
            here = [one for one in measured if (one.where, one.context) == (where, context)]
            ranked = sorted(here, key=lambda one: -(one.tokens_per_s or 0))
            if len({one.mixer for one in here}) < 2:
                continue
            first = ranked[0]
            second = next(one for one in ranked if one.mixer != first.mixer)
            ratio = (first.tokens_per_s or 0) / (second.tokens_per_s or 1)
            why = f"{first.tokens_per_s:,.0f} tokens/s, {ratio:.2f} times {second.series}"
            question, rivals = f"fastest {stage}", len({one.mixer for one in here})
            result.append(Answer(question, first.series, why, where, context, rivals))
            of_state = [one for one in here if one.memory]
            if stage == "decode" and len(of_state) > 1:
                smallest = min(of_state, key=lambda one: one.memory or 0)
                size = memory(smallest.memory or 0)
                result.append(Answer("least state of one sequence", smallest.series, size, where, context, rivals))
    return result


def summary(groups: Sequence[Group], found: Sequence[Measurement], quality: Quality | None) -> list[str]:
    """What to choose, a paragraph each: by accuracy and memory, by speed at the longest context, and KDA or softmax."""
    parts = by_data(groups)
    said = [_said_of_accuracy(same, quality, _budget(same, data, parts)) for data, same in parts.items() if quality]
    said += [_said_of_speed(found), _said_of_crossings(found)]
    return [paragraph for paragraph in said if paragraph]


def _said_of_accuracy(groups: Sequence[Group], quality: Quality, budget: str) -> str:
    best, *others = _by_accuracy(groups, quality, budget)
    if len(groups) == 1:
        return f"With {budget}, {best.mixer} is the only model: its {quality.title} is {best.why}."
    said = [f"With {budget}, choose {best.mixer}: its {quality.title} is the best, {best.why}."]
    smaller = [answer for answer in others if "or little more" in answer.question]
    if smaller:  # from the largest state to the smallest
        choices = "; ".join(f"{answer.mixer}, {answer.why}" for answer in reversed(smaller))
        said.append(f"If memory is short, choose {choices}.")
    equal = [answer for answer in others if answer.question.startswith("least state") and "; " not in answer.why]
    return " ".join([*said, *(f"The least state at equal accuracy: {answer.mixer}, {answer.why}." for answer in equal)])


def _said_of_speed(found: Sequence[Measurement]) -> str:
    """Of each stage at the longest of the contexts at which most mixers were measured."""
    fastest = [answer for answer in _by_context(found) if answer.question.startswith("fastest")]
    said = []
    for stage in ("training step", "prefill", "decode"):
        of_stage = [answer for answer in fastest if answer.question == f"fastest {stage}"]
        if of_stage:
            most = max(of_stage, key=lambda answer: (answer.rivals, answer.context))
            said.append(f"{most.question} at {length(most.context)}: {most.mixer}, {most.why} ({most.of})")
    return f"F{'; '.join(said)[1:]}." if said else ""


def _said_of_crossings(found: Sequence[Measurement]) -> str:
    """Where lkda's KDA overtakes softmax attention."""
    measured = {one.where: one for one in found if one.tokens_per_s}
    usual = max(devices := [one.device for one in measured.values()], key=devices.count) if measured else ""
    between = [pair for pair in pairs(found) if pair.own and set(pair.mixers) == {"kda", "softmax"}]
    said = []
    for mixer, other in (("kda", "softmax"), ("softmax", "kda")):
        overtakes, always = [], []
        for pair in (pair for pair in between if pair.mixers[0] == mixer):
            setting = measured[pair.where].setting
            place = f"{pair.stage}, {setting.partition(',')[0] if pair.stage == 'kernel' else setting}"
            place += "" if measured[pair.where].device == usual else f", {measured[pair.where].device}"
            if pair.shortest == pair.longest:
                always.append(f"{place} (at {length(pair.longest)} alone)")
            elif pair.context is None:
                always.append(f"{place} ({length(pair.shortest)} to {length(pair.longest)})")
            else:
                overtakes.append(f"{rounded(pair.context)} ({place})")
        if overtakes:
            said.append(f"{mixer} is faster than {other} from a context of about {', '.join(overtakes)}.")
        if always:
            said.append(f"At every context that was measured, {mixer} is faster than {other}: {'; '.join(always)}.")
    return " ".join(dict.fromkeys(said))
