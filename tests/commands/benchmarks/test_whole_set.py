"""scripts/benchmark.py without arguments: the whole set, in parts that are not measured twice."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lkda.bench import measure, ops
from lkda.bench.op_benchmark import Shape
from lkda.commands import benchmark as benchmark_command
from lkda.commands.benchmarks import whole_set
from lkda.commands.benchmarks.decode_benchmark import cases_of as decode_cases
from lkda.commands.benchmarks.step_benchmark import cases_of as step_cases
from lkda.commands.benchmarks.whole_set import ON_CPU, ON_GPU, STATE, Part, measure_whole_set
from lkda.commands.command_line.errors import CommandError
from lkda.commands.entry_point import run_script
from lkda.commands.settings.config import resolve
from lkda.device import device_name
from tests.commands.small import composed
from tests.report.conftest import bench_row
from tests.report.conftest import undrawn as undrawn  # a fixture
from tests.report.tradeoff.conftest import decode_row, write_results

CPU = torch.device("cpu")
PARTS = [Part("first", "op", {"ops": ["kda"]}, 1), Part("second", "decode", {"batches": [2]}, 3)]


class Measure:
    """Writes what the two parts would, and remembers what was asked for."""

    def __init__(self, *, fail: str = "") -> None:
        self.asked: list[dict[str, Any]] = []
        self.fail = fail

    def __call__(self, settings: dict[str, Any]) -> None:
        self.asked.append(settings)
        out = Path(settings["out"])
        if out.name == self.fail:
            raise CommandError("nothing was measured: out of memory")
        if settings["task"] == "op":
            rows = [
                bench_row(op, B=1, T=T, ms=ms, gate=None)
                for op, ms in (("kda", 2.0), ("simplified", 1.0))
                for T in (64, 128)
            ]
            write_results(out / "benchmark.json", "benchmark", rows)
        else:
            write_results(out / "decode.json", "decode", [decode_row("kda", 1024, 10.0)])

    @property
    def names(self) -> list[str]:
        return [Path(settings["out"]).name for settings in self.asked]


def settings(out: Path, **changes: Any) -> dict[str, Any]:
    return resolve(composed("benchmark")) | {"out": str(out)} | changes


@pytest.mark.usefixtures("undrawn")
def test_every_part_is_measured_once(tmp_path, capsys):
    first, second = Measure(), Measure()
    measure_whole_set(settings(tmp_path), CPU, first, PARTS)
    assert first.names == ["first", "second"]
    assert [asked["task"] for asked in first.asked] == ["op", "decode"]
    assert first.asked[1]["batches"] == [2]
    assert set(json.loads((tmp_path / STATE).read_text())["parts"]) == {"first", "second"}
    page = (tmp_path / "report.html").read_text()
    assert "simplified is faster from 64 to 128" in page
    shown = capsys.readouterr().out
    assert "[..] part 1 of 2: first, about 1 min; all that is left, about 4 min" in shown
    assert "[#.] part 2 of 2: second" in shown
    measure_whole_set(settings(tmp_path), CPU, second, PARTS)
    assert second.names == []


@pytest.mark.long
def test_a_part_whose_results_were_removed_is_measured_again(tmp_path):
    measure_whole_set(settings(tmp_path), CPU, Measure(), PARTS)
    (tmp_path / "first" / "benchmark.json").unlink()
    again = Measure()
    measure_whole_set(settings(tmp_path), CPU, again, PARTS)
    assert again.names == ["first"]


@pytest.mark.long
def test_a_part_that_failed_is_measured_again_and_costs_no_other(tmp_path):
    with pytest.raises(CommandError, match=r"not measured: first: nothing was measured: out of memory .*out="):
        measure_whole_set(settings(tmp_path), CPU, Measure(fail="first"), PARTS)
    again = Measure()
    measure_whole_set(settings(tmp_path), CPU, again, PARTS)
    assert again.names == ["first"]


def test_what_a_package_raises_in_a_part_costs_no_other(tmp_path, capsys):
    def out_of_memory(part: dict[str, Any]) -> None:
        if part["task"] == "op":
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
        Measure()(part)

    with pytest.raises(CommandError, match="not measured: first: OutOfMemoryError: CUDA out of memory"):
        measure_whole_set(settings(tmp_path), CPU, out_of_memory, PARTS)
    assert set(json.loads((tmp_path / STATE).read_text())["parts"]) == {"second"}
    assert "in out_of_memory" in capsys.readouterr().out  # the traceback


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_an_interrupted_set_goes_on_with_the_part_that_it_was_in(tmp_path, capsys):
    def interrupted(part: dict[str, Any]) -> None:
        if part["task"] == "decode":
            raise KeyboardInterrupt
        Measure()(part)

    with pytest.raises(KeyboardInterrupt):
        measure_whole_set(settings(tmp_path), CPU, interrupted, PARTS)
    shown = capsys.readouterr().out
    assert f"1 of 2 parts in 0.0 min; the page is {tmp_path}/report.html." in shown
    assert "stopped in the part second; continue with: " in shown
    assert "simplified is faster from 64 to 128" in (tmp_path / "report.html").read_text()
    again = Measure()
    measure_whole_set(settings(tmp_path), CPU, again, PARTS)
    assert again.names == ["second"]


@pytest.mark.long
def test_a_limit_of_minutes_begins_no_part_that_would_end_after_it(tmp_path, monkeypatch, capsys):
    clock = iter(range(0, 100_000, 30))  # half a minute from one look to the next
    monkeypatch.setattr(whole_set.time, "perf_counter", lambda: float(next(clock)))
    measured = Measure()
    measure_whole_set(settings(tmp_path, minutes=2), CPU, measured, PARTS)
    assert measured.names == ["first"]
    assert "the other parts are measured by:" in capsys.readouterr().out
    measure_whole_set(settings(tmp_path, minutes=0.001), CPU, measured, PARTS)  # the first part is always measured
    assert measured.names == ["first", "second"]


@pytest.mark.usefixtures("undrawn")
def test_parts_that_were_fast_do_not_promise_that_a_later_one_is(tmp_path, monkeypatch):
    """The first part takes a tenth of its estimate. The second one's estimate is above what is left all the same."""
    clock = iter([0.0, 0.0, 0.0, 6.0, 6.0])
    monkeypatch.setattr(whole_set.time, "perf_counter", lambda: next(clock))
    measured = Measure()
    measure_whole_set(settings(tmp_path, minutes=3), CPU, measured, PARTS)
    assert measured.names == ["first"]


