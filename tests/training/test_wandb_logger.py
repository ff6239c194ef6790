"""Offline, W&B holds what metrics.csv says."""

import csv
import io
import socket
import sys
from pathlib import Path

import pytest

from lkda.commands.train import train
from lkda.training.wandb_logger import wandb_logger, why_offline
from tests.commands.small import composed, small_run
from tests.training.wandb_records import history, records

wandb = pytest.importorskip("wandb")


def test_the_offline_run_is_metrics_csv(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    train(composed("train", *small_run(corpus, "logger=wandb")), run)
    assert "wandb: offline, because WANDB_MODE=offline" in capsys.readouterr().out
    (found,) = records(run)
    logged = [{k: v for k, v in row.items() if not k.startswith("_")} for row in history(found)]
    with open(run / "metrics.csv", newline="") as file:
        expected = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    for row in expected:
        row["trainer/global_step"] = row.pop("step")
    assert logged == expected

    (described,) = (record["run"] for record in found if record["type"] == "run")
    assert described["project"] == "lkda"
    assert described["display_name"] == "kda_debug_seed1"
    assert described["run_group"] == "files_debug"
    assert described["tags"] == ["kda", "debug", "files"]
    config = described["config"]["update"]
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


def test_without_the_package_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="logger=wandb needs the package wandb: pip install wandb"):
        wandb_logger(save_dir=str(tmp_path), config={}, project="p", name="n", group="g", tags=[])
