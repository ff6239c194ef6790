"""Offline, W&B holds what metrics.csv says."""

import csv
import io
import json
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from lkda.commands.train import train
from lkda.training.task import LanguageModelTask
from lkda.training.wandb_logger import why_offline
from tests.commands.small import composed, small_run


def payloads(file: Path) -> Iterator[bytes]:
    """The records of a .wandb file: after 7 bytes of its own, a LevelDB log. That is blocks of 32 KiB, of pieces with a
    checksum (4 bytes), a length (2) and a type (1: whole, 2: first, 3: middle, 4: last)."""
    content = file.read_bytes()
    assert content[:4] == b":W&B"
    position, record = 7, b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:  # no piece begins so close to the end of a block
            position += left
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def records(run: Path) -> list[list[Any]]:
    """What each process that ran in `run` wrote offline, the first one first."""
    from wandb.proto import wandb_internal_pb2

    files = sorted((run / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime_ns)
    return [[wandb_internal_pb2.Record.FromString(payload) for payload in payloads(file)] for file in files]


def history(found: list[Any]) -> dict[int, dict[str, float]]:
    """The rows that one process wrote, by W&B's own step, each with its trainer/global_step."""
    rows = {}
    for record in found:
        if record.WhichOneof("record_type") == "history":
            row = {key(item): json.loads(item.value_json) for item in record.history.item}
            assert row["_step"] not in rows
            rows[row["_step"]] = {k: v for k, v in row.items() if not k.startswith("_")}
    return rows


def recorded(run: Path) -> dict[int, dict[str, float]]:
    """What metrics.csv holds of each step, its rows of training and validation in one."""
    merged: dict[int, dict[str, float]] = {}
    with open(run / "metrics.csv", newline="") as file:
        for row in csv.DictReader(file):
            step = int(row.pop("step"))
            row = {k: float(v) for k, v in row.items() if v}
            merged[step] = {**merged.get(step, {}), **row, "trainer/global_step": step}
    return merged


def key(item: Any) -> str:
    return item.key or "/".join(item.nested_key)


def test_the_offline_run_is_metrics_csv(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    train(composed("train", *small_run(corpus, "logger=wandb")), run)
    assert "wandb: offline, because WANDB_MODE=offline" in capsys.readouterr().out
    (found,) = records(run)
    assert history(found) == recorded(run)

    (described,) = (record.run for record in found if record.WhichOneof("record_type") == "run")
    assert described.project == "lkda"
    assert described.display_name == "kda_debug_seed1"
    assert described.run_group == "files_debug"
    assert list(described.tags) == ["kda", "debug", "files"]
    config = {key(item): json.loads(item.value_json) for item in described.config.update}
    assert config["model"]["d_model"] == 32
    assert config["optimizer"]["name"] == "adamw"


class Killed(BaseException):
    """Ends the process, as far as a test can."""


def test_a_resumed_run_is_one_axis(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after step 5 and resumed from step 4: W&B's step is the optimiser step in both files."""
    run = tmp_path / "run"
    settings = (
        "logger=wandb",
        "trainer.max_steps=8",
        "trainer.val_check_interval=4",
        "checkpoint.every_n_steps=4",
        "trainer.limit_val_batches=1",
        "sample.max_new_tokens=0",
    )

    def fatal(task: LanguageModelTask, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 5:
            raise Killed
        return training_step(task, batch, batch_idx)

    training_step = LanguageModelTask.training_step
    monkeypatch.setattr(LanguageModelTask, "training_step", fatal)
    with pytest.raises(Killed):
        train(composed("train", *small_run(corpus, *settings)), run)
    monkeypatch.undo()
    train(composed("train", *small_run(corpus, *settings, "resume=true")), run)

    first, second = records(run)
    assert list(history(first)) == [1, 2, 3, 4, 5]
    assert list(history(second)) == [5, 6, 7, 8]
    assert {**history(first), **history(second)} == recorded(run)
    times = {"seconds", "tokens_per_s"}
    again, before = history(second)[5], history(first)[5]
    assert {k: v for k, v in again.items() if k not in times} == {k: v for k, v in before.items() if k not in times}
    for found in (first, second):
        metrics = [record.metric for record in found if record.WhichOneof("record_type") == "metric"]
        assert any(metric.glob_name == "*" and metric.step_metric == "trainer/global_step" for metric in metrics)
    ids = {record.run.run_id for found in (first, second) for record in found if record.HasField("run")}
    assert len(ids) == 1


def test_the_reason_to_be_offline_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_offline() == "WANDB_MODE=offline"
    monkeypatch.delenv("WANDB_MODE")

    def no_network(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(socket, "create_connection", no_network)
    assert str(why_offline()).endswith("cannot be reached (no route to host)")
    monkeypatch.setattr(socket, "create_connection", lambda *args, **kwargs: io.BytesIO())
    monkeypatch.setattr(wandb, "login", lambda **settings: False)
    assert str(why_offline()).startswith("no account is logged in")
    monkeypatch.setattr(wandb, "login", lambda **settings: True)
    assert why_offline() is None
