"""The measurements of decoding are those of the model: its bytes, its speed beside a copy, and the reason of a gap."""

from __future__ import annotations

import pytest
import torch

from lkda.bench import decode
from lkda.models.decoder import Sampling
from tests.models.helpers import small


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "SECONDS", 0.01)
    monkeypatch.setattr(decode, "FORWARD", (1, 64))
    monkeypatch.setattr(decode, "copy_gb_per_s", lambda device: 1.0)


@pytest.mark.parametrize("pattern", [["kda"], ["softmax"], ["kda", "mla"]])
def test_a_row_counts_the_bytes_that_a_step_moves(pattern):
    model = small(pattern)
    row = decode.decode_row(model, 2, 300, Sampling(0.0))
    weights = sum(p.numel() * 4 for p in model.parameters())
    if not model.config["tie_embeddings"]:
        weights -= model.embed_tokens.weight.numel() * 4
    state = sum(part.numel() * part.element_size() for layer in model.init_state(1, max_tokens=300) for part in layer)
    lengths = sum(8 for layer in model.init_state(1, max_tokens=300) for part in layer if part.dtype == torch.int64)
    assert row["bytes_per_sequence"] == state - lengths
    written = model.state_bytes(0) if model.has_constant_state else model.state_bytes(1)
    read = model.state_bytes(300 - decode.LEAST_CONTEXT + decode.STEPS // 2)  # the mean over the steps
    assert row["bytes_per_step"] == weights + 2 * (read + written)
    assert row["copy_share"] == pytest.approx(row["bytes_per_step"] / 1e9 * row["tokens_per_s"] / 2)
    assert row["tokens_per_s"] > 0


def test_states_that_do_not_fit_are_named_with_their_bytes(monkeypatch):
    model = small(["softmax"])
    monkeypatch.setattr(decode, "physical_memory", lambda: 2**30)
    batch = 2**30 // model.state_bytes(256)
    row = decode.decode_row(model, batch, 256, Sampling(0.0))
    assert row["bytes_needed"] == batch * model.state_bytes(256)
    assert row["reason"] == "does not fit: the states take 1.0 GiB, and 1.0 GiB are free"
    assert "tokens_per_s" not in row


def test_running_out_of_memory_is_a_state_that_does_not_fit(monkeypatch):
    def fails(*arguments):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(decode, "_decode", fails)
    row = decode.decode_row(small(["kda"]), 1, 256, Sampling(0.0))
    assert row["reason"].startswith("does not fit: the states take")


def test_prefill_is_measured_beside_the_forward():
    row = decode.prefill_row(small(["kda", "softmax"]), 300)
    assert row["tokens_per_s"] > 0
    assert row["forward_tokens_per_s"] > 0


def test_a_peer_is_measured_beside_lkda(monkeypatch):
    pytest.importorskip("transformers", minversion="5.17")
    monkeypatch.setattr(decode, "PEER_TOKENS", (1, 9))
    row = decode.peer_row(small(["kda", "mla"]), "transformers", 2, 10)
    assert row["tokens_per_s"] > 0
    assert row["lkda_tokens_per_s"] > 0
    with pytest.raises(ValueError, match="transformers' generate compiles on a GPU only"):
        decode.peer_row(small(["kda"]), "transformers_compiled", 1, 10)
