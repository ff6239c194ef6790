"""scripts/benchmark.py task=step: rows are measured through training's own loop, and a failed row costs no other."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lkda.checks import InputError
from lkda.commands.benchmark import benchmark
from lkda.commands.benchmarks import step_benchmark as steps
from lkda.commands.benchmarks.row_process import run_child
from lkda.commands.benchmarks.step_benchmark import ROW, StepCase, cases_of, parse_shape
from lkda.commands.benchmarks.step_clock import StepClock, Steps
from lkda.commands.benchmarks.step_row import main, measure
from lkda.commands.command_line.errors import CommandError
from lkda.commands.command_line.overrides import as_typed
from lkda.commands.settings.config import resolve
from lkda.report.redraw import main as redraw
from tests.commands.small import composed

CPU = torch.device("cpu")
# The smallest model; the clock needs 25 steps for a whole row.
TINY = ["model.d_model=16", "model.num_layers=1", "model.mlp_hidden=16", "backend=recurrent"]


def settings(*overrides: str) -> dict[str, Any]:
    return resolve(composed("benchmark", "task=step", "device=cpu", "models=[tiny]", "shapes=[2x16]", *overrides))


def request(word: str, **changes: Any) -> dict[str, Any]:
    case = StepCase("train", "tiny", "softmax", 2, 16, False, 60, False, TINY[:3], 10)
    asked = {"implementation": word, "overrides": case.train_overrides(CPU), "warmup": 10, "timed": 10, "profiled": 5}
    return {**asked, "started": time.time(), **changes}


def test_a_row_is_measured_through_the_loop_of_training() -> None:
    row = measure(request("train"))
    assert row["tokens_per_s"] == pytest.approx(32 / row["step_ms"] * 1000)
    assert row["tokens_per_s_logged"] == pytest.approx(row["tokens_per_s"], rel=0.2)  # by the run's own clock
    assert row["first_step_s"] > 0
    assert row["tflops_per_s"] > 0
    assert row["profile"]["ms"]["matrix products"] > 0
    assert row["profile"]["ms"]["optimizer"] > 0
    mlp, head = 3 * 16 * 16, 60 * 16
    assert row["product_shares"]["head"] / row["product_shares"]["MLP"] == pytest.approx(head / mlp, rel=1e-3)
    assert sum(row["product_shares"].values()) == pytest.approx(1, abs=1e-3)
    assert "profile_reason" not in row
    assert {"reserved_gib", "mfu"}.isdisjoint(row)  # of a GPU


@pytest.mark.slow
@pytest.mark.sample(2)
@pytest.mark.parametrize("word", ["bare", "llama"])
def test_a_row_is_measured_in_a_bare_loop(word: str) -> None:
    if word == "llama":
        pytest.importorskip("transformers")
    row = measure(request(word))
    assert row["tokens_per_s"] == pytest.approx(32 / row["step_ms"] * 1000)
    assert row["profile"]["ms"]["matrix products"] > 0
    assert ("tflops_per_s" in row) == (word == "bare")


def test_only_the_first_step_is_measured_for_cold_caches() -> None:
    row = measure(request("train", timed=0))
    assert set(row) == {"imports_s", "first_step_s"}


def test_packed_rows_are_trained_on() -> None:
    asked = request("train", timed=0)
    asked["overrides"] = ["data.packed=true" if word == "data.packed=false" else word for word in asked["overrides"]]
    assert measure(asked)["first_step_s"] > 0


def test_a_profiler_that_fails_costs_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lkda.commands.benchmarks.step_clock.breakdown", lambda *_, **__: 1 / 0)
    clock = StepClock(Steps(10, 10, 5), tokens_per_step=8, device=CPU)
    assert [step for step in range(1, 26) if clock.after(step)] == [25]
    assert clock.row["profile_reason"].startswith("ZeroDivisionError")
    assert clock.row["tokens_per_s"] > 0


def test_the_speed_is_the_median_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = StepClock(Steps(10, 30, 0), tokens_per_step=100, device=CPU)
    for step in range(1, 41):
        now[0] += {0: 5.0, 1: 0.1, 2: 0.2, 3: 0.9}[(step - 1) // 10]
        done = clock.after(step)
    assert done
    assert clock.row["tokens_per_s"] == pytest.approx(100 / 0.2)
    assert clock.row["noise"] == pytest.approx(4.0)


def test_a_failed_row_says_why(tmp_path: Path) -> None:
    asked = request("fla_kda")
    (tmp_path / "request").write_text(json.dumps(asked))
    with pytest.raises(ValueError, match="fla"):
        main([str(tmp_path / "request"), str(tmp_path / "result")])
    reason = json.loads((tmp_path / "result").read_text())["reason"]
    assert reason.startswith(("peer fla_kda needs the package fla", "peer fla_kda needs a GPU"))


def test_a_row_has_a_time_limit(tmp_path: Path) -> None:
    begun = time.perf_counter()
    row = run_child(ROW, request("train"), 0.2, tmp_path / "log.txt")
    assert time.perf_counter() - begun < 5
    assert row["reason"].startswith("not measured within time_limit=0.2 seconds; the log is ")


# Each mixer is two processes that import torch, one of them with cold caches.
@pytest.mark.long
@pytest.mark.parametrize("mixers", [["kda"], ["kda", "simplified"]])
def test_a_whole_benchmark_in_processes_of_its_own(mixers: list[str], tmp_path: Path) -> None:
    overrides = f"overrides=[{','.join(repr(word) for word in TINY)}]"
    options = ("task=step", "device=cpu", "models=[tiny]", "shapes=[2x16]", "vocab_size=60", "compile=false")
    more = (f"mixers=[{','.join(mixers)}]", "steps=10", "cold=true", "bare=false", overrides, f"out={tmp_path}")
    benchmark(composed("benchmark", *options, *more))
    rows = json.loads((tmp_path / "step_benchmark.json").read_text())["rows"]
    assert [row["mixer"] for row in rows] == mixers
    assert all(row["tokens_per_s"] > 0 and row["cold_first_step_s"] > 0 and row["imports_s"] > 1 for row in rows)
    assert {path.name for path in tmp_path.glob("*.*")} == {
        *("step_benchmark.json", "table.json", "table.md", "tokens_per_s.png", "step_time.png")
    }


class Children:
    """Stands in for the processes: a speed for each case by its name, or a reason."""

    def __init__(self, speeds: dict[str, float], out: Path) -> None:
        self.speeds, self.out = speeds, out
        self.caches: list[set[str]] = []
        self.rows_before: list[int] = []

    def __call__(self, module: str, asked: Any, limit: float, log: Path, *, caches: Any = ()) -> dict[str, Any]:
        assert module == ROW
        self.caches.append(set(caches))
        saved = self.out / "step_benchmark.json"
        self.rows_before.append(len(json.loads(saved.read_text())["rows"]) if saved.exists() else 0)
        speed = self.speeds.get(log.stem.removesuffix("_cold"))
        if speed is None:
            return {"reason": "OutOfMemoryError: CUDA out of memory"}
        timed = {"tokens_per_s": speed, "step_ms": 32_000 / speed} if asked["timed"] else {}
        return {"first_step_s": 2.0, "imports_s": 1.0, **timed}


def run(children: Children, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> dict[str, Any]:
    for name in ("run_child", "run_fork"):
        monkeypatch.setattr(steps, name, children)
    shared = ("task=step", "device=cpu", f"out={children.out}")
    benchmark(composed("benchmark", *shared, *overrides))
    found: dict[str, Any] = json.loads((children.out / "step_benchmark.json").read_text())
    return found


RECORDED = {"tiny_kda_2x16_train": 900.0, "tiny_kda_2x16_bare": 918.0, "tiny_2x16_llama_compiled": 600.0}
SMALL = ("models=[tiny]", "shapes=[2x16]", "mixers=[kda]", "vocab_size=60")


def test_every_row_is_saved_and_a_failed_one_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    children = Children(RECORDED, tmp_path)
    found = run(children, monkeypatch, *SMALL, "peers=[llama]")
    rows = found["rows"]
    names = ["llama", "llama_compiled", "llama_graphs", "train", "bare"]
    assert [row["implementation"] for row in rows] == names
    assert children.rows_before == [0, 1, 2, 3, 4]
    assert [row.get("reason", "")[:11] for row in rows] == ["OutOfMemory", "", "OutOfMemory", "", ""]
    printed = capsys.readouterr().out
    assert "1.50" in printed  # times the compiled Llama
    assert "+2.0%" in printed  # the loop's cost
    before = (tmp_path / "table.md").read_text()
    redraw([str(tmp_path)])
    assert (tmp_path / "table.md").read_text() == before


def test_cold_rows_have_caches_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children = Children(RECORDED, tmp_path)
    rows = run(children, monkeypatch, *SMALL, "cold=true")["rows"]
    caches = {"TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "LKDA_CACHE", "CUDA_CACHE_PATH"}
    assert children.caches == [caches, caches, set()]  # cold and warm, then the bare loop
    assert rows[0]["cold_first_step_s"] == 2.0


def test_nothing_measured_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CommandError, match="nothing was measured: OutOfMemoryError"):
        run(Children({}, tmp_path), monkeypatch, *SMALL)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("speeds", "message"),
    [
        ({"tiny_kda_2x16_train": 856.0, "tiny_kda_2x16_bare": 2000.0}, None),
        (
            {"tiny_kda_2x16_train": 854.0, "tiny_kda_2x16_bare": 918.0},
            r"slower than recorded in .* by more than 5%: tiny_kda_2x16_train \(0.95 times",
        ),
        ({"tiny_kda_2x16_train": 900.0}, r"tiny_kda_2x16_bare \(failed\)"),
    ],
)
def test_a_check_measures_the_recorded_rows_again(
    speeds: dict[str, float], message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(Children(RECORDED, tmp_path / "before"), monkeypatch, *SMALL, "peers=[llama]")
    children = Children(speeds, tmp_path / "now")
    check = f"check={tmp_path}/before"
    if message is None:
        rows = run(children, monkeypatch, check)["rows"]
        assert [row["implementation"] for row in rows] == ["train", "bare"]
        assert rows[0]["vocab_size"] == 60
        return
    with pytest.raises(CommandError, match=message):
        run(children, monkeypatch, check)


def test_a_check_on_another_device_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children = Children(RECORDED, tmp_path)
    run(children, monkeypatch, *SMALL)
    path = tmp_path / "step_benchmark.json"
    path.write_text(path.read_text().replace(steps.device_name(CPU), "NVIDIA H100 80GB HBM3"))
    with pytest.raises(ValueError, match=r"was recorded on NVIDIA H100 80GB HBM3, and this is .* Run the check on"):
        run(children, monkeypatch, f"check={path}")


def drop(record: dict[str, Any], name: str) -> None:
    del record[name]


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no rows": (lambda found: drop(found, "rows"), "is damaged: .*'rows'"),
    "no header": (lambda found: drop(found, "header"), "is damaged: .*'header'"),
    "no device": (lambda found: drop(found["header"], "device"), "is damaged: .*'device'"),
    "rows of numbers": (lambda found: found.update(rows=[1]), "is damaged"),
    "no steps": (lambda found: drop(found["rows"][0], "steps"), "is damaged: .*'steps'"),
    "a speed in words": (lambda found: found["rows"][0].update(tokens_per_s="fast"), "tokens_per_s must be a finite"),
    "no speed": (lambda found: found["rows"][0].update(tokens_per_s=float("nan")), "tokens_per_s must be a finite"),
    "a speed below 0": (lambda found: found["rows"][0].update(tokens_per_s=-900.0), "tokens_per_s must be above 0"),
    "a size in words": (lambda found: found["rows"][0].update(B="2"), "B must be a whole number"),
    "another type": (lambda found: found["rows"][0].update(packed="no"), "packed must be true or false"),
}


@pytest.mark.sample(4)
@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_check_of_a_damaged_file_measures_nothing(
    damage: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(Children(RECORDED, tmp_path / "before"), monkeypatch, *SMALL, "bare=false")
    damage(found)
    (tmp_path / "before/step_benchmark.json").write_text(json.dumps(found))
    children = Children(RECORDED, tmp_path / "now")
    with pytest.raises(InputError, match=message):
        run(children, monkeypatch, f"check={tmp_path}/before")
    assert not children.caches


def test_a_check_does_not_overwrite_what_it_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(Children(RECORDED, tmp_path), monkeypatch, *SMALL)
    recorded = (tmp_path / "step_benchmark.json").read_text()
    with pytest.raises(InputError, match="give another directory"):
        run(Children(RECORDED, tmp_path), monkeypatch, f"check={tmp_path}")
    assert (tmp_path / "step_benchmark.json").read_text() == recorded


def test_bare_loops_alone_are_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the loop of training has no memory left."""
    rows = run(Children({"tiny_kda_2x16_bare": 900.0}, tmp_path), monkeypatch, *SMALL)["rows"]
    assert ["tokens_per_s" in row for row in rows] == [False, True]


