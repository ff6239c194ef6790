"""Runs on data whose tokens are no text: what they leave behind, and what other commands make of them."""

import json
from pathlib import Path

import pytest

import lkda
from lkda.checks import InputError
from lkda.commands.evaluate import evaluate
from lkda.commands.export import export
from lkda.commands.generate import generate
from lkda.commands.train import train
from lkda.training.checkpoint import read_checkpoint
from tests.commands.small import composed, rows, small_run
from tests.generation.test_generate import byte_tokenizer, model_of

TINY = (
    *("trainer=cpu", "callbacks=none", "model=recall", "mixer=conv_kda", "model.d_model=32", "data=mqar"),
    *("data.vocab_size=64", "data.batch_size=4", "data.train=[{length: 32, pairs: 2, examples: 16}]"),
    "data.validation=[{length: 32, pairs: 2, examples: 10}, {length: 64, pairs: 8, examples: 6}]",
    *("trainer.val_check_interval=3", "trainer.log_every_n_steps=1", "checkpoint.every_n_steps=2"),
)
SUBSETS = ("length_32_pairs_2", "length_64_pairs_8")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "one"
    train(composed("train", *TINY, "trainer.max_steps=7"), directory)
    return directory


def test_the_record(run: Path) -> None:
    assert {path.name for path in run.iterdir()} == {"checkpoints", "config.yaml", "metrics.csv", "summary.json"}
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["lkda"]["tokenizer"] is None
    summary = json.loads((run / "summary.json").read_text())
    assert summary["data"] == "mqar"
    assert summary["val/bits_per_byte"] is summary["unigram_entropy"] is summary["val/perplexity"] is None
    assert [record["subset"] for record in summary["val_subsets"]] == [
        {"length": 32, "pairs": 2},
        {"length": 64, "pairs": 8},
    ]
    assert tuple(record["name"] for record in summary["val_subsets"]) == SUBSETS
    assert summary["tokens"] == 7 * 4 * 32
    validated = [row for row in rows(run) if row["val/accuracy"]]
    assert [int(row["step"]) for row in validated] == [3, 6, 7]
    assert all(
        row[f"val/{metric}/{subset}"] for row in validated for subset in SUBSETS for metric in ("accuracy", "loss")
    )
    assert summary["val_subsets"][1]["loss"] == float(validated[-1]["val/loss/length_64_pairs_8"])


def test_the_closing_lines_say_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(composed("train", *TINY, "trainer.max_steps=1"), tmp_path / "run")
    shown = capsys.readouterr().out
    assert "accuracy, length 64, pairs 8" in shown
    assert "generate.py" not in shown


@pytest.mark.slow
def test_a_resumed_run_is_the_same_run(run: Path, tmp_path: Path) -> None:
    constant = "scheduler=constant"
    train(composed("train", *TINY, constant, "trainer.max_steps=7"), tmp_path / "straight")
    train(composed("train", *TINY, constant, "trainer.max_steps=6"), tmp_path / "halves")
    train(composed("train", *TINY, constant, "trainer.max_steps=7", "resume=true"), tmp_path / "halves")
    assert rows(tmp_path / "halves") == rows(tmp_path / "straight")


def test_evaluate_finds_what_training_found(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    result = evaluate(composed("evaluate", f"ckpt={run}", "accelerator=cpu"))
    assert result["loss"] == pytest.approx(summary["val/loss"], rel=1e-5)
    for there, here in zip(summary["val_subsets"], result["val_subsets"], strict=True):
        assert (here["name"], here["subset"]) == (there["name"], there["subset"])
        assert here["accuracy"] == pytest.approx(there["accuracy"])
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-5)


def test_what_needs_text_says_so(run: Path, corpus: Path, tmp_path: Path) -> None:
    no_text = "was trained on mqar, whose tokens are not text"
    with pytest.raises(ValueError, match=no_text):
        generate(composed("generate", f"ckpt={run}", "prompt=a", "accelerator=cpu"))
    with pytest.raises(ValueError, match=no_text):
        export(composed("export", f"ckpt={run}", f"out={tmp_path}/out"))
    with pytest.raises(ValueError, match=no_text):
        evaluate(composed("evaluate", f"ckpt={run}", "data=files", f"data.paths=[{corpus}]", "accelerator=cpu"))
    lkda.export(model_of(["kda"]), byte_tokenizer(), tmp_path / "exported")
    with pytest.raises(ValueError, match="init_from needs data of text"):
        train(composed("train", *TINY, f"init_from={tmp_path}/exported", "optimizer.lr=1e-3"), tmp_path / "run")


def test_a_model_of_text_is_not_asked_for_recall(corpus: Path, tmp_path: Path) -> None:
    train(composed("train", *small_run(corpus, "trainer.max_steps=1", "sample.max_new_tokens=0")), tmp_path / "run")
    with pytest.raises(ValueError, match="is a model of text"):
        evaluate(composed("evaluate", f"ckpt={tmp_path}/run", "data=mqar", "accelerator=cpu"))


def test_random_tokens_are_not_measured(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are trained on to measure speed. What a run prints at its end does not advise it."""
    for words in ((), ("data.vocab_size=64",)):
        with pytest.raises(InputError, match="data=random cannot be measured"):
            evaluate(composed("evaluate", f"ckpt={run}", "data=random", *words, "accelerator=cpu"))
    train(composed("train", "debug=fast", "data=random", "trainer=cpu", "trainer.max_steps=1"), tmp_path / "run")
    assert "evaluate.py" not in capsys.readouterr().out
    with pytest.raises(InputError, match=r"was trained on data=random, .*: give data=... to measure it on other data"):
        evaluate(composed("evaluate", f"ckpt={tmp_path}/run", "accelerator=cpu"))


def test_a_larger_vocabulary_than_the_models_is_refused(run: Path) -> None:
    with pytest.raises(ValueError, match="the data need 8192 rows, but the model has 64"):
        evaluate(composed("evaluate", f"ckpt={run}", "data=mqar", "accelerator=cpu"))
