"""scripts/benchmark.py task=decode: which rows are measured, and a failed row costs no other."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from lkda.bench import decode as measurements
from lkda.commands.benchmark import benchmark
from lkda.commands.benchmarks import decode_benchmark as decoding
from lkda.commands.benchmarks.decode_benchmark import cases_of
from lkda.commands.benchmarks.decode_row import main, measure
from lkda.commands.command_line.errors import CommandError
from lkda.commands.settings.config import resolve
from lkda.report.redraw import main as redraw
from tests.commands.small import composed

CPU = torch.device("cpu")
SMALL = ("task=decode", "device=cpu", "models=[tiny]", "vocab_size=60", "dtypes=[fp32]")


def settings(*overrides: str) -> dict[str, Any]:
    return resolve(composed("benchmark", *SMALL, *overrides))


def request(*overrides: str, implementation: str = "lkda") -> dict[str, Any]:
    layers = "overrides=['model.d_model=16','model.num_layers=2','model.num_heads=2','model.mlp_hidden=16']"
    found = cases_of(settings("batches=[2]", "contexts=[256]", layers, *overrides), CPU)
    case = next(case for case in found if case.implementation == implementation)
    return {"case": asdict(case), "device": "cpu", "started": time.time()}


def test_rows_by_context_with_prefill_batches_state_dtypes_and_peers():
    mixers = "mixers=[kda,softmax,kda_softmax_3to1]"
    options = ("batches=[1,8]", "contexts=[256,1024]", "state_dtypes=[float32,int8]", "prefill=true", "top_p=0.9")
    cases = cases_of(settings(mixers, *options, "peers=[transformers]"), CPU)
    names = [case.name.removeprefix("tiny_") for case in cases if "x256_" in case.name]
    peers = ("transformers", "transformers_compiled")
    assert [name for name in names if name.startswith("kda_fp32")] == [
        "kda_fp32_float32_1x256_prefill",
        *(
            f"kda_fp32_{state}_{batch}x256_{what}"
            for batch in (1, 8)
            for state, what in (("float32", "lkda"), ("int8", "lkda"), *(("float32", peer) for peer in peers))
        ),
    ]
    assert [name for name in names if name.startswith("softmax") and name.endswith("lkda")] == [
        "softmax_fp32_1x256_lkda",
        "softmax_fp32_8x256_lkda",
    ]
    assert len({case.name for case in cases}) == len(cases)
    assert {case.top_p for case in cases if case.implementation == "lkda"} == {0.9}
    assert {case.top_p for case in cases if case.implementation != "lkda"} == {None}


@pytest.mark.parametrize("options", [("mixers=[kda]", "state_dtypes=[int8]", "top_p=0.9"), ("mixers=[mla]",)])
def test_a_row_is_measured(options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurements, "SECONDS", 0.01)
    monkeypatch.setattr(measurements, "copy_gb_per_s", lambda device: 1.0)
    row = measure(request(*options))
    assert row["tokens_per_s"] > 0
    assert row["bytes_per_step"] > row["weight_bytes"]


@pytest.mark.long
def test_an_int8_state_takes_less_than_a_float32_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurements, "SECONDS", 0.01)
    monkeypatch.setattr(measurements, "copy_gb_per_s", lambda device: 1.0)
    whole, small = (
        measure(request("mixers=[kda]", f"state_dtypes=[{state}]"))["bytes_per_sequence"]
        for state in ("float32", "int8")
    )
    heads, channels = 2 * 2, 8  # of both layers
    assert whole - small == heads * (
        3 * channels**2 - 4 * channels
    )  # three bytes less per number, and a factor per row


def test_a_failed_row_says_why(tmp_path: Path) -> None:
    asked = request("mixers=[simplified]", "peers=[transformers]", implementation="transformers")
    (tmp_path / "request").write_text(json.dumps(asked))
    with pytest.raises(ValueError, match="simplified"):
        main([str(tmp_path / "request"), str(tmp_path / "result")])
    assert "simplified" in json.loads((tmp_path / "result").read_text())["reason"]


@pytest.mark.slow
def test_a_prompt_whose_states_do_not_fit_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurements, "physical_memory", lambda: 10**4)
    for implementation in ("prefill", "lkda"):
        row = measure(request("mixers=[softmax]", "prefill=true", implementation=implementation))
        assert row["bytes_needed"] > row["bytes_per_sequence"] > 10**4
        assert "does not fit: the states take" in row["reason"]


@pytest.mark.sample(3)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_peer_generates_with_a_very_small_vocabulary(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurements, "SECONDS", 0.01)
    monkeypatch.setattr(measurements, "copy_gb_per_s", lambda device: 1.0)
    monkeypatch.setattr(measurements, "PEER_TOKENS", (1, 3))
    # Of the longer text, then of the shorter one; a clock would say that they take the same time now and then.
    seconds = iter([2.0, 1.0])
    monkeypatch.setattr(measurements, "_seconds", lambda call, *_, times: (call(), next(seconds))[1])
    options = ("mixers=[softmax]", "peers=[transformers]", f"vocab_size={size}")
    assert measure(request(*options, implementation="transformers"))["tokens_per_s"] == 2 * 2


class Children:
    """Stands in for the processes: a row for each log's name; another is said not to fit."""

    def __init__(self, speeds: dict[str, float], out: Path) -> None:
        self.speeds, self.out = speeds, out
        self.rows_before: list[int] = []

    def __call__(self, module: str, asked: Any, limit: float, log: Path) -> dict[str, Any]:
        assert module == decoding.ROW
        saved = self.out / "decode.json"
        self.rows_before.append(len(json.loads(saved.read_text())["rows"]) if saved.exists() else 0)
        known = {"bytes_per_sequence": 1024 * asked["case"]["context"]}
        if log.stem not in self.speeds:
            return known | {"bytes_needed": 2**40, "reason": "does not fit: the states take 1,024.0 GiB"}
        return known | {"tokens_per_s": self.speeds[log.stem], "copy_share": 0.5, "copy_gb_per_s": 2900.0}


