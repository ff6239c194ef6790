"""The sentences below a table of runs: devices, splits, what differs between the rows, seeds, times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lkda.report.operators import benchmark as bench
from lkda.report.read.groups import Group, also_differing
from lkda.report.read.runs import Run
from lkda.report.tradeoff.records import by_data
from lkda.report.training import table

MOST_NAMED = 5  # in a note


def notes(
    runs: Sequence[Run],
    groups: Sequence[Group],
    *,
    across_tokenizers: bool,
    exclusive_device: bool,
    benchmark: bench.Benchmark | None,
) -> list[str]:
    """The sentences in their order.

    Args:
        groups: the runs by row of the table.
        across_tokenizers: whether only bits per byte can be compared.
        exclusive_device: whether no run shared its device with another process.
        benchmark: the operators' times, if the table has them.
    """
    devices = sorted({str(run.summary.get("device", "an unnamed device")) for run in runs})
    found = [f"{len(runs)} run{'s' if len(runs) > 1 else ''} on {'; '.join(devices)}."]
    found += [*_of_splits(runs), *_of_steps(runs)]
    if len(devices) > 1:
        found.append("The devices differ, so times and tokens/s cannot be compared.")
    found += [*_of_settings(runs, groups, across_tokenizers), *_of_seeds(groups), *_of_state(runs)]
    return found + _of_times(groups, exclusive_device, benchmark)


def _of_splits(runs: Sequence[Run]) -> list[str]:
    tested = sum("test/loss" in run.summary for run in runs)
    if tested == len(runs):
        return [
            "Columns named test are of the test split, which is measured once, at the end of a run. Other losses of "
            "the table are of the validation split, and each chart names its split."
        ]
    if not tested:
        return []
    have = "have" if tested > 1 else "has"
    return [
        f"{tested} of the {len(runs)} runs {have} a test split. Columns not named test are of the validation split."
    ]


def _of_steps(runs: Sequence[Run]) -> list[str]:
    """If the runs are compared before their end."""
    steps = sorted({run.summary["at_step"] for run in runs if "at_step" in run.summary})
    if not steps:
        return []
    planned = sorted({run.config["trainer"]["max_steps"] for run in runs})
    ended = sum(run.summary["status"] == "finished" for run in runs) or "none"
    return [
        f"Read at the validation of step {' and '.join(map(str, steps))} of {' and '.join(map(str, planned))}; "
        f"{ended} of the runs finished."
    ]


def _of_settings(runs: Sequence[Run], groups: Sequence[Group], across_tokenizers: bool) -> list[str]:
    found, data = [], list(by_data(groups))
    found += [
        f"{group.label} without a setting has {', '.join(group.unnamed)}."
        for group in groups
        if group.unnamed and group.label == group.mixer
    ]
    if len(data) > 1:
        found.append(f"The data differ: {'; '.join(data)}. Only rows of the same data can be compared.")
    elif across_tokenizers:
        found.append("The tokenizers differ, so compare bits per byte and not the loss per token.")
        found.append("If the texts differ too, as where a corpus was prepared with other sources, compare neither.")
    differing = also_differing(runs)
    if differing:
        found.append(f"Besides the mixer, these settings differ between the rows: {', '.join(differing)}.")
    return found


def _of_seeds(groups: Sequence[Group]) -> list[str]:
    found = ["± is the standard deviation over seeds."] if any(len(group.runs) > 1 for group in groups) else []
    again = [
        f"{group.label} (seed {seed}, {times} times)"
        for group in groups
        for seed, times in Counter(run.summary.get("seed") for run in group.runs).items()
        if seed is not None and times > 1
    ]
    if again:
        found.append(
            f"Of these rows, runs have the same seed and settings: {'; '.join(again[:MOST_NAMED])}"
            f"{f'; and {len(again) - MOST_NAMED} more' if len(again) > MOST_NAMED else ''}. If they are copies of "
            "one run, the spread over seeds is too small."
        )
    return found


def _of_state(runs: Sequence[Run]) -> list[str]:
    if not all(str(run.summary.get("precision", "")).endswith(("-mixed", "32-true")) for run in runs):
        return []
    return [
        "The column state is for one sequence as long as the training context, in float32. In bf16, the caches of "
        "keys, values and convolutions take half of that, and recurrent states stay in float32."
    ]


def _of_times(groups: Sequence[Group], exclusive_device: bool, benchmark: bench.Benchmark | None) -> list[str]:
    found = [] if exclusive_device else ["Runs shared a device, so times are not compared."]
    seconds = table.equal_wall_clock(groups) if exclusive_device else None
    if seconds is not None:
        found.append(
            f"Equal wall-clock: after {seconds:.1f} s of training at the median speed of each run, when the first run "
            "ended, interpolated linearly between validations. Each run had its device to itself."
        )
    timed, times = bench.kernel_times(benchmark.rows) if benchmark else ("", {})
    if benchmark and any(group.mixer in times for group in groups):
        found.append(f"kernel ms: the time of the operator, {timed}, on {benchmark.device}.")
    return found
