"""Evaluations at several contexts -> a table and plots."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lkda.report.redraw import redraw
from lkda.report.studies.long_context import main


def evaluation(path: Path, mixer: str, context: int | None, result: dict[str, float]) -> None:
    data = {"lengths": [2048, 4096]} if context is None else {"context": context}
    record = {"kind": "evaluation", "ckpt": "x", "run": {"mixer": mixer, "context": 2048}, "data": data}
    path.write_text(json.dumps(record | {"result": result}))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (home := tmp_path / "runs").mkdir()
    for seed, gain in ((1, 0.0), (2, 0.2)):
        for context in (2048, 4096, 8192):
            by_position = {f"loss_from_{n}": 5 - n / 10000 for n in (0, 1, 2, 512, 2048)}
            result = {"bits_per_byte": 2 - context / 8192 - gain, **by_position}
            evaluation(home / f"kda_{context}_{seed}.json", "kda", context, result)
    needles = {f"accuracy/length_{n}_depth_{d}_needles_1": d / 100 for n in (2048, 4096) for d in (0, 50, 90)}
    needles |= {f"accuracy/length_{n}_depth_0_needles_0": 0.25 for n in (2048, 4096)}
    evaluation(home / "needle.json", "kda", None, needles | {"accuracy": 0.5})
    return home


def test_table_and_plots_and_drawn_again(files, tmp_path, capsys):
    out = tmp_path / "out"
    main([f"{files}/*.json", str(out)])
    (row,) = json.loads((out / "table.json").read_text())["rows"]
    assert row == {
        **{"mixer": "kda", "bits/byte at 2K": "1.650", "bits/byte at 4K": "1.400", "bits/byte at 8K": "0.900"},
        **{"recalled at 2K": "0% / 50% / 90% (25%)", "recalled at 4K": "0% / 50% / 90% (25%)"},
    }
    pictures = {path.name: path.read_bytes() for path in out.glob("*.png")}
    assert set(pictures) == {"loss_by_position.png", "bits_by_context.png", "needle_by_distance.png"}
    redraw(out / "evaluations.json")
    assert {path.name: path.read_bytes() for path in out.glob("*.png")} == pictures


def test_what_was_not_measured_is_an_empty_cell(files, tmp_path):
    evaluation(files / "mla.json", "mla", 2048, {"bits_per_byte": 1.5})
    main([f"{files}/*.json", str(tmp_path / "out")])
    _, row = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    assert (row["bits/byte at 2K"], row["bits/byte at 4K"], row["recalled at 2K"]) == ("1.500", "", "")


def test_what_is_no_evaluation_gets_one_clear_message(tmp_path):
    (tmp_path / "a.json").write_text('{"kind": "evaluation", "run": {}, "data": {}, "result": {}}')
    with pytest.raises(SystemExit, match=r"a.json does not name the model's mixer"):
        main([f"{tmp_path}/*.json", str(tmp_path / "out")])
    (tmp_path / "a.json").write_text('{"kind": "evaluation"}')
    with pytest.raises(SystemExit, match=r"a.json lacks the entry .run.|is not what its kind"):
        main([f"{tmp_path}/*.json", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="no evaluations"):
        main([f"{tmp_path}/*.none", str(tmp_path / "out")])
