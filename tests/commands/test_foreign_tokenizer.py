"""Fine-tuning a model whose tokenizer was made elsewhere, with other special tokens or with none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import lkda
from lkda.commands.evaluate import evaluate
from lkda.commands.generate import generate
from lkda.commands.train import train
from lkda.data.text.tokenizer import document_start
from lkda.models import build_model
from tests.commands.small import composed, small_run


def of_bytes(*special: str) -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(list(special))
    return made


@pytest.mark.parametrize(
    ("format", "special"),
    [
        ("lkda", ()),
        pytest.param("hf", ("<s>", "</s>"), marks=pytest.mark.slow),
        pytest.param("lkda", ("<pad>", "[EOS]"), marks=pytest.mark.long),
        pytest.param("hf", (), marks=pytest.mark.long),
        pytest.param("lkda", ("<s>", "</s>"), marks=pytest.mark.long),
        pytest.param("hf", ("<pad>", "[EOS]"), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_model_is_fine_tuned_evaluated_and_continued(special, format, corpus: Path, tmp_path: Path) -> None:
    tokenizer = of_bytes(*special)
    mixer = {"pattern": ["kda", "mla"], "num_heads": 2}
    sizes = {"vocab_size": 260, "d_model": 32, "num_layers": 2, "mlp_hidden": 32, "context": 32}
    lkda.export(build_model({**sizes, "mixer": mixer}), tokenizer, tmp_path / "start", format=format)
    more = (f"init_from={tmp_path}/start", "trainer.max_steps=2", f"data.cache_dir={tmp_path}/cache")
    summary = train(composed("train", *small_run(corpus, *more)), tmp_path / "run")
    assert summary["status"] == "finished"
    for checkpoint in (tmp_path / "start", tmp_path / "run"):
        data = ("data=files", f"data.paths=[{corpus}]", "data.context=32", "data.batch_size=2")
        found = evaluate(composed("evaluate", f"ckpt={checkpoint}", "accelerator=cpu", *data))
        assert found["loss"] > 0
        written = generate(composed("generate", f"ckpt={checkpoint}", "prompt='the </s>'", "max_new_tokens=3"))
        assert written.startswith("the </s>")


@pytest.mark.parametrize("special", [(), ("<s>", "</s>"), ("<pad>", "[EOS]")], ids=str)
def test_other_tools_begin_a_document_as_training_does(special, tmp_path: Path) -> None:
    tokenizer = of_bytes(*special)
    sizes = {"vocab_size": 260, "d_model": 32, "num_layers": 1, "mlp_hidden": 32, "context": 32}
    model = build_model({**sizes, "mixer": {"pattern": ["softmax"], "num_heads": 2}})
    lkda.export(model, tokenizer, tmp_path / "out", format="hf")
    written = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    start = document_start(tokenizer)
    assert written.encode("a").ids == [*([] if start is None else [start]), *tokenizer.encode("a").ids]
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["bos_token_id"] == start
