"""Training goes on from an exported directory."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict

import lkda
from lkda.commands.evaluate import evaluate
from lkda.commands.export import export
from lkda.commands.run.checkpoint_loading import load_trained
from lkda.commands.run.init_from import with_rope_base
from lkda.commands.train import train
from tests.commands.small import ROOT, composed, small_run
from tests.models.helpers import small, tokens

WHOLE_VALIDATION = "trainer.limit_val_batches=1.0"


MIXERS = ["kda_mla_3to1", pytest.param("softmax", marks=pytest.mark.long)]


def trained(corpus: Path, directory: Path, mixer: str, steps: int) -> Path:
    chosen = (
        f"mixer={mixer}",
        "model.num_layers=4",
        f"trainer.max_steps={steps}",
        f"trainer.val_check_interval={steps}",
    )
    train(
        composed("train", *small_run(corpus, *chosen, WHOLE_VALIDATION, f"checkpoint.every_n_steps={steps}")), directory
    )
    return directory


@pytest.fixture(scope="module", params=MIXERS)
def run(request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty steps."""
    return trained(corpus, tmp_path_factory.mktemp("runs") / request.param, request.param, 50)


@pytest.fixture(scope="module", params=MIXERS)
def short_run(request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps, where nothing need be learnt."""
    return trained(corpus, tmp_path_factory.mktemp("short") / request.param, request.param, 3)


def fine_tuned(corpus: Path, start: Path, into: Path, *overrides: str) -> dict[str, object]:
    return train(composed("train", *small_run(corpus, f"init_from={start}", WHOLE_VALIDATION, *overrides)), into)


@pytest.mark.parametrize(
    "format", [pytest.param("hf", marks=pytest.mark.slow), pytest.param("lkda", marks=pytest.mark.long)]
)
def test_the_validation_loss_survives(
    format: str, run: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Train, export, start from the export: the same loss to 1e-6, by a run whose steps are too small to count and by
    evaluating the directory."""
    before = json.loads((run / "summary.json").read_text())
    out = export(composed("export", f"ckpt={run}", f"out={tmp_path}/out", f"format={format}"))
    summary = fine_tuned(corpus, out, tmp_path / "again", "trainer.max_steps=1", "optimizer.lr=1e-30")
    assert summary["val/loss"] == pytest.approx(before["val/loss"], abs=1e-6)
    # hf holds the normalised table, and a head of its own in place of the norm; lkda keeps the model as it is.
    model = load_trained(run).model
    folded = model.lm_head.weight.numel() - model.config["d_model"] if format == "hf" else 0
    assert summary["params"] == before["params"] + folded
    assert ("folded the norm or scale of the embedding into the embedding table" in capsys.readouterr().out) == (
        format == "hf"
    )
    data = ("data=files", f"data.paths=[{corpus}]", "data.context=32", "data.batch_size=2")
    result = evaluate(composed("evaluate", f"ckpt={out}", "accelerator=cpu", *data))
    assert result["loss"] == pytest.approx(before["val/loss"], abs=1e-6)


@pytest.mark.slow
def test_fine_tuning_learns_and_resumes(run: Path, corpus: Path, tmp_path: Path) -> None:
    out = export(composed("export", f"ckpt={run}", f"out={tmp_path}/out", "format=hf"))
    summary = fine_tuned(corpus, out, tmp_path / "again", "trainer.max_steps=20", "trainer.val_check_interval=20")
    assert summary["val/loss"] < json.loads((run / "summary.json").read_text())["val/loss"] - 0.01
    more = ("trainer.max_steps=22", "trainer.val_check_interval=20", "resume=true")
    assert fine_tuned(corpus, out, tmp_path / "again", *more)["steps"] == 22
    assert "init_from" in (tmp_path / "again/config.yaml").read_text()


def test_a_run_directory_must_be_exported_first(short_run: Path, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs an exported directory, but .* is a run directory: export it first"):
        fine_tuned(corpus, short_run, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_another_model_on_the_command_line_is_refused(short_run: Path, corpus: Path, tmp_path: Path) -> None:
    out = export(composed("export", f"ckpt={short_run}", f"out={tmp_path}/out"))
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        overrides = small_run(corpus, f"init_from={out}", "model.d_model=64", f"hydra.run.dir={tmp_path}/again")
        config = compose("train", overrides=overrides, return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]  # as hydra.main does
    with pytest.raises(ValueError, match=r"has a model and a tokenizer of its own: leave out model.d_model=64"):
        train(config, tmp_path / "again")


def test_the_card_tells_of_the_run(short_run: Path, tmp_path: Path) -> None:
    summary = json.loads((short_run / "summary.json").read_text())
    out = export(composed("export", f"ckpt={short_run}", f"out={tmp_path}/out", "format=hf"))
    card = (out / "README.md").read_text()
    assert f"| validation bits per byte | {summary['val/bits_per_byte']:.6g} |" in card
    assert f"| tokens | {summary['tokens']:,} |" in card
    assert f"| parameters | {summary['params']:,} |" in card
    assert "| data | files |" in card
    assert "AutoModelForCausalLM.from_pretrained" in card
    assert "max_steps: 3\n" in card


def test_the_card_claims_no_metrics_of_another_step(short_run: Path, tmp_path: Path) -> None:
    """A checkpoint without a validation of its own has no results."""
    model, tokenizer = lkda.load(export(composed("export", f"ckpt={short_run}", f"out={tmp_path}/one")))
    lkda.export(model, tokenizer, tmp_path / "two", dtype="bfloat16")
    card = (tmp_path / "two/README.md").read_text()
    assert "Nothing was measured." in card
    assert "| weights | bfloat16 |" in card
    back, _ = lkda.load(tmp_path / "two")
    for before, after in zip(model.parameters(), back.parameters(), strict=True):
        torch.testing.assert_close(after, before, rtol=2**-8, atol=0)


def test_another_base_of_the_rotary_positions() -> None:
    """Weights stay, outputs change, and a model without rotary positions is the same object."""
    model = small(["kda", "softmax"])
    changed = with_rope_base(model, 500000)
    assert {key for key in model.config if model.config[key] != changed.config[key]} == {"mixer"}
    assert changed.config["mixer"]["softmax"]["rope_base"] == 500000.0
    assert all(torch.equal(x, y) for x, y in zip(changed.parameters(), model.parameters(), strict=True))
    words = tokens(1, 40)
    with torch.no_grad():
        assert not torch.equal(changed.eval()(words), model(words))
        again = with_rope_base(changed, 10000)
        assert torch.equal(again.eval()(words), model(words))
    without = small(["kda"])
    assert with_rope_base(without, 500000) is without
    mla = small(["mla"])  # no positions by default, and none are added
    assert with_rope_base(mla, 500000) is mla
    softmax = small(
        ["kda", "softmax"], mixer={"pattern": ["kda", "softmax"], "num_heads": 2, "softmax": {"rope_base": None}}
    )
    assert with_rope_base(softmax, 500000) is softmax


def test_the_base_is_recorded_and_trained_with(tmp_path: Path, corpus: Path) -> None:
    before = trained(corpus, tmp_path / "before", "softmax", 2)
    exported = export(composed("export", f"ckpt={before}", f"out={tmp_path}/out"))
    fine_tuned(corpus, exported, tmp_path / "run", "rope_base=500000", "trainer.max_steps=2")
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert recorded["rope_base"] == recorded["mixer"]["softmax"]["rope_base"] == 500000
    assert load_trained(tmp_path / "run").model.config["mixer"]["softmax"]["rope_base"] == 500000
