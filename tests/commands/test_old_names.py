"""Run directories and exported directories that were written before modules moved."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class
from omegaconf import OmegaConf, open_dict

from lkda.commands.evaluate import evaluate
from lkda.commands.export import export
from lkda.commands.run.checkpoint_loading import load_trained
from lkda.commands.run.run_setup import with_recorded_options
from lkda.commands.train import train
from lkda.data.datamodule import IndexedDataModule
from lkda.old_names import DATA_MODULES, translated
from lkda.report.read.groups import group_runs
from lkda.report.read.runs import read_run
from tests.commands.small import ROOT, composed, small_run

OLD, NEW = "lkda.data.text.TextDataModule", "lkda.data.text.datamodule.TextDataModule"
# What a checkpoint of mqar_kimi at 64 tokens held before its queries followed one another.
OF_MQAR_KIMI = "9df60cb018c10b95e566988185338e105a6b5f9bf6b297510ee40d0531b87eba"
SHORT = ("trainer.max_steps=2",)


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "run"
    train(composed("train", *small_run(corpus, *SHORT)), directory)
    return directory


def with_old_names(path: Path) -> None:
    text = path.read_text()
    assert NEW in text
    path.write_text(text.replace(NEW, OLD))


@pytest.fixture
def old_run(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "old", symlinks=True)
    with_old_names(tmp_path / "old" / "config.yaml")
    return tmp_path / "old"


def test_every_data_module_has_its_old_name() -> None:
    assert all(issubclass(get_class(name), IndexedDataModule) for name in DATA_MODULES.values())
    today = {OmegaConf.load(path)._target_ for path in (ROOT / "configs" / "data").glob("*.yaml")}
    assert set(DATA_MODULES.values()) <= today


def test_what_holds_no_old_name_is_as_it_was() -> None:
    for config in ({}, {"data": None}, {"data": {"_target_": "mine.Data"}}, {"data": {"context": 8}, "seed": 1}):
        assert translated(config) == config
    before = {"data": {"_target_": OLD}}
    assert translated(before) == {"data": {"_target_": NEW}}
    assert before == {"data": {"_target_": OLD}}


def test_an_old_run_of_mqar_kimi_has_the_layout_it_had() -> None:
    data = {"_target_": "lkda.data.synthetic.mqar_kimi.KimiMQAR", "context": 64}
    before = get_class(translated({"data": data})["data"]["_target_"])(context=64)
    before.prepare()
    assert (before.source, before.fingerprint["train"]) == ("mqar_answered", OF_MQAR_KIMI)


def test_an_old_run_is_evaluated_on_its_data(run: Path, old_run: Path) -> None:
    today, before = (evaluate(composed("evaluate", f"ckpt={path}", "accelerator=cpu")) for path in (run, old_run))
    assert before == today


def test_an_old_run_resumes(old_run: Path, corpus: Path) -> None:
    summary = train(composed("train", *small_run(corpus, "trainer.max_steps=4", "resume=true")), old_run)
    assert summary["steps"] == 4
    assert OmegaConf.load(old_run / "config.yaml").data._target_ == NEW


@pytest.mark.slow
def test_an_old_exported_directory_is_evaluated_and_exported_again(old_run: Path, run: Path, tmp_path: Path) -> None:
    for n, source in enumerate((run, tmp_path / "out0")):
        export(composed("export", f"ckpt={source}", "format=lkda", f"out={tmp_path}/out{n}"))
        with_old_names(tmp_path / f"out{n}" / "README.md")
    today, before = (
        evaluate(composed("evaluate", f"ckpt={path}", "accelerator=cpu")) for path in (run, tmp_path / "out1")
    )
    assert before["loss"] == pytest.approx(today["loss"], rel=1e-6)


def test_old_and_new_runs_are_one_group(run: Path, old_run: Path) -> None:
    assert len(group_runs([read_run(run), read_run(old_run)])) == 1


EARLIER = Path(__file__).parent / "run_of_2f6dbd5"  # six steps of `debug=fast`, as commit 2f6dbd5 left them


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    shutil.copytree(EARLIER, tmp_path / "earlier")
    return tmp_path / "earlier"


@pytest.mark.slow
def test_a_run_of_an_earlier_version_goes_on_as_it_was(earlier: Path) -> None:
    """Without the options that came later: an embedding norm would be another model, and rates by kind another run."""
    before = list(csv.DictReader((earlier / "metrics.csv").read_text().splitlines()))
    steps = ("debug=fast", "trainer.accelerator=cpu", "trainer.max_steps=8", "resume=true")
    summary = train(composed("train", *steps, "sample.max_new_tokens=0"), earlier)
    assert summary["steps"] == 8
    rows = list(csv.DictReader((earlier / "metrics.csv").read_text().splitlines()))
    columns = before[0].keys() & rows[0].keys()
    assert {"step", "train/loss", "val/loss", "lr", "seconds"} <= columns
    assert [{c: row[c] for c in columns} for row in rows[: len(before)]] == [
        {c: row[c] for c in columns} for row in before
    ]
    config = OmegaConf.load(earlier / "config.yaml")
    assert config.model.embed_norm is False
    assert config.optimizer.lr_scale.embedding == 1.0
    assert config.data.test_from_year is None  # it has been trained on what would test
    assert "test/loss" not in summary
    model = load_trained(earlier).model
    assert model.embed_norm is None
    # Two steps of a run that had begun so are no break: the loss stays where it was.
    assert summary["val/loss"] == pytest.approx(float(before[-1]["val/loss"]), abs=0.05)


def test_a_resumed_run_of_mla_goes_on_without_positions() -> None:
    """As it began, where its config.yaml does not name them."""
    settings = OmegaConf.to_container(composed("train", "mixer=mla"))
    assert settings["mixer"]["mla"]["rope_base"] == 10000.0
    recorded = {"mixer": {"pattern": ["mla"], "mla": {"qk_norm": False}}}
    assert with_recorded_options(settings, recorded)["mixer"]["mla"]["rope_base"] is None
    recorded["mixer"]["mla"]["rope_base"] = 500.0
    assert with_recorded_options(settings, recorded)["mixer"]["mla"]["rope_base"] == 10000.0  # is compared later


def test_options_that_came_later_can_not_be_brought_into_it(earlier: Path) -> None:
    steps = ("debug=fast", "trainer.accelerator=cpu", "trainer.max_steps=8", "resume=true", "model.embed_norm=true")
    with pytest.raises(ValueError, match=r"other settings \(model.embed_norm: False is recorded, True is given\)"):
        train_from_command_line(steps, earlier)


def train_from_command_line(overrides: tuple[str, ...], directory: Path) -> None:
    """With the overrides where Hydra puts them."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("train", overrides=list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
    train(config, directory)


@pytest.mark.long
def test_it_is_evaluated_and_exported(earlier: Path, tmp_path: Path) -> None:
    (earlier / "checkpoints/step_0000006.ckpt").rename(earlier / "checkpoints/last.ckpt")
    loss = pytest.approx(json.loads((earlier / "summary.json").read_text())["val/loss"], abs=1e-5)
    limit = ("max_batches=2", "accelerator=cpu")  # as debug=fast validates
    assert evaluate(composed("evaluate", f"ckpt={earlier}", *limit))["loss"] == loss
    with pytest.raises(
        ValueError, match=r"sotu has no test split: data\.test_from_year is null\. Leave split=test out"
    ):
        evaluate(composed("evaluate", f"ckpt={earlier}", "split=test", *limit))
    out = export(composed("export", f"ckpt={earlier}", f"out={tmp_path}/out", "format=hf"))
    assert evaluate(composed("evaluate", f"ckpt={out}", *limit))["loss"] == loss
