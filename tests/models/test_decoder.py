"""A batch of sequences that are decoded together, on any device."""

from __future__ import annotations

import copy

import pytest
import torch

from lkda.models import decoder as decoding
from lkda.models.decoder import Decoder, Sampling
from lkda.models.decoding import _use_few_launches
from lkda.models.decoding_block import DecodingBlock
from tests.models.helpers import IDS, PATTERNS, small, tokens


@pytest.mark.parametrize("pattern", PATTERNS, ids=IDS)
def test_a_long_prompt_is_read_in_pieces(pattern, monkeypatch):
    """In `admit` and in `read`: both give the logits of the whole prompt."""
    model, prompt = small(pattern).double(), tokens(1, 40)
    with torch.inference_mode():
        want = model(prompt)[0, -1]
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 7)
    pieces = []
    prefill = type(model).prefill
    monkeypatch.setattr(
        type(model), "prefill", lambda self, piece, state: pieces.append(piece.shape[1]) or prefill(self, piece, state)
    )
    decoder = Decoder(model, 1, 50, Sampling(0.0))
    decoder.admit([0], [prompt[0].tolist()], [0], [1])
    assert pieces == [7] * 5 + [5]
    assert decoder.tokens.tolist() == [int(want.argmax())]
    decoder = Decoder(model, 1, 50, Sampling(0.0))
    with torch.inference_mode():
        torch.testing.assert_close(decoder.read(prompt[0].tolist())[0], want)


@pytest.mark.parametrize("pattern", [["softmax"], ["mla"], ["kda", "mla"]])
def test_sequences_of_unequal_lengths_read_on(pattern):
    """Each gives the logits that it has alone."""
    model, texts = small(pattern).double(), tokens(2, 30)
    with torch.inference_mode():
        state = model.init_state(2, max_tokens=30)
        packed = torch.cat([texts[:1, :9], texts[1:, :4]], 1)
        _, state = model.prefill_packed(packed, state, cu_seqlens=torch.tensor([0, 9, 13], dtype=torch.int32))
        more = torch.stack([texts[0, 9:20], texts[1, 4:15]])
        got, _ = model.forward_from(more, state)
        for row, (start, end) in enumerate([(9, 20), (4, 15)]):
            torch.testing.assert_close(got[row], model(texts[row, None, :end])[0, start:])


@pytest.mark.parametrize("pattern", PATTERNS, ids=IDS)
@torch.no_grad()
def test_blocks_of_few_launches_are_the_blocks(pattern):
    model = small(pattern, scale=2).double()
    fused, found = copy.deepcopy(model), []
    _use_few_launches(fused, torch.float64)
    assert all(type(block) is DecodingBlock for block in fused.blocks)
    for each in (model, fused):
        state, logits = each.init_state(3, max_tokens=10), []
        for read in tokens(3, 6).T:
            new, state = each.step(read, state)
            logits.append(new)
        found.append(torch.stack(logits))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["kda", "simplified"])
def test_vectors_that_the_step_takes_in_float32_are_cast_once(name):
    model = small([name]).bfloat16()
    _use_few_launches(model, torch.float32)
    for mixer in model.mixers():
        vectors = {
            n: p.dtype for n, p in mixer.named_parameters() if n in ("A_log", "dt_bias", "decay_bias", "o_norm.weight")
        }
        assert vectors
        assert set(vectors.values()) == {torch.float32}
