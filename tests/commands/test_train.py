"""A run from start to end, and what it leaves behind."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from lkda.commands.train import train
from lkda.training.checkpoint import read_checkpoint
from lkda.training.metrics_csv import COLUMNS
from lkda.training.positions import columns
from tests.commands.small import composed, small_run

SUMMARY = {
    "status", "val/loss", "val/perplexity", "val/bits_per_byte", "unigram_entropy", "tokens", "tokens_per_s", "params",
    "params_non_embedding", "state_bytes", "flops_per_token", "mixer", "model", "data", "context", "backend", "device",
    "precision", "seed", "steps", "seconds", "learning_rate", "git_commit", "versions",
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
    assert config.mixer.num_heads == config.model.num_heads == 2
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
    assert summary["val/perplexity"] == pytest.approx(math.exp(summary["val/loss"]))
    assert summary["params"] - summary["params_non_embedding"] == 300 * 32
    assert summary["tokens_per_s"] > 0
    # KDA of 2 layers and 2 heads of 16: a 16 x 16 state a head, and 3 caches of 3 tokens of 32 channels, in float32.
    assert summary["state_bytes"] == 2 * 4 * (2 * 16 * 16 + 3 * 3 * 32)
    assert summary["backend"] == "chunk"


def test_metrics_have_every_step_and_validation(run: Path) -> None:
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == (*COLUMNS, *columns(context=32))
    trained = [row for row in rows if row["train/loss"]]
    validated = [row for row in rows if row["val/loss"]]
    assert [int(row["step"]) for row in trained] == list(range(1, 8))
    assert [int(row["step"]) for row in validated] == [3, 6, 7]  # every third, and the last in any case
    assert [int(row["tokens"]) for row in trained] == [64 * step for step in range(1, 8)]
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)
    ratio = {round(float(row["train/loss"]) / float(row["train/bits_per_byte"]), 4) for row in trained}
    assert len(ratio) == 1  # nats a token and bits a byte differ by a constant of the corpus


def test_a_checkpoint_is_plain_and_enough(run: Path) -> None:
    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    ours = checkpoint["lkda"]
    assert set(ours) == {"format", "model", "tokenizer", "run", "step", "best"}
    assert json.dumps(ours)  # plain values only
    assert ours["tokenizer"] == (run / "tokenizer.json").read_text() or json.loads(ours["tokenizer"])


def test_a_token_budget_is_turned_into_steps(corpus: Path, tmp_path: Path) -> None:
    config = composed("train", *small_run(corpus, "trainer.max_tokens=200", "sample.max_new_tokens=0"))
    assert train(config, tmp_path / "run")["steps"] == 4  # 200 tokens at 64 a step


def test_accumulated_batches_are_one_step(corpus: Path, tmp_path: Path) -> None:
    """Two batches of one row make the step that one batch of two rows makes, where the rows are the same."""
    settings = ("trainer.accumulate_grad_batches=2", "data.batch_size=1", "trainer.max_steps=4")
    summary = train(composed("train", *small_run(corpus, *settings)), tmp_path / "run")
    assert summary["steps"] == 4
    assert summary["tokens"] == 4 * 2 * 32
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]] == [1, 2, 3, 4]


def test_the_same_seed_gives_the_same_run(run: Path, corpus: Path, tmp_path: Path) -> None:
    def losses(directory: Path) -> list[str]:
        with open(directory / "metrics.csv", newline="") as file:
            return [row["train/loss"] for row in csv.DictReader(file)]

    for seed in (1, 2):
        train(composed("train", *small_run(corpus, f"seed={seed}", "trainer.max_steps=7")), tmp_path / str(seed))
    assert losses(tmp_path / "1") == losses(run)
    assert losses(tmp_path / "2") != losses(run)


def test_a_compiled_run_learns_the_same(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as traced: what inductor makes of it is not ours to test. The mixer is one that is traced
    in a second; tests/models traces the others, whole."""
    settings = small_run(corpus, "mixer=softmax", "trainer.max_steps=7", "sample.max_new_tokens=0")
    usual = train(composed("train", *settings), tmp_path / "usual")
    compiled = []

    def traced(function, **options):
        compiled.append(function)
        return compiler(function, backend="eager", **options)

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", traced)
    found = train(composed("train", *settings, "compile=true"), tmp_path / "compiled")
    assert len(compiled) == 2  # the training loss, and the validation losses
    assert found["val/loss"] == pytest.approx(usual["val/loss"], rel=1e-5)