def run(children: Children, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> list[dict[str, Any]]:
    monkeypatch.setattr(decoding, "run_fork", children)
    benchmark(composed("benchmark", *SMALL, f"out={children.out}", *overrides))
    rows: list[dict[str, Any]] = json.loads((children.out / "decode.json").read_text())["rows"]
    return rows


def test_every_row_is_saved_and_the_crossing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    speeds = {
        "tiny_kda_fp32_float32_1x256_lkda": 100.0,
        "tiny_kda_fp32_float32_1x1024_lkda": 100.0,
        "tiny_softmax_fp32_1x256_lkda": 200.0,
        "tiny_softmax_fp32_1x1024_lkda": 50.0,
        "tiny_kda_fp32_float32_8x256_lkda": 700.0,
    }
    children = Children(speeds, tmp_path)
    rows = run(children, monkeypatch, "mixers=[kda,softmax]", "batches=[1,8]", "contexts=[256,1024]")
    assert children.rows_before == list(range(8))
    assert sum("tokens_per_s" in row for row in rows) == 5
    assert [row["bytes_needed"] for row in rows if "reason" in row] == [2**40] * 3
    printed = capsys.readouterr().out
    assert "kda passes softmax at a context of 512 (tiny, fp32, batch 1)" in " ".join(printed.split())
    assert "1024 GiB" in printed
    pictures = {"tokens_per_s_by_context.png", "tokens_per_s_by_batch.png", "memory_by_context.png"}
    assert {path.name for path in tmp_path.glob("*.*")} == {"decode.json", "table.json", "table.md", *pictures}
    before = (tmp_path / "table.md").read_text()
    redraw([str(tmp_path)])
    assert (tmp_path / "table.md").read_text() == before


def test_nothing_measured_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CommandError, match="nothing was measured: does not fit"):
        run(Children({}, tmp_path), monkeypatch)
    assert (tmp_path / "table.md").exists()


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["mixers=[kd]"], r"mixers: there is no kd; with task=decode there are conv,"),
        (["peers=[llama]"], r"peers: there is no llama; with task=decode there are transformers, fla"),
        (["dtypes=[int8]"], r"dtypes: there is no int8; with task=decode there are bf16,"),
        (["state_dtypes=[fp8]"], r"state_dtypes: there is no fp8; with task=decode there are float32,"),
        (["mixers=[softmax]", "state_dtypes=[int8]"], r"state_dtypes=.* is for models with KDA layers"),
        (["batches=[]"], r"batches is empty"),
        (["batches=[0]"], r"batches must be a whole number of 1 or more, got 0"),
        (["contexts=[255]"], r"contexts must be a whole number of 256 or more, got 255"),
        (["contexts=[1.5]"], r"contexts must be "),
        (["top_p=0"], r"top_p must be above 0 and at most 1"),
        (["overrides=['model.num_heads=3']"], r"num_heads"),
        (["overrides=['mixer=softmax']"], r"overrides: mixer is what mixers=... is for"),
        (["overrides=['model.vocab_size=9']"], r"overrides: model.vocab_size is what vocab_size=... is for"),
        (["overrides=['mixer.kda.state_dtype=int8']"], r"mixer.kda.state_dtype is what state_dtypes=... is for"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_row(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = Children({}, tmp_path)
    with pytest.raises(ValueError, match=message):
        run(children, monkeypatch, *options)
    assert not children.rows_before


@pytest.mark.long
def test_a_whole_benchmark_in_processes_of_its_own(tmp_path: Path) -> None:
    benchmark(composed("benchmark", *SMALL, "batches=[1]", "contexts=[256]", f"out={tmp_path}"))
    rows = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert [row["implementation"] for row in rows] == ["lkda"]
    assert all(row["tokens_per_s"] > 0 for row in rows)
