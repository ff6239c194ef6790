"""What can be done with a trained model: evaluate, generate, export, load."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from rich.progress import Progress
from tokenizers import Tokenizer

import lkda
from lkda.commands.evaluate import evaluate
from lkda.commands.export import export
from lkda.commands.generate import generate
from lkda.commands.model_source import load_trained
from lkda.commands.text import END_OF_TEXT, text_pieces
from lkda.commands.train import train
from lkda.data.cache import publish
from lkda.data.prepared import tokenise
from tests.commands.small import composed, small_run

# The first three have every kind of state among them.
ALONE = (pytest.param(mixer, marks=pytest.mark.slow) for mixer in ("kda", "mla"))
MIXERS = ["simplified", "softmax", "kda_mla_3to1", *ALONE]


@pytest.fixture(scope="module", params=MIXERS)
def trained(request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each kind of state, a few steps long."""
    directory = tmp_path_factory.mktemp("runs") / request.param
    train(composed("train", *small_run(corpus, f"mixer={request.param}", "model.num_layers=4")), directory)
    return directory


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "run"
    train(composed("train", *small_run(corpus, "trainer.limit_val_batches=1.0")), directory)
    return directory


def test_evaluating_repeats_the_validation(run: Path) -> None:
    """Of the run's own data, with all of its batches, as at the end of training."""
    summary = json.loads((run / "summary.json").read_text())
    result = evaluate(composed("evaluate", f"ckpt={run}", "accelerator=cpu"))
    assert result["loss"] == pytest.approx(summary["val/loss"], rel=1e-6)
    assert result["bits_per_byte"] == pytest.approx(summary["val/bits_per_byte"], rel=1e-6)
    assert result["perplexity"] == pytest.approx(summary["val/perplexity"], rel=1e-5)
    assert result["unigram_entropy"] == pytest.approx(summary["unigram_entropy"])


def test_what_is_measured_can_be_written_down(run: Path, tmp_path: Path) -> None:
    result = evaluate(composed("evaluate", f"ckpt={run}", "accelerator=cpu", f"out={tmp_path}/result.json"))
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["result"] == result
    assert record["run"]["mixer"] == "kda"
    assert record["data"]["context"] == 32


