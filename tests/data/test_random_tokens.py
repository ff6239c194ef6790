"""Random tokens come in both forms of a batch, repeat with their seed, and fill packed rows with whole documents."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lkda.data.random_tokens import RandomTokens


def made(**options: Any) -> RandomTokens:
    data = RandomTokens(**{"vocab_size": 50, "context": 64, "batch_size": 3, "val_batches": 2} | options)
    data.prepare()
    return data


def first(data: RandomTokens, n: int = 0) -> dict[str, Any]:
    return data.training_batches(rank=0, world_size=1)[n]


def test_a_row_is_one_document() -> None:
    batch = first(made())
    assert batch["cu_seqlens"] is None
    assert batch["tokens"].shape == batch["targets"].shape == (3, 64)
    assert torch.equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    assert int(batch["tokens"].max()) < 50
    assert len(batch["tokens"].unique()) > 40


@pytest.mark.parametrize("packed", [False, True])
def test_batches_depend_on_the_seed_and_the_number(packed: bool) -> None:
    batches = [first(made(packed=packed, seed=seed), n)["tokens"] for seed, n in ((1, 0), (1, 1), (2, 0))]
    assert torch.equal(batches[0], first(made(packed=packed, seed=1))["tokens"])
    assert not torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])


def test_packed_rows_have_one_shape_and_documents_of_many_lengths() -> None:
    data = made(packed=True, shortest=4)
    batches = [first(data, n) for n in range(30)]
    assert {tuple(batch["tokens"].shape) for batch in batches} == {(1, 192)}
    assert len({len(batch["cu_seqlens"]) for batch in batches}) == 1
    lengths = torch.cat([batch["cu_seqlens"].diff() for batch in batches])
    lengths = lengths[lengths > 0]
    assert lengths.sum() == 30 * 192
    assert lengths.max() == 64  # some documents are longer than a row
    assert len(lengths.unique()) > 15


@pytest.mark.parametrize("packed", [False, True])
def test_validation_has_its_own_batches(packed: bool) -> None:
    data = made(packed=packed)
    batches = list(data.val_dataloader())
    assert len(batches) == 2
    assert not torch.equal(batches[0]["tokens"], first(data)["tokens"])
    assert torch.equal(batches[0]["tokens"], next(iter(made(packed=packed, seed=9).val_dataloader()))["tokens"])


def test_other_data_are_not_resumed() -> None:
    data = RandomTokens(vocab_size=51)
    data.expected = made().fingerprint
    with pytest.raises(ValueError, match="training data"):
        data.prepare()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"vocab_size": 1}, "data.vocab_size must be a whole number of 2 or more, got 1"),
        ({"context": 0}, "data.context must be a whole number of 1 or more, got 0"),
        ({"packed": True, "shortest": 257}, "data.shortest must be at most four times data.context, 256; got 257"),
    ],
)
def test_what_cannot_be_drawn_is_refused(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**option)
