"""Joins groups of runs with measurements: accuracy beside speed and memory, the Pareto front, and courses."""

from __future__ import annotations

import math
import re
import shlex
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lkda.report.draw.curves import ENOUGH, mean_curve, points, running_mean
from lkda.report.draw.units import count, length
from lkda.report.read.groups import Group, also_differing, settings
from lkda.report.read.runs import Run, reported_split
from lkda.report.tradeoff.host_bound import comparable
from lkda.report.tradeoff.measurements import OF_MODELS, STAGES, Measurement

Record = dict[str, Any]
LOGGED = "training, as the runs logged it"
MEAN = "mean over seeds"
MOST_POINTS, FEWEST_POINTS = 2000, 10  # of all curves of training in a chart, and of one of them
MOST_SEEDS = 8  # that a tooltip names
KEYS = ("val/accuracy", *(f"{split}/{what}" for split in ("val", "test") for what in ("bits_per_byte", "loss")))
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
    """Bits per byte for runs of text, accuracy for synthetic tasks, and the loss where both occur. `by_quality` parts
    groups so that both do not occur."""
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

    None where either has one seed, so that there is no spread, unless both are equal.
    """
    difference = abs(group.mean(quality.key) - best.mean(quality.key))
    if difference == 0:
        return True
    if len(group.runs) < 2 or len(best.runs) < 2:
        return None
    spread = max(statistics.stdev(one.values(quality.key)) for one in (group, best))
    return difference <= spread


def best_of(groups: Sequence[Group], quality: Quality) -> Group:
    """The group with the best mean. Of several with the same mean, the one with the least state."""
    sign = -1 if quality.more_is_better else 1
    return min(groups, key=lambda group: (sign * group.mean(quality.key), group.mean("state_bytes")))


def ties(groups: Sequence[Group], best: Group, quality: Quality) -> list[Group]:
    """The other groups whose mean is that of the best: to the last digit, as accuracies of 0% and 100% often are."""
    return [one for one in groups if one is not best and one.mean(quality.key) == best.mean(quality.key)]


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


def by_quality(groups: Sequence[Group]) -> list[tuple[Quality, list[Group]]]:
    """What says how good a model is, for each data set; data sets for which it is the same stand together, those of
    text first."""
    qualities: dict[str, Quality] = {}
    found: dict[str, list[Group]] = defaultdict(list)
    for same in by_data(groups).values():
        quality = quality_of(same)
        found[qualities.setdefault(quality.key, quality).key] += same
    return [(qualities[key], found[key]) for key in sorted(found, key=lambda key: qualities[key].more_is_better)]


def _data_of(run: Run) -> str:
    """The name of the data; of files, which all have one name, with their paths."""
    name, data = str(run.summary.get("data", "unnamed data")), run.config.get("data") or {}
    paths = data.get("val_paths") or data.get("paths")
    return f"{name} ({', '.join(map(str, paths)) if isinstance(paths, list) else paths})" if paths else name


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
    if exclusive_device and of_one_device(groups):
        logged = [(group, lambda run: float(run.summary["tokens_per_s"])) for group in groups]
        records += _points(logged, quality, setting=LOGGED, more_x_is_better=True)
    for measured in measured_speeds(groups, found):
        speeds = [(group, _constant(speed)) for group, speed in measured.of]
        setting = f"{measured.stage} at a context of {length(measured.context)}: {measured.where}"
        records += _points(speeds, quality, setting=setting, more_x_is_better=True)
    return records


@dataclass(frozen=True)
class MeasuredSpeeds:
    """The speeds of trained models in one benchmark.

    Attributes:
        stage, where, context: as in `Measurement`.
        of: groups with the tokens/s of their mixer and model.
    """

    stage: str
    where: str
    context: int
    of: Sequence[tuple[Group, float]]


def measured_speeds(groups: Sequence[Group], found: Sequence[Measurement]) -> list[MeasuredSpeeds]:
    """Those of each benchmark of at least two of the models with the runs' mixer and model, by stage and context."""
    usable = comparable(found)
    settings_found = {(one.stage, one.where, one.context) for one in usable if one.stage in OF_MODELS}
    result = []
    for stage, where, context in sorted(settings_found, key=lambda found: (STAGES.index(found[0]), *found[1:])):
        here = [one for one in usable if (one.stage, one.where, one.context) == (stage, where, context)]
        of = [(group, speed) for group in groups if (speed := speed_of(group, here)) is not None]
        if len(of) > 1:
            result.append(MeasuredSpeeds(stage, where, context, of))
    return result


