"""Which runs `lkda.commands.studies.scaling` makes, in which order, and what it says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lkda.checks import InputError
from lkda.commands.run.run_setup import plan_run
from lkda.commands.studies import scaling
from lkda.commands.studies.scaling import Runs
from lkda.commands.studies.scaling_cases import LONG, SHORT, Case, first_cases, last_cases, longest_cases, side_by_side
from lkda.report.redraw import main as redraw
from lkda.report.studies.scaling import PARTS, share_of_linear
from tests.commands.small import composed

COUNTS = (1, 2, 4)


def row(part: str, how: str, gpus: int, tokens: int | None = None, **more: Any) -> dict[str, Any]:
    found = {"part": part, "how": how, "gpus": gpus, "tokens": tokens, "row_seconds": 1.0}
    if "reason" in more:
        return found | more
    measured = {"tokens_per_s": 1e5 * gpus, "peak_memory_gib": 35.0, "context": (tokens or 2048) * gpus, "mfu": 0.3}
    model = {"model": "small", "mixer": "kda", "params": 40e6, "checkpointing": "none", "precision": "bf16-mixed"}
    model |= {"checkpoints": 1, "checkpoint_seconds": 0.5}
    device = {"device": "NVIDIA H200", "versions": {"torch": "2.11.0", "lightning": "2.6"}, "val/loss": 5.0}
    return found | measured | model | device | more


@pytest.mark.parametrize(
    "case",
    [Case("base", "single", 1), Case("large", "fsdp", 2), Case("longest", "context_parallel", 2, 2**20)],
    ids=lambda case: case.name,
)
def test_a_run_can_be_planned(case: Case, tmp_path: Path) -> None:
    """None of its settings is unknown or without effect."""
    plan = plan_run(composed("train", *case.overrides()), tmp_path)
    assert plan.trainer.world_size == case.gpus
    assert plan.data["batch_size"] == (1 if case.part == "longest" else 8 * case.gpus)
    assert plan.data["context"] == (2**21 if case.part == "longest" else 2048)
    if case.part == "large":
        assert (plan.model["d_model"], plan.model["num_layers"]) == (2048, 24)


def test_names_are_different() -> None:
    cases = [*first_cases(PARTS, COUNTS), *last_cases(PARTS, COUNTS)]
    assert len({case.name for case in cases}) == len(cases)


def test_runs_fill_the_gpus() -> None:
    groups = [[case.name for case in group] for group in side_by_side(first_cases(PARTS, COUNTS), 4)]
    assert groups[0] == ["base_single_1", "large_single_1", "context_single_1_262144", "context_single_1_65536"]
    assert groups[1:3] == [["base_ddp_2", "base_fsdp_2"], ["large_fsdp_2", "context_context_parallel_2_262144"]]
    assert [len(group) for group in groups[3:-1]] == [1] * 4  # a run on four GPUs has them to itself
    assert len(groups[-1]) == 7  # the agreement, whose runs share GPUs
    assert [case.name for case in last_cases(PARTS, COUNTS)] == [
        f"context_context_parallel_{n}_{SHORT}" for n in (2, 4)
    ]


def test_the_longest_context_follows_from_the_memory() -> None:
    rows = [row("context", "single", 1, LONG), row("context", "context_parallel", 2, LONG)]
    first = longest_cases(rows, COUNTS, memory_gib=140.0)
    assert [(case.gpus, case.how) for case in first] == [(1, "single"), (2, "context_parallel")]  # 4 was not measured
    assert first[0].tokens == pytest.approx(0.94 * 4 * LONG, abs=2**14)
    rows += [row("longest", "single", 1, first[0].tokens)]
    rows += [row("longest", "context_parallel", 2, first[1].tokens, reason="out of memory (...)")]
    (again,) = longest_cases(rows, COUNTS, memory_gib=140.0)
    assert again.gpus == 2
    assert again.tokens is not None
    assert first[1].tokens is not None
    assert again.tokens < first[1].tokens


class Counted(Runs):
    """Measures nothing."""

    def __init__(self, tmp_path: Path, seconds: float) -> None:
        super().__init__(tmp_path, tmp_path, overrides=(), gpus=(), limit=1.0, deadline=seconds)
        self.names: list[str] = []

    def measure(self, cases: Any) -> list[dict[str, Any]]:
        self.names += [case.name for case in cases]
        return [row(case.part, case.how, case.gpus, case.tokens) for case in cases]


def test_what_is_there_is_not_measured_again(tmp_path: Path) -> None:
    rows = [row("base", "single", 1), row("base", "ddp", 2)]
    runs = Counted(tmp_path, 1000)
    assert scaling.measure(runs, ["base"], [1, 2], rows, keep=lambda new: None) == []
    assert runs.names == ["base_fsdp_2"]
    late = Counted(tmp_path, 10)
    assert [case.name for case in scaling.measure(late, ["base"], [4], rows, keep=lambda new: None)] == [
        "base_ddp_4",
        "base_fsdp_4",
    ]
    assert late.names == []


def test_a_dry_run_prints_the_runs(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ending:
        scaling.main(["--dry-run", "--gpus", "2", "--parts", "base", "--out", str(tmp_path / "out")])
    assert ending.value.code == 0
    assert capsys.readouterr().out.splitlines() == ["at the same time: base_ddp_2", "at the same time: base_fsdp_2"]
    assert not (tmp_path / "out").exists()


def test_long_sequences_are_refused_without_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(scaling, "visible_gpus", lambda: [])
    words = ["--dry-run", "--gpus", "1", "2", "--parts", "context", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        scaling.main(words)
    shown = capsys.readouterr().out.splitlines()
    names = ["context_single_1_262144", "context_single_1_65536"]
    names += ["context_context_parallel_2_262144", "context_context_parallel_2_65536"]
    assert [line.split(": refused, because it needs GPUs: ")[0] for line in shown] == names
    assert "262,144 tokens on each device" in shown[2]
    with pytest.raises(SystemExit):
        scaling.main([*words, "context:data.context=64"])
    assert all(line.startswith("at the same time: context_") for line in capsys.readouterr().out.splitlines())
    monkeypatch.setattr(scaling, "visible_gpus", lambda: ["0", "1"])
    with pytest.raises(SystemExit):
        scaling.main(words)
    assert "refused" not in capsys.readouterr().out


def test_a_refused_run_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    begun: list[str] = []

    def start(runs: Runs, cases: Any) -> list[dict[str, Any]]:
        begun.extend(case.name for case in cases)
        return [row(case.part, case.how, case.gpus, case.tokens, reason="failed") for case in cases]

    monkeypatch.setattr(scaling, "visible_gpus", lambda: [])
    monkeypatch.setattr(Runs, "measure", start)
    with pytest.raises(SystemExit) as ending:
        scaling.main(["--gpus", "2", "--parts", "large", "context", "longest", "--out", str(tmp_path / "out")])
    assert begun == ["large_fsdp_2"]
    assert ending.value.code == 1
    assert "context_context_parallel_2_262144: refused" in capsys.readouterr().out


# Of Lightning's launcher.
_CHILD = "[rank: 1] Child process with PID 7 terminated with code -9. Forcefully terminating all other processes"


@pytest.mark.parametrize(
    ("text", "code", "reason"),
    [
        ("42.5 M parameters\n", -9, "killed by SIGKILL (out of memory?)"),
        ("42.5 M parameters\n", -11, "killed by SIGSEGV"),
        (f"{_CHILD}\n", -15, "killed by SIGKILL (out of memory?)"),
        (f"error: another process\n{_CHILD}\n", 1, "killed by SIGKILL (out of memory?)"),
        ("error: out of memory (CUDA): lower\nerror: another process\n", -9, "out of memory (CUDA): lower"),
        ("error: data.batch_size must be\nmore\n", 2, "data.batch_size must be"),
        ("", 1, "it printed nothing"),
    ],
)
def test_the_reason_of_a_failure(text: str, code: int, reason: str, tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    log.write_text(text)
    assert scaling._reason(log, code).startswith(reason)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--gpus", "0"], "--gpus must be"), (["x", "--gpus", "1"], "x is not a setting: give key=value")],
)
def test_bad_arguments_get_one_line(words: list[str], message: str, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        scaling.main([*words, "--out", str(tmp_path / "out")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tables_and_plot(tmp_path: Path) -> None:
    losses = {"1": 5.0, "2": 4.0}
    rows = [
        *(row("base", "single", 1), row("base", "ddp", 2, tokens_per_s=1.9e5), row("base", "fsdp", 4, reason="failed")),
        *(row("context", "single", 1, LONG), row("longest", "single", 1, 2**20, reason="out of memory")),
        row("agreement", "single", 1, losses=losses),
        row("agreement", "ddp", 2, losses={"1": 5.0, "2": 4.04}),
    ]
    (tmp_path / "scaling.json").write_text(json.dumps({"kind": "scaling", "date": "2026-01-02T03", "rows": rows}))
    redraw([str(tmp_path)])
    speeds = json.loads((tmp_path / "table.json").read_text())
    assert [found["share of linear"] for found in speeds["rows"]] == ["1.000", "0.950", "1.000"]
    assert speeds["note"] == "NVIDIA H200, torch 2.11.0, lightning 2.6, bf16-mixed; 2026-01-02."
    (one, two) = json.loads((tmp_path / "agreement.json").read_text())["rows"]
    assert one["largest difference from one device in any step"] == ""
    assert two["largest difference from one device in any step"] == "1.00%"
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert share_of_linear(rows[1], rows[1:]) is None


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "scaling.json").write_text(json.dumps({"kind": "scaling", "rows": [{}]}))
    with pytest.raises((InputError, SystemExit), match=r"scaling\.json is not of lkda\.commands\.studies\.scaling"):
        redraw([str(tmp_path)])


@pytest.mark.long  # it starts Python three times
def test_runs_on_a_cpu(corpus: Path, tmp_path: Path) -> None:
    """A row of a run of two processes, and one of a run that fails, which is measured again."""
    words = (
        *("model.d_model=32", "model.num_layers=1", "model.num_heads=2", "model.mlp_hidden=32", "trainer.max_steps=5"),
        *("data.context=64", "data.batch_size=4", "trainer.val_check_interval=5", "model.vocab_size=64"),
    )
    parts = ["--parts", "base", "--gpus", "1", "2", "--out", str(tmp_path / "out"), "--runs", str(tmp_path)]
    with pytest.raises(SystemExit) as ending:
        scaling.main([*words, "base:data.batch_size=0", *parts])
    assert ending.value.code == 1
    found = json.loads((tmp_path / "out" / "scaling.json").read_text())["rows"]
    assert all("reason" in one for one in found)
    assert all((tmp_path / "out" / f"{scaling._case(one).name}.log").exists() for one in found)
    with pytest.raises(SystemExit) as ending:
        scaling.main([*words, *parts])
    assert ending.value.code == 0
    found = json.loads((tmp_path / "out" / "scaling.json").read_text())["rows"]
    assert [one["tokens_per_s"] > 0 for one in found] == [True] * 3
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("tmp")]  # no run is left
