"""The smallest files for which a loader once crashed: each is refused with one line that names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lkda
from lkda.checks import InputError
from lkda.commands.run.checkpoint_loading import load_trained
from lkda.commands.run.run_directory import fingerprint_of
from lkda.data.text.token_shards import load_shard
from lkda.report.read.runs import read_run
from tests.formats.models import model, tokenizer
from tests.fuzz.test_loaders import RUN, checkpoint


def without(value: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: entry for key, entry in value.items() if key != name}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda found: without(found, "state_dict"), r"x\.ckpt is damaged: .*KeyError: 'state_dict'"),
        (lambda found: {**found, "lkda": []}, r"x\.ckpt is not a checkpoint of lkda"),
        (lambda found: {**found, "lkda": without(found["lkda"], "format")}, r"x\.ckpt has checkpoint format None"),
        (lambda found: {**found, "lkda": {**found["lkda"], "step": "3"}}, r"damaged: its entry lkda\.step is a str"),
        (lambda found: {**found, "lkda": without(found["lkda"], "model")}, r"x\.ckpt is damaged: .*KeyError: 'model'"),
        (lambda found: {**found, "lkda": {**found["lkda"], "tokenizer": "{}"}}, r"damaged: it holds no tokenizer"),
        (lambda found: {**found, "state_dict": {"model.norm.weight": 3}}, r"x\.ckpt "),
    ],
)
def test_a_checkpoint(spoil: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path) -> None:
    torch.save(spoil(checkpoint()), tmp_path / "x.ckpt")
    with pytest.raises(InputError, match=message) as caught:
        load_trained(tmp_path / "x.ckpt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("lkda", {"model_type": []}, r"config\.json says model_type \[\]; lkda reads "),
        ("hf", {"rope_theta": None, "rope_parameters": {"rope_theta": None}}, r"out is damaged: .*TypeError"),
        ("hf", {"vocab_size": 10**30}, r"model\.vocab_size must be at most \d+, got 10"),
    ],
)
def test_an_exported_directory(form: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    directory = tmp_path / "out"
    lkda.export(model(("softmax",)), tokenizer(), directory, format=form)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match=message) as caught:
        lkda.load(directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.csv", RUN["metrics.csv"] + b",64,0.5,3.0,\n", r"metrics\.csv has a row without a step"),
        ("summary.json", RUN["summary.json"].replace(b"[]", b"null"), r"summary\.json or metrics\.csv is damaged"),
    ],
)
def test_a_run_directory(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    for file, whole in {**RUN, name: content}.items():
        (tmp_path / file).write_bytes(whole)
    with pytest.raises(InputError, match=message):
        read_run(tmp_path, step=2)


def test_the_fingerprint_of_a_checkpoint_without_a_tokenizer() -> None:
    found = checkpoint()
    found["lkda"]["tokenizer"] = "not JSON"
    with pytest.raises(InputError, match="the checkpoint is damaged: it holds no tokenizer"):
        fingerprint_of(found)


def test_a_token_file_whose_header_does_not_end(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(9, dtype=np.uint16))
    content = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(content.replace(b"{", b"z"))
    with pytest.raises(InputError, match=r"x\.npy is not a token file that can be read: "):
        load_shard(tmp_path / "x.npy", dtype="uint16")
