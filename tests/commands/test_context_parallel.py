"""Devices that divide each row among themselves compute what one device does, forward and backward."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.mark import ParameterSet

from lkda.checks import InputError
from lkda.commands.run.prepared_run import prepare_data, with_data
from lkda.commands.run.run_setup import plan_run
from lkda.commands.train import train
from lkda.training.shares import part_of
from tests.commands.ranks import on_ranks
from tests.commands.small import composed, small_run
from tests.commands.test_many_processes import MQAR, SAME, assert_same_rows, on

RANDOM = (
    *("debug=fast", "data=random", "trainer=cpu", "model.vocab_size=64", "data.context=32", "data.batch_size=2"),
    *("data.val_batches=2", "trainer.max_steps=3", "trainer.val_check_interval=3", "trainer.limit_val_batches=1.0"),
    "trainer.precision=64-true",
)
MIXERS = ("kda", "simplified", "softmax", "mla", "conv_kda", "conv_softmax")


def mixers(*, fast: tuple[str, ...], slow: tuple[str, ...]) -> list[ParameterSet]:
    """Every mixer; the two tests below run each of them in CI once."""
    marks = dict.fromkeys(MIXERS, pytest.mark.long) | dict.fromkeys(slow, pytest.mark.slow) | dict.fromkeys(fast, ())
    return [pytest.param(mixer, marks=marks[mixer]) for mixer in MIXERS]


def in_parts(count: int, strategy: str = "ddp", devices: int | None = None) -> tuple[str, ...]:
    return (*on(strategy, devices or count), f"trainer.context_parallel={count}")


def same_run(words: tuple[str, ...], more: tuple[str, ...], directory: Path, *, processes: int, rel: float) -> None:
    train(composed("train", *words), directory / "one")
    config = composed("train", *words, *more)
    on_ranks(processes, lambda rank: train(config, directory / "many"), directory / "ranks")
    assert_same_rows(directory / "many", directory / "one", rel=rel)


@pytest.mark.parametrize("mixer", mixers(fast=("kda",), slow=("simplified", "mla")))
def test_rows_of_one_document(mixer: str, tmp_path: Path) -> None:
    same_run((*RANDOM, f"mixer={mixer}"), in_parts(2), tmp_path, processes=2, rel=1e-6)


@pytest.mark.parametrize("mixer", mixers(fast=("softmax",), slow=("kda", "conv_kda", "conv_softmax")))
def test_packed_documents(mixer: str, tmp_path: Path) -> None:
    """Of all lengths: some end at the border of two parts, some cross several."""
    words = (*RANDOM, f"mixer={mixer}", "data.packed=true", "data.shortest=2")
    same_run(words, in_parts(2), tmp_path, processes=2, rel=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("packed", ["true", "false"])
def test_four_parts(packed: str, tmp_path: Path) -> None:
    """A state passes through the parts between."""
    words = (*RANDOM, "mixer=kda_softmax_1to1", f"data.packed={packed}", "checkpointing=block")
    words = (*words, *(["data.shortest=40"] if packed == "true" else []))
    same_run(words, in_parts(4), tmp_path, processes=4, rel=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_beside_data_parallelism(strategy: str, corpus: Path, tmp_path: Path) -> None:
    words = tuple(small_run(corpus, *SAME, "trainer.accumulate_grad_batches=2"))
    same_run(words, in_parts(2, strategy, 4), tmp_path, processes=4, rel=2e-5)


def test_bad_settings(corpus: Path, tmp_path: Path) -> None:
    text = tuple(small_run(corpus, *SAME))

    def refused(message: str, *overrides: str, data: tuple[str, ...] = text) -> None:
        config = composed("train", *data, *in_parts(2), *overrides)
        with pytest.raises(InputError, match=message):
            with_data(plan := plan_run(config, tmp_path / "run"), prepare_data(plan, None), None)

    refused(r"data.context=31 tokens cannot be divided among trainer.context_parallel=2 devices", "data.context=31")
    refused(r"compile=true cannot be used with trainer.context_parallel", "compile=true")
    refused(r"trainer.context_parallel=2 needs data of text or data=random, got data=mqar", data=MQAR)


def test_parts_of_packed_rows() -> None:
    """Two rows of 6 tokens in 3 parts of 2. Documents of 5, 1, 2 and 4 tokens."""
    tokens = torch.arange(12).unsqueeze(0)
    batch = {"tokens": tokens, "targets": tokens + 1, "cu_seqlens": torch.tensor([0, 5, 6, 8, 12, 12, 12])}
    take: list[Callable[..., Any]] = [part_of(number=n, count=3, rows=2) for n in range(3)]
    parts = [part(batch) for part in take]
    assert [part["tokens"].tolist() for part in parts] == [[[0, 1, 6, 7]], [[2, 3, 8, 9]], [[4, 5, 10, 11]]]
    assert [part["before"].tolist() for part in parts] == [[0, 0], [2, 0], [4, 2]]
    bounds = [[0, 2, 4, 4, 4, 4, 4], [0, 2, 4, 4, 4, 4, 4], [0, 1, 2, 4, 4, 4, 4]]
    assert [part["cu_seqlens"].tolist() for part in parts] == bounds
    assert parts[1]["documents"].tolist() == [[0, 0, 0, 0], [2, 2, 3, 3]]