@pytest.mark.parametrize(
    ("override", "instead"),
    [
        ("mixer=softmax", "mixers"),
        ("+data.context=4", "shapes"),
        ("trainer.max_steps=3", "steps"),
        ("data=mqar", "shapes"),
    ],
)
def test_a_row_is_what_its_name_says(override: str, instead: str) -> None:
    with pytest.raises(ValueError, match=f"overrides must not set .* give {instead}"):
        cases_of(settings(f"overrides=['{override}']"))


def test_several_devices_are_refused_before_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children = Children(RECORDED, tmp_path)
    with pytest.raises(ValueError, match="task=step measures one device"):
        run(children, monkeypatch, *SMALL, "overrides=['trainer=ddp']")
    assert not children.caches


def test_packed_rows_have_neither_peers_nor_bare_loops() -> None:
    cases = cases_of(settings("packed=[false,true]", "peers=[llama,fla_kda]", "mixers=[kda]"))
    assert [case.implementation for case in cases if case.packed] == ["train"]
    assert [case.implementation for case in cases if not case.packed] == [
        *("llama", "llama_compiled", "llama_graphs", "fla_kda", "train", "bare")
    ]


@pytest.mark.parametrize("text", ["8x2048x16", "8", "0x4", "8X2048", "ax4", "-1x4"])
def test_a_shape_is_rows_by_tokens(text: str) -> None:
    with pytest.raises(ValueError, match=r"with task=step a shape is B x T"):
        parse_shape(text)


def test_settings_that_cannot_be_trained_are_refused_before_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = Children(RECORDED, tmp_path)
    with pytest.raises(ValueError, match=r"trainer.accumulate_grad_batches must be a whole number"):
        run(children, monkeypatch, *SMALL, "overrides=['trainer.accumulate_grad_batches=0']")
    assert not children.caches


def test_settings_in_a_list_need_no_quotes() -> None:
    typed = ["overrides=[trainer.precision=32-true,data.lengths=[1,2]]", "overrides=[]", "ops=[kda]"]
    quoted = "overrides=['trainer.precision=32-true','data.lengths=[1,2]']"
    assert as_typed(typed) == [quoted, "overrides=[]", "ops=[kda]"]
    assert list(composed("benchmark", quoted).overrides) == ["trainer.precision=32-true", "data.lengths=[1,2]"]
