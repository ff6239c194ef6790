"""What the page answers: the best mixer by accuracy and memory, the fastest by context, and both in words."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lkda.report.draw.units import length, memory
from lkda.report.read.groups import Group
from lkda.report.tradeoff.host_bound import comparable
from lkda.report.tradeoff.kda_or_softmax import said_of_crossings
from lkda.report.tradeoff.measurements import OF_MODELS, Measurement
from lkda.report.tradeoff.records import (
    Quality,
    best_of,
    budget_of,
    by_data,
    on_front,
    quality_of,
    ties,
    within_spread,
)

_WITH_LESS = "within the spread over seeds, with less state"


@dataclass(frozen=True)
class Answer:
    """A question that the page is for, and the mixer that answers it.

    Attributes:
        question, mixer: in words.
        why: the figures.
        of: where they are from.
        context: that of a measurement, or of the training; 0 where there are several.
        rivals: the number of mixers that lkda was measured with.
    """

    question: str
    mixer: str
    why: str
    of: str
    context: int = 0
    rivals: int = 0


def answers(groups: Sequence[Group], found: Sequence[Measurement]) -> list[Answer]:
    """The best by accuracy at each limit of memory, and the fastest and the smallest at each context."""
    parts = by_data(groups)
    of_runs = [_by_accuracy(same, quality_of(same), _budget(same, data, parts)) for data, same in parts.items()]
    return [*(answer for part in of_runs for answer in part), *_by_context(found, _trained(groups))]


def _trained(groups: Sequence[Group]) -> set[str]:
    return {group.mixer for group in groups}


def _budget(groups: Sequence[Group], data: str, parts: Mapping[str, Any]) -> str:
    """The budget of the runs, with their data where there are several."""
    return budget_of(groups) + (f", on {data}" if len(parts) > 1 else "")


def _by_accuracy(groups: Sequence[Group], quality: Quality, budget: str) -> list[Answer]:
    result = []
    contexts = {int(run.summary.get("context") or 0) for group in groups for run in group.runs}
    context = contexts.pop() if len(contexts) == 1 else 0
    best = best_of(groups, quality)
    equal = [group for group in groups if group is not best and within_spread(group, best, quality)]
    same = ties(groups, best, quality)
    near = [group for group in equal if group not in same]
    also = f"; the same, with no less state: {_names(same)}" if same else ""
    also += f"; within the spread over seeds: {_names(near)}" if near else ""
    result.append(
        Answer(
            f"best {quality.title}, any memory", best.label, _figure(best, quality) + also, f"runs, {budget}", context
        )
    )
    states = [(group.mean("state_bytes"), group.mean(quality.key)) for group in groups]
    front = on_front([(state, y if quality.more_is_better else -y) for state, y in states])
    kept = [(state, group) for (state, _), group, is_front in zip(states, groups, front, strict=True) if is_front]
    for state, group in sorted(kept, key=lambda pair: pair[0]):
        if group is not best:
            question = f"best {quality.title} with at most {memory(state)} of state per sequence"
            equal_with_less = [one for less, one in kept if less < state and within_spread(one, group, quality)]
            why = _figure(group, quality) + (f"; {_WITH_LESS}: {_names(equal_with_less)}" if equal_with_less else "")
            result.append(Answer(question, group.label, why, f"runs, {budget}", context))
    for group, is_front in zip(groups, front, strict=True):
        if not is_front:
            as_good = [one for _, one in kept if not quality.better(group.mean(quality.key), one.mean(quality.key))]
            least = min(as_good, key=lambda one: one.mean("state_bytes"))
            question = f"least state at {quality.title} of {group.label} or better"
            why = f"{_figure(least, quality)}; {group.label} has {_figure(group, quality)}"
            result.append(Answer(question, least.label, why, f"runs, {budget}", context))
    smallest = min([best, *equal], key=lambda group: group.mean("state_bytes"))
    none = "no other is as good within the spread over seeds" if len(best.runs) > 1 else "one seed has no spread"
    why = memory(smallest.mean("state_bytes")) + ("" if equal else f"; {none}")
    question = f"least state at {quality.title} equal to the best within the spread over seeds"
    return [*result, Answer(question, smallest.label, why, f"runs, {budget}", context)]


def _names(groups: Sequence[Group]) -> str:
    return ", ".join(group.label for group in groups)


def _figure(group: Group, quality: Quality) -> str:
    values = group.values(quality.key)
    spread = f" ± {quality.write(statistics.stdev(values))}" if len(values) > 1 else ""
    state = memory(group.mean("state_bytes"))
    return f"{quality.write(statistics.fmean(values))}{spread}, {state} of state per sequence"


def _by_context(found: Sequence[Measurement], trained: set[str]) -> list[Answer]:
    """The fastest mixer at each stage, setting and context at which lkda has several; and the smallest state.

    Args:
        trained: the mixers of the runs. Answers about models say where some of these, or of those of other
            measurements of models, were not measured.
    """
    result = []
    models = trained | _mixers([one for one in found if one.stage in OF_MODELS])
    for stage in ("training step", "prefill", "decode", "kernel"):
        measured = [one for one in comparable(found) if one.stage == stage and one.tokens_per_s]
        known = models if stage in OF_MODELS else _mixers(measured)
        for where, context in dict.fromkeys((one.where, one.context) for one in measured):
            here = [one for one in measured if (one.where, one.context) == (where, context)]
            if len(_mixers(here)) < 2:
                continue
            why = _of_fastest(first := max(here, key=_speed), here)
            rivals = len(_mixers(here))
            result.append(Answer(f"fastest {stage}", first.series, why + _among(here, known), where, context, rivals))
            of_state = [one for one in here if one.memory]
            if stage == "decode" and len(_mixers(of_state)) > 1:
                smallest = min(of_state, key=lambda one: one.memory or 0)
                why = memory(smallest.memory or 0) + _among(of_state, known)
                result.append(Answer("least state of one sequence", smallest.series, why, where, context, rivals))
    return result


def _of_fastest(first: Measurement, here: Sequence[Measurement]) -> str:
    """Its speed, beside that of the fastest measurement of another mixer."""
    second = max((one for one in here if one.mixer != first.mixer), key=_speed)
    noisy = " (noisy)" if first.noisy or second.noisy else ""
    return f"{_speed(first):,.0f} tokens/s, {_speed(first) / _speed(second):.2f} times {second.series}{noisy}"


def _speed(one: Measurement) -> float:
    return float(one.tokens_per_s or 0)


def _mixers(found: Sequence[Measurement]) -> set[str]:
    """Those that lkda itself was measured with."""
    return {one.mixer for one in found if not one.peer}


def _among(here: Sequence[Measurement], known: set[str]) -> str:
    """How many of the mixers were measured, where it is not all."""
    several = len(_mixers(here))
    return f"; only {several} of {len(known)} mixers were measured" if several < len(known) else ""


def summary(groups: Sequence[Group], found: Sequence[Measurement]) -> list[str]:
    """What to choose, a paragraph each: by accuracy and memory, by speed at the longest context, and KDA or softmax."""
    parts = by_data(groups)
    said = [_said_of_accuracy(same, quality_of(same), _budget(same, data, parts)) for data, same in parts.items()]
    said += [_said_of_speed(found, _trained(groups)), said_of_crossings(found)]
    return [paragraph for paragraph in said if paragraph]


def _said_of_accuracy(groups: Sequence[Group], quality: Quality, budget: str) -> str:
    best, *others = _by_accuracy(groups, quality, budget)
    if len(groups) == 1:
        return f"With {budget}, {best.mixer} is the only model: its {quality.title} is {best.why}."
    value = quality.write(groups[0].mean(quality.key))
    if len(ties(groups, groups[0], quality)) == len(groups) - 1:
        every = "both" if len(groups) == 2 else f"all {len(groups)}"
        return (
            f"With {budget}, {every} models have the same {quality.title}, {value}, so it does not say which "
            f"to choose. The least state: {_least_state(groups)}."
        )
    said = [f"With {budget}, choose {best.mixer}: it has the best {quality.title} ({best.why})."]
    smaller = [one for one in others if "with at most" in one.question and _WITH_LESS not in one.why]
    if smaller:  # from the largest state to the smallest
        choices = " or ".join(f"{answer.mixer} ({answer.why})" for answer in reversed(smaller))
        said.append(f"If memory is short, choose {choices}.")
    if any(len(group.runs) < 2 for group in groups):
        said.append("Models with one seed have no spread over seeds, so small differences from them may be chance.")
    equal = [answer for answer in others if "equal to the best" in answer.question and "; " not in answer.why]
    return " ".join([*said, *(f"The least state at equal accuracy: {answer.mixer}, {answer.why}." for answer in equal)])


def _least_state(groups: Sequence[Group]) -> str:
    least = min(group.mean("state_bytes") for group in groups)
    return f"{_names([one for one in groups if one.mean('state_bytes') == least])}, {memory(least)} per sequence"


def _said_of_speed(found: Sequence[Measurement], trained: set[str]) -> str:
    """Of each stage at the longest of the contexts at which most mixers were measured."""
    fastest = [answer for answer in _by_context(found, trained) if answer.question.startswith("fastest")]
    said = []
    for stage in ("training step", "prefill", "decode"):
        of_stage = [answer for answer in fastest if answer.question == f"fastest {stage}"]
        if of_stage:
            most = max(of_stage, key=lambda answer: (answer.rivals, answer.context))
            said.append(f"{most.question} at {length(most.context)}: {most.mixer}, {most.why} ({most.of})")
    return f"F{'; '.join(said)[1:]}." if said else ""
