"""Run directories and exported directories that were written before modules moved."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hydra.utils import get_class
from omegaconf import OmegaConf

from lkda.commands.evaluate import evaluate
from lkda.commands.export import export
from lkda.commands.train import train
from lkda.data.datamodule import IndexedDataModule
from lkda.old_names import DATA_MODULES, translated
from lkda.report.read.groups import group_runs
from lkda.report.read.runs import read_run
from tests.commands.small import ROOT, composed, small_run

OLD, NEW = "lkda.data.text.TextDataModule", "lkda.data.text.datamodule.TextDataModule"
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


def test_an_old_run_is_evaluated_on_its_data(run: Path, old_run: Path) -> None:
    today, before = (evaluate(composed("evaluate", f"ckpt={path}", "accelerator=cpu")) for path in (run, old_run))
    assert before == today


def test_an_old_run_resumes(old_run: Path, corpus: Path) -> None:
    summary = train(composed("train", *small_run(corpus, "trainer.max_steps=4", "resume=true")), old_run)
    assert summary["steps"] == 4
    assert OmegaConf.load(old_run / "config.yaml").data._target_ == NEW


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
