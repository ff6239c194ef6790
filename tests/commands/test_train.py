"""A run from start to end, and what it leaves behind."""

import csv
import json
import math
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from lkda.commands.command_line.text import encode_prompt, text_pieces
from lkda.commands.run.checkpoint_loading import load_trained
from lkda.commands.run.console import draw_sample
from lkda.commands.train import train
from lkda.models.generate import generate
from lkda.ops import resolve_backend
from lkda.training.checkpoint import read_checkpoint
from lkda.training.metrics_csv import COLUMNS
from lkda.training.options import SampleOptions
from lkda.training.positions import columns
from tests.commands.small import ROOT, composed, small_run

SUMMARY = {
    "status", "val/loss", "val/perplexity", "val/bits_per_byte", "unigram_entropy", "tokens", "tokens_per_s", "params",
    "tflops_per_s", "mfu", "peak_memory_gib", "devices", "strategy",
    "params_non_embedding", "state_bytes", "flops_per_token", "mixer", "model", "data", "context", "backend", "device",
    "precision", "state_dtype", "checkpointing", "clipped_share", "seed", "fingerprint", "steps", "seconds",
    "learning_rate", "checkpoints", "checkpoint_seconds", "skipped_steps",
    "git_commit", "versions",
    "test/loss", "test/perplexity", "test/bits_per_byte", "test_unigram_entropy", "test_tokens",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "one"
    train(composed("train", *small_run(corpus, "trainer.max_steps=7")), directory)
    return directory


def test_the_run_directory_is_the_record(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert names == {"checkpoints", "config.yaml", "metrics.csv", "samples.txt", "summary.json", "tokenizer.json"}
    config = OmegaConf.load(run / "config.yaml")
    assert config.mixer.num_heads == 2
    assert config.optimizer.lr == 4e-3
    assert not config.model.keys() & {"num_heads", "learning_rate"}  # each is said once
    assert "learning_rate" not in config.mixer
    assert "${" not in (run / "config.yaml").read_text()
    # Two step files are kept; best and last are further names of files.
    assert {path.name for path in (run / "checkpoints").iterdir()} >= {"last.ckpt", "best.ckpt", "step_0000007.ckpt"}
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["lkda"]["step"] == 7


def test_the_summary_says_what_was_measured(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary) == SUMMARY
    assert summary["status"] == "finished"
    assert summary["steps"] == 7
    assert summary["tokens"] == 7 * 2 * 32
    assert summary["test/perplexity"] == pytest.approx(math.exp(summary["test/loss"]))
    assert summary["val/perplexity"] == pytest.approx(math.exp(summary["val/loss"]))
    assert summary["params"] - summary["params_non_embedding"] == 300 * 32
    assert summary["tokens_per_s"] > 0
    # KDA of 2 layers and 2 heads of 16: a 16 x 16 state per head, and 3 caches of 3 tokens of 32 channels, in float32.
    assert summary["state_bytes"] == 2 * 4 * (2 * 16 * 16 + 3 * 3 * 32)
    assert summary["backend"] == resolve_backend("kda", "auto", device="cpu", head_dim=16, dtype=torch.float32)


def test_metrics_have_every_step_and_validation(run: Path) -> None:
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    of_test = ("test/loss", "test/bits_per_byte", *columns(context=32, split="test"))
    assert tuple(rows[0]) == (*COLUMNS, *columns(context=32), *of_test)
    assert [bool(row[name]) for row in rows for name in of_test] == [row is rows[-1] for row in rows for _ in of_test]
    trained = [row for row in rows if row["train/loss"]]
    validated = [row for row in rows if row["val/loss"]]
    assert [int(row["step"]) for row in trained] == list(range(1, 8))
    assert [int(row["step"]) for row in validated] == [3, 6, 7]  # every third, and the last in any case
    assert [int(row["tokens"]) for row in trained] == [64 * step for step in range(1, 8)]
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)
    ratio = {round(float(row["train/loss"]) / float(row["train/bits_per_byte"]), 4) for row in trained}
    assert len(ratio) == 1  # nats per token and bits per byte differ by a constant of the corpus


def test_the_norm_of_the_gradient_and_the_share_of_clipped_steps_are_logged(corpus: Path, tmp_path: Path) -> None:
    steps = ("trainer.max_steps=7", "trainer.gradient_clip_val=1.25", "sample.max_new_tokens=0")
    summary = train(composed("train", *small_run(corpus, *steps)), tmp_path / "run")
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        trained = [row for row in csv.DictReader(file) if row["train/loss"]]
    clipped = [float(row["train/grad_norm"]) > 1.25 for row in trained]
    assert [float(row["train/clipped_share"]) for row in trained] == clipped  # every step has a row
    assert 0 < sum(clipped) < len(clipped)
    assert summary["clipped_share"] == pytest.approx(sum(clipped) / len(clipped), abs=1e-4)


def test_a_checkpoint_is_plain_and_enough(run: Path) -> None:
    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    ours = checkpoint["lkda"]
    assert set(ours) == {"format", "model", "tokenizer", "run", "step", "best"}
    assert json.dumps(ours)  # plain values only
    assert json.loads(ours["tokenizer"]) == json.loads((run / "tokenizer.json").read_text())


def test_a_token_budget_is_turned_into_steps(corpus: Path, tmp_path: Path) -> None:
    config = composed("train", *small_run(corpus, "trainer.max_tokens=200", "sample.max_new_tokens=0"))
    assert train(config, tmp_path / "run")["steps"] == 4  # 200 tokens at 64 per step


@pytest.mark.slow
def test_accumulated_batches_are_one_step(corpus: Path, tmp_path: Path) -> None:
    """Four batches of one row, two of two and one of four are the same steps: the same losses, and weights."""

    def trained(pieces: int) -> tuple[list[float], dict[str, torch.Tensor]]:
        directory = tmp_path / str(pieces)
        settings = (
            f"trainer.accumulate_grad_batches={pieces}",
            f"data.batch_size={4 // pieces}",
            "trainer.max_steps=2",
            "trainer.val_check_interval=2",
            "trainer.precision=64-true",
            "trainer.limit_val_batches=1.0",  # whole, so that the pieces of a batch do not matter
            "sample.max_new_tokens=0",
        )
        summary = train(composed("train", *small_run(corpus, *settings)), directory)
        assert summary["steps"] == 2
        assert summary["tokens"] == 2 * 4 * 32
        with open(directory / "metrics.csv", newline="") as file:
            found = list(csv.DictReader(file))
        assert [int(row["step"]) for row in found if row["train/loss"]] == [1, 2]
        assert [int(row["step"]) for row in found if row["val/loss"]] == [2]  # intervals are of steps
        losses = [float(row[name]) for row in found for name in ("train/loss", "val/loss") if row[name]]
        return losses, read_checkpoint(directory / "checkpoints" / "last.ckpt")["state_dict"]

    losses, weights = trained(1)
    for pieces in (2, 4):
        again, other = trained(pieces)
        assert again == pytest.approx(losses, rel=1e-6)  # the loss is computed in float32
        for name, weight in weights.items():
            torch.testing.assert_close(other[name], weight, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(("asked", "ran", "state"), [("auto", "32-true", "float32"), ("64", "64-true", "float64")])
def test_the_summary_says_what_ran(asked: str, ran: str, state: str, corpus: Path, tmp_path: Path) -> None:
    settings = (f"trainer.precision={asked}", "trainer.max_steps=2", "trainer.limit_val_batches=1")
    summary = train(composed("train", *small_run(corpus, *settings)), tmp_path / "run")
    assert summary["precision"] == ran == OmegaConf.load(tmp_path / "run" / "config.yaml").trainer.precision
    assert summary["state_dtype"] == state
    weight = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["state_dict"]["model.lm_head.weight"]
    assert weight.dtype == (torch.float64 if ran == "64-true" else torch.float32)


def test_a_precision_that_the_trainer_changes_is_refused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lkda.commands.run.run_setup.resolve_precision", lambda word, device: "16-mixed")
    with pytest.raises(ValueError, match=r"trainer\.precision=16-mixed would run as bf16-mixed"):
        train(composed("train", *small_run(corpus)), tmp_path / "run")


def test_nothing_is_shown_without_callbacks(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(composed("train", *small_run(corpus, "trainer.max_steps=2", "callbacks=none")), tmp_path / "run")
    shown = capsys.readouterr()
    assert "Epoch" not in shown.out + shown.err
    assert "it/s" not in shown.out + shown.err


def test_the_time_the_run_takes_is_said_after_its_first_steps(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where there is no terminal too, which a test has none."""
    settings = ("trainer.max_steps=10", "trainer.val_check_interval=10", "callbacks=default")
    train(composed("train", *small_run(corpus, *settings)), tmp_path / "run")
    shown = capsys.readouterr().out
    assert re.search(r"about \d+ s to go: 2 steps at [\d,]+ tokens/s, 1 validation\.", shown), shown


def test_a_validation_of_less_than_a_batch_is_refused(corpus: Path, tmp_path: Path) -> None:
    config = composed("train", *small_run(corpus, "trainer.limit_val_batches=0.01"))
    with pytest.raises(ValueError, match=r"limit_val_batches=0.01 of \d+ validation batches is less than one batch"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("checkpoint=null", "checkpoint must not be null"),
        ("seed=4294967296", "seed must be at most 4294967295, got 4294967296"),
        ("compile=maybe", "compile must be auto, true or false, got 'maybe'"),
        ("checkpointing=layer", "checkpointing must be none or block, got 'layer'"),
        ("checkpointing=true", "checkpointing must be none or block, got True"),
        ("resume=1", "resume must be true or false, got 1"),
        ("init_from=5", "init_from must be the path of an exported directory, got 5"),
        ("trainer._target_=nowhere.Trainer", "Lightning refuses these settings: Error loading 'nowhere.Trainer'"),
    ],
)
def test_settings_that_no_run_can_use_are_refused(settings: str, message: str, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        train(composed("train", *small_run(corpus, settings)), tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_the_same_seed_gives_the_same_run(run: Path, corpus: Path, tmp_path: Path) -> None:
    def losses(directory: Path) -> list[str]:
        with open(directory / "metrics.csv", newline="") as file:
            return [row["train/loss"] for row in csv.DictReader(file)]

    for seed in (1, 2):
        train(composed("train", *small_run(corpus, f"seed={seed}", "trainer.max_steps=7")), tmp_path / str(seed))
    assert losses(tmp_path / "1") == losses(run)
    assert losses(tmp_path / "2") != losses(run)


@pytest.mark.slow
def test_a_compiled_run_learns_the_same(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as traced: what inductor makes of it is not ours to test. The mixer is one that is traced
    in a second; tests/models traces the others, whole."""
    settings = small_run(corpus, "mixer=softmax", "trainer.max_steps=7", "sample.max_new_tokens=0")
    usual = train(composed("train", *settings), tmp_path / "usual")
    compiled = []

    def traced(function, **options):
        compiled.append(function)
        return compiler(function, **options | {"backend": "eager"})

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", traced)
    found = train(composed("train", *settings, "compile=true"), tmp_path / "compiled")
    assert len(compiled) == 1  # the call of a block, in training and validation
    assert found["val/loss"] == pytest.approx(usual["val/loss"], rel=1e-5)


@pytest.mark.slow
def test_checkpointing_changes_no_loss(run: Path, corpus: Path, tmp_path: Path) -> None:
    """The run without the option in its configuration, as of an earlier version, can be resumed."""
    words = ("trainer.max_steps=7", "sample.max_new_tokens=0")
    found = train(composed("train", *small_run(corpus, *words, "checkpointing=block")), tmp_path / "run")
    assert found["val/loss"] == json.loads((run / "summary.json").read_text())["val/loss"]
    assert found["checkpointing"] == "block"
    recorded = tmp_path / "run" / "config.yaml"
    assert "checkpointing: block\n" in recorded.read_text()
    recorded.write_text(recorded.read_text().replace("checkpointing: block\n", ""))
    longer = ("trainer.max_steps=8", "sample.max_new_tokens=0", "resume=true")
    found = train(composed("train", *small_run(corpus, *longer)), tmp_path / "run")
    assert (found["steps"], found["checkpointing"]) == (8, "none")


@pytest.mark.slow
def test_training_goes_on_where_nobody_reads_what_it_prints(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in `scripts/train.py ... | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    words = [*small_run(corpus, "callbacks=default"), f"hydra.run.dir={tmp_path}/run"]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    with os.fdopen(writer, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        runpy.run_path(str(ROOT / "scripts" / "train.py"), run_name="__main__")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"
    assert (tmp_path / "run" / "samples.txt").exists()
    assert capsys.readouterr().err == "the output is no longer read: training continues without printing\n"


def test_the_sample_ends_with_its_document(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token that ends it, drawn, ends the text before it."""
    train(composed("train", *small_run(corpus, "trainer.max_steps=2", "sample.max_new_tokens=0")), tmp_path / "run")
    trained = load_trained(tmp_path / "run")
    options = {"max_new_tokens": 20, "temperature": 1.0, "top_p": 1.0}
    prompt = encode_prompt(trained.tokenizer, "The people")
    drawn = list(generate(trained.model, prompt, seed=1, **options))
    end = next(n for n in range(2, 20) if drawn[n] not in drawn[:n])
    monkeypatch.setattr("lkda.commands.run.console.document_ends", lambda tokenizer: (drawn[end],))
    sample = draw_sample(trained.model, trained.tokenizer, SampleOptions("The people", **options), seed=1)
    assert sample == "The people" + "".join(text_pieces(trained.tokenizer, drawn[:end]))


def test_a_profile_is_written_into_the_run_directory(corpus: Path, tmp_path: Path) -> None:
    train(composed("train", *small_run(corpus, "+trainer.profiler=simple", "trainer.max_steps=2")), tmp_path / "run")
    assert "run_training_batch" in (tmp_path / "run" / "fit-profile.txt").read_text()


def test_layers_without_backends_name_none(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("mixer=conv", "trainer.max_steps=1", "sample.max_new_tokens=0")
    assert train(composed("train", *small_run(corpus, *words)), tmp_path / "run")["backend"] is None
    assert "on cpu, 32-true; 1 steps of 64 tokens" in capsys.readouterr().out
