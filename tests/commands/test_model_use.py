"""What can be done with a trained model: evaluate, generate, export, load."""

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.progress import Progress
from tokenizers import Tokenizer, models

import lkda
from lkda.commands.command_line.overrides import as_typed, override
from lkda.commands.command_line.text import encode_prompt, text_pieces
from lkda.commands.evaluate import evaluate
from lkda.commands.export import export
from lkda.commands.generate import generate
from lkda.commands.run.checkpoint_loading import load_trained
from lkda.commands.train import train
from lkda.data.text.cache import publish
from lkda.data.text.documents import Splits
from lkda.data.text.tokenize import tokenize_splits
from lkda.data.text.tokenizer import END_OF_TEXT
from lkda.models.decoder import Decoder
from lkda.special_tokens import document_ends
from tests.commands.small import composed, small_run

# The hybrid has both kinds of state, one that grows and one that does not.
MIXERS = ["kda_mla_3to1", *(pytest.param(mixer, marks=pytest.mark.slow) for mixer in ("simplified", "softmax"))]
MIXERS += [pytest.param(mixer, marks=pytest.mark.long) for mixer in ("kda", "mla")]


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


@pytest.mark.slow
def test_a_loss_whose_perplexity_is_no_number(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate that is too large may leave a finite loss of thousands. The run has finished all the same."""
    monkeypatch.setattr("lkda.perplexity._LARGEST_LOSS", 1.0)
    words = ("trainer.max_steps=1", "sample.max_new_tokens=0")
    assert train(composed("train", *small_run(corpus, *words)), tmp_path / "run")["status"] == "finished"
    assert evaluate(composed("evaluate", f"ckpt={tmp_path}/run", "accelerator=cpu"))["perplexity"] is None
    assert capsys.readouterr().out.count("too large for a number") == 2
    export(composed("export", f"ckpt={tmp_path}/run", f"out={tmp_path}/exported"))


def test_what_is_measured_can_be_written_down(run: Path, tmp_path: Path) -> None:
    result = evaluate(composed("evaluate", f"ckpt={run}", "accelerator=cpu", f"out={tmp_path}/result.json"))
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["result"] == result
    assert record["run"]["mixer"] == "kda"
    assert record["data"]["context"] == 32


@pytest.mark.sample(2)
@pytest.mark.parametrize("form", ["lkda", "hf"])
def test_an_exported_directory_is_measured_on_the_data_of_its_run(run: Path, form: str, tmp_path: Path) -> None:
    """Also one that was exported from an exported one."""
    summary = json.loads((run / "summary.json").read_text())
    export(composed("export", f"ckpt={run}", f"out={tmp_path}/one", f"format={form}"))
    export(composed("export", f"ckpt={tmp_path}/one", f"out={tmp_path}/two"))
    for directory in (tmp_path / "one", tmp_path / "two"):
        result = evaluate(composed("evaluate", f"ckpt={directory}", "accelerator=cpu"))
        assert result["loss"] == pytest.approx(summary["val/loss"], rel=1e-5)
    (tmp_path / "two" / "README.md").unlink()
    with pytest.raises(ValueError, match=r"two does not record what data it was trained on: give data="):
        evaluate(composed("evaluate", f"ckpt={tmp_path}/two", "accelerator=cpu"))


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "data",
    [
        {"_target_": "os.system", "command": "true"},
        {"_target_": "lkda.data.prose.sources.subprocess.run", "args": "true"},
        {"_target_": "lkda.data.prose.sources.Source", "package": "x"},
        {"_target_": "lkda.data.missing.Module"},
        {"_target_": "lkda.data.text.datamodule.TextDataModule", "paths": [{"_target_": "os.getcwd"}]},
        {"_target_": "lkda.data.text.datamodule.TextDataModule", "_partial_": True},
    ],
)
def test_an_exported_directory_names_no_code(run: Path, data: dict[str, Any], tmp_path: Path) -> None:
    export(composed("export", f"ckpt={run}", f"out={tmp_path}/one"))
    card = tmp_path / "one" / "README.md"
    before = card.read_text().partition("## Configuration")[0]
    card.write_text(f"{before}## Configuration\n\n```yaml\n{json.dumps({'data': data})}\n```\n")
    with pytest.raises(ValueError, match=data["_target_"] + ", which is not a data module of lkda"):
        evaluate(composed("evaluate", f"ckpt={tmp_path}/one", "accelerator=cpu"))
    card.write_text(f"{before}## Configuration\n\n```yaml\n[\n```\n")
    with pytest.raises(ValueError, match=r"the configuration in .*README.md is not YAML"):
        evaluate(composed("evaluate", f"ckpt={tmp_path}/one", "accelerator=cpu"))


def test_the_test_split_is_measured_as_at_the_end_of_the_run(run: Path, tmp_path: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    words = (f"ckpt={run}", "accelerator=cpu", f"out={tmp_path}/out.json")
    found = evaluate(composed("evaluate", *words, "split=test"))
    assert found["loss"] == pytest.approx(summary["test/loss"], rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(summary["test/bits_per_byte"], rel=1e-6)
    assert found["unigram_entropy"] == summary["test_unigram_entropy"]
    assert json.loads((tmp_path / "out.json").read_text())["split"] == "test"
    assert found["loss"] != evaluate(composed("evaluate", *words))["loss"]
    assert json.loads((tmp_path / "out.json").read_text())["split"] == "validation"
    with pytest.raises(ValueError, match="split must be validation or test, got 'train'"):
        evaluate(composed("evaluate", f"ckpt={run}", "split=train"))


def test_evaluating_other_text_uses_the_models_tokenizer(run: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    data = ["data=files", f"data.paths=[{tmp_path}/other.txt]", "data.context=32", "data.batch_size=2"]
    own = evaluate(composed("evaluate", f"ckpt={run}", "accelerator=cpu"))
    other = evaluate(composed("evaluate", f"ckpt={run}/checkpoints/last.ckpt", "accelerator=cpu", *data))
    assert other["bits_per_byte"] > own["bits_per_byte"] + 0.5


def prepared(directory: Path, text: str) -> list[str]:
    """Overrides for data that were tokenized once, as by scripts/prepare_data.py."""
    (built := directory.with_name("built")).mkdir()
    with Progress(disable=True) as progress:
        metadata = tokenize_splits(
            Splits([text * 40], [text * 8]), built, given=None, vocab_size=300, progress=progress
        )
    publish(built, directory, metadata)
    return ["data=prose", f"data.directory={directory}", "data.context=32", "data.batch_size=2"]


@pytest.mark.slow
def test_a_model_of_prepared_text_is_evaluated_on_it_and_on_no_other(run: Path, corpus: Path, tmp_path: Path) -> None:
    data = prepared(tmp_path / "prose", "It was the best of times, it was the worst of times. ")
    changes = [override for override in small_run(corpus) if not override.startswith("data")]
    summary = train(composed("train", *changes, *data, "trainer.limit_val_batches=1.0"), tmp_path / "run")
    tokens = len(np.load(tmp_path / "prose" / "validation.npy"))
    halves = {"first": [0, tokens // 2], "second": [tokens // 2, tokens]}
    manifest = {"sources": [{"name": n, "tokens": {"validation": p}, "validation_bytes": 9} for n, p in halves.items()]}
    (tmp_path / "prose" / "manifest.json").write_text(json.dumps(manifest))
    result = evaluate(composed("evaluate", f"ckpt={tmp_path / 'run'}", "accelerator=cpu"))
    assert result["loss"] == pytest.approx(summary["val/loss"], rel=1e-6)
    own = [(source["tokens"], source["loss"]) for source in result["by_source"].values()]
    assert [count for count, _ in own] == [tokens // 2 - 1, tokens - tokens // 2]
    assert sum(count * loss for count, loss in own) / sum(count for count, _ in own) == pytest.approx(result["loss"])
    part = evaluate(composed("evaluate", f"ckpt={tmp_path / 'run'}", "accelerator=cpu", "max_batches=1"))
    sizes = [source["tokens"] * source["loss"] / source["bits_per_byte"] for source in part["by_source"].values()]
    assert part["tokens"] < tokens - 1
    assert sum(sizes) == pytest.approx(part["tokens"] * part["loss"] / part["bits_per_byte"], rel=0.02)
    weights = {name: count for name, count in result.items() if name.startswith("loss_from_")}
    assert set(weights) == {"loss_from_0", *(f"loss_from_{2**n}" for n in range(5))}
    with pytest.raises(ValueError, match="another tokenizer"):
        evaluate(composed("evaluate", f"ckpt={run}", "accelerator=cpu", *data))


def test_brackets_of_a_path_are_shown(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are no markup of the terminal."""
    (tmp_path / "[a]").symlink_to(run, target_is_directory=True)
    (ckpt,) = as_typed([override("ckpt", f"{tmp_path}/[a]")])
    evaluate(composed("evaluate", ckpt, "accelerator=cpu", "max_batches=1"))
    printed = capsys.readouterr().out
    assert "[a]" in printed
    assert all(f"loss, {where}" in printed for where in ("position 0", "positions 2 to 3", "from position 16"))


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


@pytest.mark.parametrize("ending", [b"", b"\n", b"\r\n"])
def test_prompts_come_from_three_places(
    ending: bytes, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same text is the same prompt; a file's last line end is no part of it."""
    expected = greedy(run, "prompt='  a farmer\n\nreads '")
    (tmp_path / "prompt.txt").write_bytes(b"  a farmer\n\nreads " + ending)
    assert greedy(run, f"prompt_file={tmp_path}/prompt.txt") == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"  a farmer\n\nreads " + ending)))
    assert greedy(run) == expected


