"""The study of runs of several lengths: equal tokens, and equal time of training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lkda.report.redraw import main as redraw
from lkda.report.studies.budgets import bits_after, curve_of, equal_time, rows
from lkda.report.studies.budgets import main as collect_and_draw


def run(mixer: str, tokens: int, bits: float, *, speed: float = 1e6, seed: int = 1) -> dict[str, object]:
    return {"mixer": mixer, "tokens": tokens, "bits_per_byte": bits, "tokens_per_s": speed, "seed": seed}


# simplified is twice as fast as kda: after 200 s it has had 400M tokens, and kda 200M, half of the way on a log scale.
FOUR = [
    run("kda", 100_000_000, 1.30),
    run("kda", 100_000_000, 1.34, seed=2, speed=4e5),  # it shared its device
    run("kda", 400_000_000, 1.12),
    run("simplified", 100_000_000, 1.4, speed=2e6),
    run("simplified", 400_000_000, 1.3, speed=2e6),
]


def test_equal_tokens_and_equal_time() -> None:
    assert equal_time(FOUR) == 200
    assert curve_of(FOUR, "kda") == [(100, pytest.approx(1.32)), (400, 1.12)]
    assert bits_after(curve_of(FOUR, "kda"), 200) == pytest.approx(1.22)
    assert bits_after(curve_of(FOUR, "kda"), 50) is None
    assert rows(FOUR) == [
        {
            **{"mixer": "kda", "100M tokens": "**1.320** ± 0.028", "400M tokens": "**1.120**"},
            **{"after 200 s": "**1.220**", "tokens/s": "1M"},
        },
        {
            **{"mixer": "simplified", "100M tokens": "1.400", "400M tokens": "1.300"},
            **{"after 200 s": "1.300", "tokens/s": "2M"},
        },
    ]


def test_a_budget_that_was_not_run_is_an_empty_cell() -> None:
    _, last = rows([*FOUR[:-1], run("mla", 400_000_000, 1.2, speed=4e6)])[-2:]
    assert (last["mixer"], last["400M tokens"]) == ("simplified", "")
    assert last["after 100 s"] == ""  # mla, the fastest, took 100 s for the most tokens


def trained(path: Path, mixer: str, tokens: int, **changes: object) -> None:
    """A run directory."""
    path.mkdir(parents=True)
    summary = {
        "mixer": mixer,
        "val/bits_per_byte": 1.5,
        "val/loss": 3.0,
        "tokens": tokens,
        "seed": 1,
        "data": "english",
    }
    summary |= {"test/loss": 2.8, "test/bits_per_byte": 1.4, "status": "finished", "device": "a GPU", "params": 5}
    summary |= {"state_bytes": 1, "tokens_per_s": 9.0, **changes}
    (path / "summary.json").write_text(json.dumps(summary))
    (path / "config.yaml").write_text("model: {}\n")
    (path / "metrics.csv").write_text("step,tokens,seconds,val/loss\n1,1,1,1\n")


def test_run_directories_are_collected_and_drawn_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for mixer, tokens in (("kda", 100), ("kda", 400), ("mla", 100), ("mla", 400)):
        trained(tmp_path / "runs" / f"{mixer}_{tokens}", mixer, tokens)
    (tmp_path / "runs" / "killed").mkdir()
    collect_and_draw([f"{tmp_path}/runs/*_100", f"{tmp_path}/runs/*", f"{tmp_path}/out"])
    said = capsys.readouterr().out
    assert "left out" in said
    assert "mixer: kda  100 tokens: **1.400**  400 tokens: **1.400**" in said
    (tmp_path / "out" / "bits_by_time.png").unlink()
    redraw([f"{tmp_path}/out"])
    assert (tmp_path / "out" / "bits_by_time.png").is_file()
    note = json.loads((tmp_path / "out" / "table.json").read_text())["note"]
    assert note.startswith("Bits per byte of the test split. Runs of each mixer: 100 tokens: 1; 400 tokens: 1.")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 400, "data": "prose"}, "the runs must have the same data to be compared; got english, prose"),
        ({"tokens": 400, "device": "cpu"}, "the runs must have the same device to be compared; got a GPU, cpu"),
        (
            {"tokens": 400, "fingerprint": {"test": "b"}},
            "the test tokens of one are not those of two",
        ),
        (
            {"tokens": 100, "mixer": "kda"},
            "one and two have the same mixer and seed",
        ),
    ],
)
def test_runs_that_cannot_be_compared(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    trained(tmp_path / "runs" / "one", "kda", 100, fingerprint={"test": "a"})
    trained(tmp_path / "runs" / "two", **{"mixer": "mla", "tokens": 400, **changes})  # type: ignore[arg-type]
    with pytest.raises(SystemExit, match=message):
        collect_and_draw([f"{tmp_path}/runs/*", f"{tmp_path}/out"])
    assert not (tmp_path / "out").exists()


def test_one_length_and_none(tmp_path: Path) -> None:
    trained(tmp_path / "runs" / "one", "kda", 100)
    collect_and_draw([f"{tmp_path}/runs/*", f"{tmp_path}/out"])
    (row,) = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    assert (row["100 tokens"], row["after 11.1 s"]) == ("**1.400**", "**1.400**")
    with pytest.raises(SystemExit, match="none of the directories is that of a finished run"):
        collect_and_draw([f"{tmp_path}/none/*", f"{tmp_path}/out"])
