"""Evaluations of a corpus with sources -> a table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lkda.report.redraw import redraw
from lkda.report.studies.by_source import main


def evaluation(path: Path, mixer: str, bits: dict[str, float]) -> None:
    by_source = {source: {"loss": 1.0, "bits_per_byte": x, "tokens": 9} for source, x in bits.items()}
    result = {"bits_per_byte": sum(bits.values()) / len(bits), "by_source": by_source}
    record = {"kind": "evaluation", "run": {"mixer": mixer}, "data": {}, "result": result}
    path.write_text(json.dumps(record))


def test_a_column_for_each_source(tmp_path: Path) -> None:
    evaluation(tmp_path / "a.json", "kda", {"novels": 1.0, "docs": 1.5})
    evaluation(tmp_path / "b.json", "kda", {"novels": 1.2, "docs": 1.5})
    evaluation(tmp_path / "c.json", "softmax", {"novels": 1.3, "docs": 1.4})
    main([f"{tmp_path}/*.json", f"{tmp_path}/out"])
    written = (tmp_path / "out" / "table.json").read_text()
    assert json.loads(written)["rows"] == [
        {"mixer": "kda", "all": "**1.300** (0.071)", "novels": "**1.100** (0.141)", "docs": "1.500 (0.000)"},
        {"mixer": "softmax", "all": "1.350", "novels": "1.300", "docs": "**1.400**"},
    ]
    redraw(tmp_path / "out" / "evaluations.json")
    assert (tmp_path / "out" / "table.json").read_text() == written


def test_a_later_run_is_added(tmp_path: Path) -> None:
    evaluation(tmp_path / "a.json", "kda", {"novels": 1.0})
    main([f"{tmp_path}/a.json", f"{tmp_path}/first"])
    evaluation(tmp_path / "b.json", "softmax", {"novels": 1.3})
    main([f"{tmp_path}/first/evaluations.json", f"{tmp_path}/b.json", f"{tmp_path}/second"])
    assert [row["mixer"] for row in json.loads((tmp_path / "second" / "table.json").read_text())["rows"]] == [
        "kda",
        "softmax",
    ]
    (tmp_path / "first" / "evaluations.json").write_text(json.dumps({"kind": "by_source", "evaluations": [3]}))
    with pytest.raises(SystemExit, match="was not written by"):
        main([f"{tmp_path}/first/evaluations.json", f"{tmp_path}/third"])


def test_what_cannot_be_compared_is_named(tmp_path: Path) -> None:
    evaluation(tmp_path / "a.json", "kda", {"novels": 1.0})
    evaluation(tmp_path / "b.json", "kda", {"docs": 1.0})
    with pytest.raises(SystemExit, match="the evaluations are of other sources: novels; docs"):
        main([f"{tmp_path}/*.json", f"{tmp_path}/out"])
    record = {"kind": "evaluation", "run": {"mixer": "kda"}, "data": {}, "result": {"bits_per_byte": 1.0}}
    (tmp_path / "b.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="an evaluation has no sources"):
        main([f"{tmp_path}/b.json", f"{tmp_path}/out"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": {"mixer": "kda", "seed": 1}}, "a.json and .*b.json have the same mixer and seed"),
        ({"split": "validation"}, "evaluations on english are of different splits: .*a.json, .*b.json"),
        ({"fingerprint": {"test": "y"}}, "the test tokens of .*a.json are not those of .*b.json"),
    ],
)
def test_means_are_over_seeds_on_one_text(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        evaluation(tmp_path / f"{name}.json", "kda", {"novels": 1.0})
        record = json.loads((tmp_path / f"{name}.json").read_text())
        record |= {"run": {"mixer": "kda", "seed": "ab".index(name) + 1}, "split": "test", "fingerprint": {"test": "x"}}
        record |= {"data": {"source": "english"}, **(changes if name == "b" else {})}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit, match=message):
        main([f"{tmp_path}/*.json", f"{tmp_path}/out"])
    assert not (tmp_path / "out").exists()
