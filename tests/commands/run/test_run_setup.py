"""From a configuration to a plan: the learning rate and the heads that are not given, and what is built how often."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.errors import InstantiationException
from omegaconf import OmegaConf

from lkda.commands.export import export
from lkda.commands.run import prepared_run, run_setup
from lkda.commands.run.learning_rate import measured_learning_rate
from lkda.commands.run.run_setup import RunPlan, model_options, plan_run
from lkda.commands.settings.config import resolve
from lkda.commands.train import train
from lkda.models.build import build_model
from lkda.old_names import translated
from lkda.training.checkpoint import read_checkpoint
from tests.commands.small import ROOT, composed, small_run

MODELS = sorted((ROOT / "configs" / "model").glob("*.yaml"))
MIXERS = sorted(path.stem for path in (ROOT / "configs" / "mixer").glob("*.yaml"))
SHORT = ("trainer.max_steps=2", "sample.max_new_tokens=0")


def planned(*overrides: str, run_dir: Path = Path("nowhere")) -> RunPlan:
    return plan_run(composed("train", "trainer=cpu", *overrides), run_dir)


@pytest.mark.sample(4)
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_has_a_rate_for_every_model(mixer: str) -> None:
    settings = resolve(composed("train", f"mixer={mixer}"))
    for path in MODELS:
        model = OmegaConf.load(path)
        assert 0 < measured_learning_rate({"name": model.name}, settings["mixer"]) < 0.1


@pytest.mark.sample(4)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    ("given", "rate"),
    [
        ((), 4e-3),
        (("model=recall", "data=palindrome"), 3e-3),
        (("mixer.learning_rate.tiny=5e-4",), 5e-4),
        (("+model.learning_rate=2e-4",), 2e-4),  # for every mixer
        (("optimizer.lr=7e-4", "+model.learning_rate=2e-4"), 7e-4),
        (("optimizer.lr=7e-4", "model.name=mine"), 7e-4),
    ],
)
def test_the_rate_is_the_one_given_or_the_measured_one(given: tuple[str, ...], rate: float, optimizer: str) -> None:
    plan = planned(f"optimizer={optimizer}", *given)
    assert plan.optimizer["lr"] == plan.record["optimizer"]["lr"] == rate
    assert "learning_rate" not in plan.record["mixer"] | plan.record["model"] | plan.model | plan.model["mixer"]


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("model.name=mine",), r"known for mixer=kda in a model named mine, only for tiny, .*: give optimizer\.lr="),
        (("mixer.learning_rate=null",), r"known for mixer=kda in a model named tiny: give optimizer\.lr=\.\.\.$"),
        (("~mixer.learning_rate",), r"known for mixer=kda in a model named tiny: give optimizer\.lr=\.\.\.$"),
        (
            ("mixer.learning_rate=1e-3",),
            r"mixer\.learning_rate must be a table of rates by the name .*, got 0\.001; set the rate",
        ),
        (("mixer.learning_rate.tiny=high",), r"optimizer\.lr must be a number, got 'high'"),
        (("+model.learning_rate=-1",), r"optimizer\.lr must be greater than 0, got -1"),
        (("optimizer.lr=high",), r"optimizer\.lr must be a number, got 'high'"),
    ],
)
def test_a_rate_that_is_not_known_is_asked_for(given: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        train(composed("train", "trainer=cpu", *given), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("model", "heads"), [("tiny", 2), ("small", 8), ("base", 8), ("recall", 2)])
def test_a_model_has_the_heads_of_its_size(model: str, heads: int) -> None:
    options = model_options(resolve(composed("train", f"model={model}", "mixer=kda_mla_3to1")))
    with torch.device("meta"):
        assert {mixer.num_heads for mixer in build_model({**options, "vocab_size": 8}).mixers()} == {heads}


@pytest.mark.parametrize("given", ["mixer.num_heads=4", "model.num_heads=4"])
def test_heads_are_given_to_the_mixer_or_the_model(given: str) -> None:
    plan = planned(given)
    assert plan.model["mixer"]["num_heads"] == plan.record["mixer"]["num_heads"] == 4
    assert "num_heads" not in plan.record["model"]


def test_a_mixer_may_say_nothing_of_heads_and_rates() -> None:
    settings = resolve(composed("train", "optimizer.lr=1e-3"))
    del settings["mixer"]["num_heads"], settings["mixer"]["learning_rate"]
    assert plan_run(OmegaConf.create(settings), Path("nowhere")).model["mixer"]["num_heads"] == 2


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "run"
    train(composed("train", *small_run(corpus, *SHORT)), directory)
    return directory


def test_the_resolved_rate_is_said_everywhere(corpus: Path, tmp_path: Path, capsys: Any) -> None:
    summary = train(composed("train", *small_run(corpus, *SHORT)), tmp_path / "run")
    assert summary["learning_rate"] == OmegaConf.load(tmp_path / "run/config.yaml").optimizer.lr == 4e-3
    assert json.loads((tmp_path / "run/summary.json").read_text())["learning_rate"] == 4e-3
    assert read_checkpoint(tmp_path / "run/checkpoints/last.ckpt")["lkda"]["run"]["learning_rate"] == 4e-3
    assert re.search(r"; 2 steps of 64 tokens, peak learning rate 0\.004\n", capsys.readouterr().out)


@pytest.mark.slow
def test_a_resumed_run_keeps_its_rate(run: Path, corpus: Path, tmp_path: Path) -> None:
    """Whatever the measured one is by then."""
    shutil.copytree(run, tmp_path / "run")
    later = small_run(corpus, "trainer.max_steps=3", "model.learning_rate=1e-4", "resume=true")
    assert train(composed("train", *later), tmp_path / "run")["learning_rate"] == 4e-3
    nameless = small_run(corpus, "trainer.max_steps=4", "~model.learning_rate", "resume=true")
    assert train(composed("train", *nameless), tmp_path / "run")["learning_rate"] == 4e-3
    with pytest.raises(ValueError, match=r"other settings \(optimizer\.lr: 0\.004 is recorded, 0\.001 is given\)"):
        train(composed("train", *nameless, "optimizer.lr=1e-3"), tmp_path / "run")


def test_another_mixer_is_no_run_to_resume(run: Path, corpus: Path, tmp_path: Path) -> None:
    """Nor where options of the run's own mixer came later than the run."""
    shutil.copytree(run, tmp_path / "run")
    config = OmegaConf.load(tmp_path / "run/config.yaml")
    del config.mixer.kda["activation"]
    OmegaConf.save(config, tmp_path / "run/config.yaml")
    with pytest.raises(ValueError, match=r"other settings \(mixer\.name: kda is recorded, softmax is given"):
        train(composed("train", *small_run(corpus, "mixer=softmax", "resume=true")), tmp_path / "run")