def test_results_of_another_device_or_of_something_else_are_not_touched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty and holds no parts.json: give a new directory"):
        measure_whole_set(settings(tmp_path), CPU, Measure(), PARTS)
    state = {"kind": "measurements", "device": "a GPU", "parts": {}}
    (tmp_path / STATE).write_text(json.dumps(state))
    with pytest.raises(ValueError, match=f"holds results of a GPU, and this is {device_name(CPU)[:8]}"):
        measure_whole_set(settings(tmp_path), CPU, Measure(), PARTS)


def test_a_directory_that_cannot_be_used_is_refused_before_anything_is_measured(tmp_path):
    (tmp_path / "file").write_text("mine")
    measured = Measure()
    with pytest.raises(ValueError, match=r"cannot write the directory .*/file/new: Not a directory"):
        measure_whole_set(settings(tmp_path / "file" / "new"), CPU, measured, PARTS)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for parts in ('"parts": {"first": "fast"}', '"part": {}'):
        (damaged / STATE).write_text(f'{{"kind": "measurements", "device": "{device_name(CPU)}", {parts}}}')
        with pytest.raises(ValueError, match=r"parts.json is damaged: it holds a value of a wrong kind"):
            measure_whole_set(settings(damaged), CPU, measured, PARTS)
    assert measured.asked == []


@pytest.mark.parametrize("parts", [pytest.param(ON_GPU, marks=pytest.mark.slow), ON_CPU])
def test_the_options_of_every_part_are_known(parts):
    for part in parts:
        assert part.minutes < 10
        found = settings(Path("out"), **part.options, task=part.task)
        assert set(part.options) <= set(resolve(composed("benchmark")))
        if part.task == "op":
            names = ("dtypes", "backends", "peers", "modes", "replays", "gates")
            shapes = [Shape.parse(text) for text in found["shapes"]]
            cases = measure.cases([ops.find(op) for op in found["ops"]], shapes, *(found[name] for name in names))
        elif part.task in ("step", "decode"):
            cases = step_cases(found) if part.task == "step" else decode_cases(found, CPU)
        else:
            cases = [part.task] * (part.task == "notes" and not part.options)  # a fixed table
        assert cases
        if parts is ON_CPU and part.task == "op":  # one of lkda's has no kernels of CUDA in it
            assert not [case for case in cases if case.benchmark.op == "kda_layer" and case.name == "torch"]
    assert sum(part.minutes for part in parts) <= (25 if parts is ON_GPU else 10)


@pytest.mark.parametrize(
    ("arguments", "task"),
    [((), "all"), (("minutes=9",), "all"), (("ops=[kda]",), "op"), (("task=all",), "all"), (("peers=[sdpa]",), "op")],
)
def test_without_options_of_operators_the_whole_set_is_measured(arguments, task, tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(benchmark_command, "measure_whole_set", lambda *given: called.append("all"))
    monkeypatch.setattr(benchmark_command, "_benchmark_operators", lambda *given: called.append("op"))
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "device=cpu", f"out={tmp_path}/new", *arguments])
    run_script("benchmark")
    assert called == [task]