def of_one_device(groups: Sequence[Group]) -> bool:
    """Whether all runs had the same kind of device, so that their speeds can be compared."""
    return len({run.summary.get("device") for group in groups for run in group.runs}) == 1


def of_other_models(groups: Sequence[Group], found: Sequence[Measurement]) -> list[str]:
    """A sentence where the vocabularies of the trained and of the measured models differ."""
    models = {group.runs[0].summary.get("model") for group in groups}
    runs = [run for group in groups for run in group.runs]
    trained = {int(size) for run in runs if (size := (run.config.get("model") or {}).get("vocab_size"))}
    measured = {one.vocab_size for one in found if one.model in models and one.vocab_size}
    if not trained or not measured or trained == measured:
        return []
    theirs, others = (" or ".join(f"{size:,}" for size in sorted(sizes)) for sizes in (trained, measured))
    return [
        f"The accuracy is of models with a vocabulary of {theirs}, and the benchmarks' speeds are with one of {others}."
    ]


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
    parts = by_data(groups)
    for data, same in parts.items():
        states = [(group, lambda run: float(run.summary["state_bytes"])) for group in same]
        records += _points(states, quality, setting=data if len(parts) > 1 else "", more_x_is_better=False)
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
        seeds = ", ".join(str(run.summary.get("seed", "")) for run in group.runs[:MOST_SEEDS])
        seeds += f", ... ({len(group.runs)} in all)" if len(group.runs) > MOST_SEEDS else ""
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
    precision = (config.get("trainer") or {}).get("precision") or summary.get("precision")
    found += [str(precision)] if precision else []
    return ", ".join([*found, str(summary.get("device", "an unnamed device"))])


def reproduce(group: Group, groups: Sequence[Group]) -> str:
    """The command that trains the runs of a row again; where it is not recorded, with what tells rows apart.

    Above it stands the command that prepares a mix of public texts, which refuses to do it twice.
    """
    data = group.runs[0].config.get("data") or {}
    command = _of_seeds([_train(run, groups) for run in group.runs])
    mix = _PREPARED.get(str(data.get("source")))
    return command if mix is None or data.get("directory") else f"{mix}  # once\n{command}"


def _of_seeds(commands: Sequence[str]) -> str:
    """One command for those that differ only in the seed, else each in a line of its own. Without it, the seed is 1."""
    bare = {_SEED.sub("", command) for command in commands}
    seeds = dict.fromkeys(found[1] if (found := _SEED.search(command)) else "1" for command in commands)
    if len(bare) > 1 or len(seeds) == 1:
        return "\n".join(dict.fromkeys(commands))
    command, comment, rest = bare.pop().partition("  # ")
    return f"{command.replace('train.py ', 'train.py -m ', 1)} seed={','.join(seeds)}{comment}{rest}"


_SEED = re.compile(r" seed=(\d+)")


def _train(run: Run, groups: Sequence[Group]) -> str:
    if COMMAND in run.summary:
        return str(run.summary[COMMAND])
    known = settings(run)
    runs = [one for other in groups for one in other.runs]
    words = [f"{name}={known[key]}" for name, key in _CHOICES if known.get(key)]
    differing = [key for key in also_differing(runs) if "." in key and key not in dict(_CHOICES).values()]
    words += [f"{key}={known[key]}" for key in differing if key in known]
    seed = run.summary.get("seed")
    words += [] if seed is None else [f"seed={seed}"]
    steps = (run.config.get("trainer") or {}).get("max_steps")
    return shlex.join(["python", "scripts/train.py", *words, *([f"trainer.max_steps={steps}"] if steps else [])])


_PREPARED = {"prose": "python scripts/prepare_data.py", "code": "python scripts/prepare_data.py mix=code"}
_PREPARED |= {"english": "python scripts/prepare_data.py mix=english path=NOVELS"}
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
        course, steps = mean_curve([run], x, y), sorted(points(run, x, y))
        every = 1
        if y.startswith("train/"):
            course, every = running_mean(course), math.ceil(len(course.x) / most) or 1
        about = {"series": group.label, "mixer": group.mixer, "run": run.name}
        about |= {"seed": str(run.summary.get("seed", "")), "configuration": configuration(run)}
        line = list(zip(course.x, course.y, steps, strict=True))[::-every][::-1]  # with the last
        records += [{"x": x, "y": y, "step": step, **about} for x, y, step in line]
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
    precisions = sorted({str((run.config.get("trainer") or {}).get("precision") or "") for run in runs})
    parts = ["/".join(models), budget_of(groups), "/".join(precisions), "/".join(devices)]
    return ", ".join(part for part in parts if part)