def test_only_one_line_end_is_dropped(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a farmer\n\n")))
    assert greedy(run).startswith("a farmer\n")


def test_without_standard_input_it_says_so(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match="no standard input to read the prompt from: give prompt="):
        greedy(run)


def test_an_empty_prompt_begins_a_document(run: Path) -> None:
    tokenizer = load_trained(run).tokenizer
    assert encode_prompt(tokenizer, "").tolist() == [[tokenizer.token_to_id(END_OF_TEXT)]]
    greedy(run, "prompt=''")


def test_the_speed_and_the_reason_to_stop_go_to_stderr(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate(composed("generate", f"ckpt={run}", "prompt=a", "accelerator=cpu", "max_new_tokens=5"))
    printed = capsys.readouterr()
    assert re.fullmatch(r"5 tokens, .* tokens/s on cpu; stopped: max_new_tokens=5\n", printed.err)
    assert "tokens/s" not in printed.out


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_document_that_ends_ends_the_text(
    ignore_eos: bool, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that draws END_OF_TEXT after four tokens."""
    tokenizer = load_trained(run).tokenizer
    drawn = iter([tokenizer.token_to_id(token) for token in ("a", "b", "c", "d", END_OF_TEXT, "e")])
    monkeypatch.setattr(Decoder, "sample", lambda *arguments: torch.tensor([next(drawn)]))
    text = greedy(run, "prompt=x", "max_new_tokens=6", f"ignore_eos={ignore_eos}")
    count, reason = ("6", "max_new_tokens=6") if ignore_eos else ("4", "the document ended")
    assert text == ("xabcde" if ignore_eos else "xabcd")
    assert re.fullmatch(rf"{count} tokens, .*; stopped: {reason}\n", capsys.readouterr().err)


def test_a_special_token_spelled_in_a_prompt_is_text(run: Path) -> None:
    tokenizer = load_trained(run).tokenizer
    (tokens,) = encode_prompt(tokenizer, f"one{END_OF_TEXT}two").tolist()
    end = tokenizer.token_to_id(END_OF_TEXT)
    assert tokens[0] == end
    assert end not in tokens[1:]
    assert tokenizer.decode(tokens[1:]) == f"one{END_OF_TEXT}two"


@pytest.mark.parametrize(
    ("special", "start", "ends"),
    [
        (["<s>", "</s>"], "<s>", {"<s>", "</s>"}),
        (["<pad>", "<eos>"], "<eos>", {"<eos>"}),
        (
            ["[PAD]", "<|begin_of_text|>", "<|end_of_text|>"],
            "<|begin_of_text|>",
            {"<|begin_of_text|>", "<|end_of_text|>"},
        ),
        (["[PAD]"], None, set()),
        ([], None, set()),
    ],
)
def test_other_tokenizers_begin_and_end_documents_in_their_way(
    special: list[str], start: str | None, ends: set[str]
) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.add_special_tokens(special)
    first = [] if start is None else [tokenizer.token_to_id(start)]
    assert encode_prompt(tokenizer, "b").tolist() == [[*first, 1]]
    assert {tokenizer.id_to_token(token) for token in document_ends(tokenizer)} == ends
    if start is None:
        with pytest.raises(ValueError, match="the prompt is empty, and the tokenizer has no token that begins"):
            encode_prompt(tokenizer, "")


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
    assert "".join(text_pieces(tokenizer, [*tokenizer.encode("a").ids, end, *rocket])) == "a🚀"


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