def test_the_model_is_built_once(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    """And once without memory, to be checked before the data are prepared; the one of init_from is not built again."""
    built: list[str] = []

    def counted(config: dict[str, Any]) -> Any:
        built.append(torch.get_default_device().type)
        return build_model(config)

    for module in (run_setup, prepared_run):
        monkeypatch.setattr(module, "build_model", counted)
    train(composed("train", *small_run(corpus, *SHORT)), tmp_path / "run")
    assert built == ["meta", "cpu"]
    built.clear()
    out = export(composed("export", f"ckpt={run}", f"out={tmp_path}/out"))
    train(composed("train", *small_run(corpus, *SHORT, f"init_from={out}")), tmp_path / "from")
    assert built == []


@pytest.mark.long
def test_the_record_of_init_from_is_the_models_own(run: Path, corpus: Path, tmp_path: Path) -> None:
    """As it is of a fresh run: a logger's name has the mixer that trains, not the one that would be the default."""
    out = export(composed("export", f"ckpt={run}", f"out={tmp_path}/out"))
    plan = planned(*small_run(corpus, f"init_from={out}", "mixer=softmax", "logger=wandb"))
    assert plan.record["logger"]["wandb"]["name"] == "kda_debug_seed1"
    fresh = planned(*small_run(corpus))
    for group in ("model", "mixer"):
        assert plan.record[group] == fresh.record[group]
    assert plan.optimizer["lr"] == 4e-3
    words = ("data=files", *small_run(corpus)[2:], f"init_from={out}")
    with pytest.raises(ValueError, match=r"no learning rate is known for the model of init_from: give optimizer\.lr="):
        planned(*words)  # the measured rates are of fresh models
    larger = planned(*words, "optimizer.lr=1e-3")  # of the size that is the default
    assert larger.model["d_model"] == 32
    assert larger.model_name == larger.record["model"]["name"] == f"{larger.model['num_layers']}x32"
    assert larger.record["data"]["vocab_size"] == larger.record["model"]["vocab_size"] == 300


def test_what_earlier_runs_recorded_is_translated() -> None:
    before: dict[str, Any] = {
        "model": {"name": "tiny", "num_heads": 2, "learning_rate": 4e-3},
        "mixer": {"name": "kda", "num_heads": 4},
        "optimizer": {"lr": 1e-3, "lr_scale": {}},
        "scheduler": {"name": "wsd", "warmup_steps": 1, "decay": 0.4, "final": 0.0},
    }
    found = translated(before)
    assert found["mixer"]["num_heads"] == 4
    assert found["optimizer"]["lr"] == 1e-3
    assert found["model"].keys() & {"num_heads", "learning_rate"} == set()
    assert found["scheduler"] == {"name": "wsd", "warmup_steps": 1, "decay_fraction": 0.4, "min_lr_ratio": 0.0}
    assert before["scheduler"]["final"] == 0.0, "the caller's is left as it is"


def test_callbacks_are_checked_before_the_data_are_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lkda.commands.train.prepare_data", None)
    config = composed("train", "experiment=kimi_synthetics", "trainer=cpu", "callbacks.learnt.accuracy=7")
    with pytest.raises(InstantiationException, match="StopWhenLearnt must be above 0 and at most 1, got 7"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
