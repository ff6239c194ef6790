"""Offline, W&B holds what metrics.csv says."""

import csv
import io
import socket
from pathlib import Path
from typing import Any

import pytest
import wandb
from omegaconf import OmegaConf

from lkda.commands.train import train
from lkda.shipped import CONFIGS
from lkda.training import wandb_connection
from lkda.training.task import LanguageModelTask
from lkda.training.wandb_connection import why_offline
from lkda.training.wandb_logger import wandb_logger
from tests.commands.small import composed, small_run
from tests.training.wandb_records import history, records


def by_step(found: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """The rows that one process wrote, by W&B's own step, each with its trainer/global_step."""
    rows = history(found)
    steps = [int(row["_step"]) for row in rows]
    assert len(set(steps)) == len(steps)
    return {step: {k: v for k, v in row.items() if not k.startswith("_")} for step, row in zip(steps, rows)}


def recorded(run: Path) -> dict[int, dict[str, float]]:
    """What metrics.csv holds of each step, its rows of training and validation in one."""
    merged: dict[int, dict[str, float]] = {}
    with open(run / "metrics.csv", newline="") as file:
        for row in csv.DictReader(file):
            step = int(row.pop("step"))
            row = {k: float(v) for k, v in row.items() if v}
            merged[step] = {**merged.get(step, {}), **row, "trainer/global_step": step}
    return merged


@pytest.mark.slow
def test_the_offline_run_is_metrics_csv(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    train(composed("train", *small_run(corpus, "logger=wandb")), run)
    assert "wandb: offline, because WANDB_MODE=offline" in capsys.readouterr().out
    (found,) = records(run)
    assert by_step(found) == recorded(run)

    (described,) = (record["run"] for record in found if record["type"] == "run")
    assert described["project"] == "lkda"
    assert described["display_name"] == "kda_debug_seed1"
    assert (described["run_group"], described["job_type"]) == ("kda_debug_files", "train")
    assert described["tags"] == ["kda", "debug", "files"]
    config = described["config"]["update"]
    assert config["model"]["d_model"] == 32
    assert config["optimizer"]["name"] == "adamw"


class Killed(BaseException):
    """Ends the process, as far as a test can."""


@pytest.mark.long
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
    assert list(by_step(first)) == [1, 2, 3, 4, 5]
    assert list(by_step(second)) == [5, 6, 7, 8]
    assert {**by_step(first), **by_step(second)} == recorded(run)
    times = {"seconds", "tokens_per_s", "tflops_per_s"}
    again, before = by_step(second)[5], by_step(first)[5]
    assert {k: v for k, v in again.items() if k not in times} == {k: v for k, v in before.items() if k not in times}
    for found in (first, second):
        metrics = [record["metric"] for record in found if record["type"] == "metric"]
        assert any(m.get("glob_name") == "*" and m.get("step_metric") == "trainer/global_step" for m in metrics)
    ids = {record["run"]["run_id"] for found in (first, second) for record in found if record["type"] == "run"}
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


def test_a_server_that_does_not_accept_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For example because the key is wrong, or something else answers there. The run is recorded offline."""
    modes = []

    def init(**options: Any) -> Any:
        modes.append(options["mode"])
        raise wandb.errors.CommError("returned error 501:\nUnsupported method")

    monkeypatch.setattr(wandb_connection, "why_offline", lambda: None)
    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "teardown", lambda: modes.append("teardown"))
    made = wandb_logger(save_dir=str(tmp_path), config={}, project=None, name=None, group="one", job_type=None, tags=())
    assert modes == ["online", "teardown"]
    assert made._wandb_init["mode"] == "offline"
    said = "wandb: offline, because the server does not accept the run (returned error 501: Unsupported method); upload"
    assert capsys.readouterr().out.startswith(said)


def test_the_end_of_a_run_does_not_wait_for_a_lost_server(tmp_path: Path) -> None:
    made = wandb_logger(save_dir=str(tmp_path), config={}, project=None, name=None, group="one", job_type=None, tags=())
    assert made._wandb_init["settings"].finish_timeout == 120


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ({"group": None, "tags": None}, ("kda_recall_mqar", ["kda", "recall", "mqar"])),
        ({"group": "mine", "tags": ["first"]}, ("mine", ["first"])),
        ({"group": None, "tags": []}, ("kda_recall_mqar", [])),
    ],
)
def test_a_group_is_of_one_mixer_model_and_data(
    given: dict[str, Any], made: tuple[str, list[str]], tmp_path: Path
) -> None:
    config = {"mixer": {"name": "kda"}, "model": {"name": "recall"}, "data": {"source": "mqar"}}
    settings = wandb_logger(save_dir=str(tmp_path), config=config, project=None, name=None, job_type=None, **given)
    assert (settings._wandb_init["group"], settings._wandb_init["tags"]) == made


@pytest.mark.sample(8)
@pytest.mark.parametrize("data", [path.stem for path in sorted((CONFIGS / "data").glob("*.yaml"))])
def test_it_logs_every_kind_of_data(data: str) -> None:
    logger = OmegaConf.to_container(composed("train", f"data={data}", "logger=wandb").logger, resolve=True)
    assert logger["wandb"]["project"] == "lkda"
