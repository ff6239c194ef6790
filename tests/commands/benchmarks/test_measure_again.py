"""The command beside each measurement of the page measures that row again."""

from __future__ import annotations

import shlex

import pytest
import torch

from lkda.bench import measure, ops
from lkda.bench.op_benchmark import Shape
from lkda.commands.benchmarks.decode_benchmark import cases_of as decode_cases
from lkda.commands.benchmarks.step_benchmark import cases_of as step_cases
from lkda.commands.command_line.overrides import as_typed
from lkda.commands.settings.config import resolve
from lkda.report.tradeoff.measurements import find_results, measurements
from tests.commands.small import ROOT, composed

RESULTS = ROOT / "docs" / "results"
# Every kind of row: peers, packed rows, sampling, dtypes of the state, further settings.
DIRECTORIES = (
    *("kda_by_length_h100", "kda_h100", "kda_layer_h100", "step_small_h200", "step_small_packed_h200"),
    *("step_deterministic_h200", "decode_context_h200", "decode_peers_h200", "decode_top_p_h200", "decode_base_h200"),
)


def settings(command: str) -> dict:
    python, script, *words = shlex.split(command)
    assert (python, script) == ("python", "scripts/benchmark.py")
    return resolve(composed("benchmark", *as_typed(words)))


@pytest.mark.sample(4)
@pytest.mark.parametrize("directory", DIRECTORIES)
def test_the_command_of_a_row_measures_that_row(directory):
    rows = measurements(find_results([RESULTS / directory]))
    commands = {(one.stage, one.series): one for one in rows}  # one of each series
    for (stage, series), one in commands.items():
        found = settings(one.command)
        if found["task"] == "op":
            shapes = [Shape.parse(shape) for shape in found["shapes"]]
            names = ("dtypes", "backends", "peers", "modes", "replays", "gates")
            cases = measure.cases([ops.find(op) for op in found["ops"]], shapes, *(found[name] for name in names))
            assert [case for case in cases if one.context == case.shape.T], one.command
        else:
            cases = step_cases(found) if found["task"] == "step" else decode_cases(found, torch.device("cpu"))
            prefill = ", prefill" * (stage == "prefill")
            assert f"{series}{prefill}" in {case.title for case in cases}, one.command
