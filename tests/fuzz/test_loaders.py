"""Files from anywhere: each loader reads them or refuses them with one line. It never crashes, hangs, fills memory or
runs code from a file."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lkda
from lkda.commands.run.checkpoint_loading import load_trained
from lkda.commands.run.run_directory import read_summary, recorded_config
from lkda.data.text.tokenizer import encode_text, load_tokenizer
from lkda.data.text.tokens import TokensDataModule
from lkda.formats.common.reading import read_tokenizer
from lkda.metrics_file import read_metrics
from lkda.report.read.files import read_results_file
from lkda.report.read.runs import read_run
from lkda.training.sharded_checkpoint import REST, rows_of
from tests.formats.models import model, tokenizer
from tests.fuzz.mutations import ODD, cases, loads_or_refuses, spoilt, spoilt_bytes, spoilt_json

COUNTS = pytest.mark.parametrize(
    "count", [20, pytest.param(200, marks=pytest.mark.slow), pytest.param(5_000, marks=pytest.mark.long)]
)
ROOT = Path(__file__).parents[2]
# The smallest models of each format: most of the time of a case is building one.
PATTERNS = {"lkda": ("kda",), "hf": ("softmax",)}


def fuzz(count: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """Call `check` with that many spoilt values, and fail with the smallest for which it fails."""
    cases(count)(given(strategy)(check))()


def checkpoint() -> dict[str, Any]:
    """As a run of a small model saves it, without the optimizer."""
    made = model(PATTERNS["lkda"])
    return {
        "lkda": {
            "format": 1,
            "step": 3,
            "best": {"step": 3, "loss": 2.5},
            "model": made.config,
            "tokenizer": tokenizer().to_str(),
            "run": {"mixer": "kda", "data": "files", "fingerprint": {"train": "0", "tokenizer": None}},
        },
        "state_dict": {f"model.{name}": tensor for name, tensor in made.state_dict().items()},
    }


@COUNTS
def test_a_checkpoint_of_odd_values(count: int, tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    tensors = st.sampled_from([torch.zeros(()), torch.zeros(3), torch.zeros(1).expand(2**40), torch.ones(2, 2).int()])

    def check(value: Any) -> None:
        torch.save(value, path)
        loads_or_refuses(lambda: load_trained(path))

    fuzz(count, spoilt(checkpoint(), odd=st.one_of(ODD, tensors)), check)


@COUNTS
def test_a_checkpoint_of_odd_bytes(count: int, tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    torch.save(checkpoint(), path)

    def check(content: bytes) -> None:
        path.write_bytes(content)
        loads_or_refuses(lambda: load_trained(path))

    fuzz(count, spoilt_bytes(path.read_bytes()), check)


@pytest.mark.parametrize("name", ["part_00001_of_00002.pt", REST])
@COUNTS
def test_a_shared_checkpoint(count: int, name: str, tmp_path: Path) -> None:
    """As two devices write it with trainer=fsdp, each a half of the rows of every tensor."""
    path = tmp_path / "x.ckpt"
    path.mkdir()
    rest = checkpoint()
    contents: dict[str, Any] = {}
    for n in range(2):
        rows = {key: tensor[slice(*rows_of(len(tensor), n, 2))] for key, tensor in rest["state_dict"].items()}
        pieces = [(["state_dict", key], row.clone()) for key, row in rows.items()]
        contents[f"part_{n:05d}_of_00002.pt"] = {"save": "one", "part": n, "pieces": pieces}
    contents[REST] = {**rest, "state_dict": dict.fromkeys(rest["state_dict"]), "lkda_save": "one"}
    for file, content in contents.items():
        torch.save(content, path / file)
    load_trained(path)  # before it is spoilt

    def check(content: bytes) -> None:
        (path / name).write_bytes(content)
        loads_or_refuses(lambda: load_trained(path))

    fuzz(count, st.one_of(spoilt_bytes((path / name).read_bytes()), _saved(spoilt(contents[name]))), check)


def _saved(values: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    """The values as torch.save writes them."""

    def as_bytes(value: Any) -> bytes:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        return buffer.getvalue()

    return values.map(as_bytes)


@COUNTS
def test_a_token_file(count: int, tmp_path: Path) -> None:
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    np.save(tmp_path / "x.npy", np.arange(600, dtype=np.uint16) % 8)
    options: dict[str, Any] = {"context": 16, "batch_size": 2, "val_fraction": 0.1, "test_fraction": 0.0}

    def load() -> None:
        paths = {"paths": [str(tmp_path / "x.npy")], "tokenizer_path": str(tmp_path / "tokenizer.json")}
        TokensDataModule(**paths, **options).prepare()

    load()  # before it is spoilt

    def check(content: bytes) -> None:
        (tmp_path / "x.npy").write_bytes(content)
        loads_or_refuses(load)

    fuzz(count, spoilt_bytes((tmp_path / "x.npy").read_bytes()), check)


@pytest.mark.parametrize("form", PATTERNS)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@COUNTS
def test_an_exported_directory(count: int, name: str, form: str, tmp_path: Path) -> None:
    directory = tmp_path / "out"
    lkda.export(model(PATTERNS[form]), tokenizer(), directory, format=form)
    whole = (directory / name).read_bytes()

    def check(content: bytes) -> None:
        (directory / name).write_bytes(content)
        loads_or_refuses(lambda: load_trained(directory))

    fuzz(count, spoilt_json(whole.decode()) if name.endswith(".json") else spoilt_bytes(whole), check)


@COUNTS
def test_the_list_of_shards(count: int, tmp_path: Path) -> None:
    directory = tmp_path / "out"
    lkda.export(model(PATTERNS["lkda"]), tokenizer(), directory)
    (directory / "model.safetensors").rename(directory / "one.safetensors")
    index = json.dumps({"metadata": {}, "weight_map": {"embed_tokens.weight": "one.safetensors"}})

    def check(content: bytes) -> None:
        (directory / "model.safetensors.index.json").write_bytes(content)
        loads_or_refuses(lambda: lkda.load(directory))

    fuzz(count, spoilt_json(index), check)


@COUNTS
def test_a_tokenizer(count: int, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"

    def load() -> None:
        read_tokenizer(tmp_path)
        encode_text(load_tokenizer(path), "the people of the Union, naïve")

    def check(content: bytes) -> None:
        path.write_bytes(content)
        loads_or_refuses(load)

    fuzz(count, spoilt_json(tokenizer().to_str()), check)


RUN = {
    "config.yaml": b"model: {name: tiny}\nmixer: {name: kda}\ndata: {source: files}\ntrainer: {max_steps: 2}\n",
    "metrics.csv": b"step,tokens,seconds,train/loss,val/loss\n1,64,0.5,3.0,\n2,128,1.0,2.5,2.75\n",
    "summary.json": json.dumps(
        {
            **{"status": "finished", "mixer": "kda", "model": "tiny", "data": "files", "context": 32, "seed": 1},
            **{"val/loss": 2.75, "val/perplexity": 15.6, "val/bits_per_byte": 1.5, "unigram_entropy": 5.0},
            **{"tokens": 128, "tokens_per_s": 100.0, "params": 1000, "params_non_embedding": 800, "seconds": 1.0},
            **{"state_bytes": 512, "flops_per_token": 6000, "steps": 2, "val_subsets": []},
        }
    ).encode(),
}


@pytest.mark.parametrize("name", RUN)
@COUNTS
def test_a_run_directory(count: int, name: str, tmp_path: Path) -> None:
    for file, content in RUN.items():
        (tmp_path / file).write_bytes(content)
    read_run(tmp_path)  # before it is spoilt
    readers: dict[str, Callable[[], Any]] = {
        "config.yaml": lambda: recorded_config(tmp_path),
        "metrics.csv": lambda: read_metrics(tmp_path / name),
        "summary.json": lambda: read_summary(tmp_path / name),
    }

    def check(content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        loads_or_refuses(readers[name])
        loads_or_refuses(lambda: read_run(tmp_path))
        loads_or_refuses(lambda: read_run(tmp_path, step=2))

    whole = RUN[name]
    fuzz(count, spoilt_json(whole.decode()) if name.endswith(".json") else spoilt_bytes(whole), check)


@pytest.mark.parametrize("name", ["mixers_on_sotu/results.json", "state_dtypes_h100/evaluations.json"])
@COUNTS
def test_a_results_file(count: int, name: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    found = json.loads((ROOT / "docs" / "results" / name).read_text(encoding="utf-8"))
    small = {key: value[:1] if isinstance(value, list) else value for key, value in found.items()}

    def check(content: bytes) -> None:
        path.write_bytes(content)
        loads_or_refuses(lambda: read_results_file(path))

    fuzz(count, spoilt_json(json.dumps(small)), check)