def test_evaluating_other_text_uses_the_models_tokenizer(run: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    data = ["data=files", f"data.paths=[{tmp_path}/other.txt]", "data.context=32", "data.batch_size=2"]
    own = evaluate(composed("evaluate", f"ckpt={run}", "accelerator=cpu"))
    other = evaluate(composed("evaluate", f"ckpt={run}/checkpoints/last.ckpt", "accelerator=cpu", *data))
    assert other["bits_per_byte"] > own["bits_per_byte"] + 0.5


def prepared(directory: Path, text: str) -> list[str]:
    """Overrides for data that were tokenised once, as by scripts/prepare_data.py."""
    (built := directory.with_name("built")).mkdir()
    with Progress(disable=True) as progress:
        facts = tokenise([text * 40], [text * 8], built, given=None, vocab_size=300, progress=progress)
    publish(built, directory, facts)
    return ["data=prose", f"data.directory={directory}", "data.context=32", "data.batch_size=2"]


def test_a_model_of_prepared_text_is_evaluated_on_it_and_on_no_other(run: Path, corpus: Path, tmp_path: Path) -> None:
    data = prepared(tmp_path / "prose", "It was the best of times, it was the worst of times. ")
    changes = [override for override in small_run(corpus) if not override.startswith("data")]
    summary = train(composed("train", *changes, *data, "trainer.limit_val_batches=1.0"), tmp_path / "run")
    result = evaluate(composed("evaluate", f"ckpt={tmp_path / 'run'}", "accelerator=cpu"))
    assert result["loss"] == pytest.approx(summary["val/loss"], rel=1e-6)
    weights = {name: count for name, count in result.items() if name.startswith("loss_from_")}
    assert set(weights) == {"loss_from_0", *(f"loss_from_{2**n}" for n in range(5))}
    with pytest.raises(ValueError, match="another tokenizer"):
        evaluate(composed("evaluate", f"ckpt={run}", "accelerator=cpu", *data))


def greedy(ckpt: Path, *overrides: str) -> str:
    out = io.StringIO()
    settings = ("accelerator=cpu", "temperature=0", "max_new_tokens=24", *overrides)
    text = generate(composed("generate", f"ckpt={ckpt}", *settings), out=out)
    assert out.getvalue() == text + "\n"
    return text


def test_streamed_text_is_that_of_the_whole_forward(trained: Path) -> None:
    """Greedy decoding by `step` draws what the likeliest tokens of ever longer forwards spell."""
    source = load_trained(trained)
    tokens = [source.tokenizer.token_to_id(END_OF_TEXT), *source.tokenizer.encode("the president").ids]
    prompt = len(tokens)
    with torch.inference_mode():
        for _ in range(24):
            token = int(source.model(torch.tensor([tokens]))[0, -1].argmax())
            if token == tokens[0]:
                break
            tokens.append(token)
    assert greedy(trained, "prompt=the president") == "the president" + source.tokenizer.decode(tokens[prompt:])


def test_prompts_come_from_three_places(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = greedy(run, "prompt=a farmer reads")
    (tmp_path / "prompt.txt").write_text("a farmer reads")
    assert greedy(run, f"prompt_file={tmp_path}/prompt.txt") == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a farmer reads\n")))
    assert greedy(run) == expected


def test_the_speed_goes_to_stderr(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate(composed("generate", f"ckpt={run}", "prompt=a", "accelerator=cpu", "max_new_tokens=5"))
    printed = capsys.readouterr()
    assert "tokens/s on cpu" in printed.err
    assert "tokens/s" not in printed.out


def test_the_seed_decides_the_draw(run: Path) -> None:
    drawn = {seed: greedy(run, "prompt=a", "temperature=1.0", f"seed={seed}") for seed in (1, 2)}
    assert drawn[1] != drawn[2]
    assert drawn[1] == greedy(run, "prompt=a", "temperature=1.0", "seed=1")


@pytest.mark.parametrize("text", ["plain words", "naïve café", "日本語 and 🚀🚀", "…"])
def test_characters_of_several_tokens_come_whole(run: Path, text: str) -> None:
    """A tokenizer of 300 tokens spells most of these byte by byte."""
    tokenizer = load_trained(run).tokenizer
    pieces = list(text_pieces(tokenizer, tokenizer.encode(text).ids))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_unfinished_character_and_the_end_of_a_document(run: Path) -> None:
    tokenizer = load_trained(run).tokenizer
    rocket = tokenizer.encode("🚀").ids
    assert "".join(text_pieces(tokenizer, rocket[:-1])) == "\ufffd"
    end = tokenizer.token_to_id(END_OF_TEXT)
    assert "".join(text_pieces(tokenizer, [*tokenizer.encode("a").ids, end, *rocket])) == "a"


def test_an_exported_directory_loads(trained: Path, tmp_path: Path) -> None:
    """Same tokens, same logits, and everything else that reads a checkpoint reads the directory too."""
    out = export(composed("export", f"ckpt={trained}", f"out={tmp_path}/model"))
    assert {path.name for path in out.iterdir()} == {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "README.md",
    }
    model, tokenizer = lkda.load(out)
    assert isinstance(tokenizer, Tokenizer)
    source = load_trained(trained)
    tokens = torch.randint(300, (2, 45), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = model(tokens)
        assert logits.shape == (2, 45, 300)
        assert torch.equal(logits, source.model(tokens))
    assert greedy(out, "prompt=my neighbour") == greedy(trained, "prompt=my neighbour")
    # And on to another directory, without a loss.
    lkda.export(model, tokenizer, tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
