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


def records(run: Path) -> list[Any]:
    """What the one offline run below `run` wrote."""
    from wandb.proto import wandb_internal_pb2

    (file,) = (run / "wandb").glob("offline-run-*/run-*.wandb")
    return [wandb_internal_pb2.Record.FromString(payload) for payload in payloads(file)]


def key(item: Any) -> str:
    return item.key or "/".join(item.nested_key)


def test_the_offline_run_is_metrics_csv(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    train(composed("train", *small_run(corpus, "logger=wandb")), run)
    assert "wandb: offline, because WANDB_MODE=offline" in capsys.readouterr().out
    found = records(run)

    logged = []
    for record in found:
        if record.WhichOneof("record_type") == "history":
            row = {key(item): json.loads(item.value_json) for item in record.history.item}
            logged.append({k: v for k, v in row.items() if not k.startswith("_")})
    with open(run / "metrics.csv", newline="") as file:
        expected = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    for row in expected:
        row["trainer/global_step"] = row.pop("step")
    assert logged == expected

    (described,) = (record.run for record in found if record.WhichOneof("record_type") == "run")
    assert described.project == "lkda"
    assert described.display_name == "kda_debug_seed1"
    assert described.run_group == "files_debug"
    assert list(described.tags) == ["kda", "debug", "files"]
    config = {key(item): json.loads(item.value_json) for item in described.config.update}
    assert config["model"]["d_model"] == 32
    assert config["optimizer"]["name"] == "adamw"


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
