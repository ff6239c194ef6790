"""A batch of sequences that are decoded together, on any device."""

from __future__ import annotations

import copy

import pytest
import torch

from lkda.models import decoder as decoding
from lkda.models.decoder import Decoder, Sampling
from lkda.ops.rows.cpu import LIBRARY
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


@pytest.mark.skipif(LIBRARY.reason_cannot_run() is not None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=IDS)
def test_recorded_steps_are_the_steps(pattern, dtype):
    """Bit for bit, for rows whose sequences end and begin at different steps."""
    model = small(pattern).to(dtype)
    decoders = [Decoder(model, 3, 40, Sampling(), graphs=graphs) for graphs in (True, False)]
    for decoder in decoders:
        decoder.admit([0, 1, 2], [[1, 2, 3], [4]], [0, 1, 0], [5, 6, 7])
    for step in range(12):
        if step == 7:
            for decoder in decoders:
                decoder.release(1)
                decoder.admit([1], [[8, 9]], [0], [8])
        by_recording, called = (decoder.step().tolist() for decoder in decoders)
        assert by_recording == called
        for own, other in zip(*(decoder.state for decoder in decoders), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(own, other, strict=True))
    assert decoders[0].not_recorded is None
    assert decoders[0]._recording is not None
    assert decoders[1].not_recorded == "graphs=False"


OPTIONS = [
    ("softmax", {"qk_norm": True}),
    ("softmax", {"conv_width": 3}),
    ("mla", {"conv_width": 4}),
    ("kda", {"gate": "head", "gate_form": "bounded"}),
    ("kda", {"gate": "none", "conv_width": 0, "activation": "none", "negative_eigenvalues": True}),
    ("kda", {"output_gate": False}),
    ("simplified", {"decay": "constant", "output_gate": False}),
]


@pytest.mark.skipif(LIBRARY.reason_cannot_run() is not None, reason="no C++ compiler")
@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_options_are_recorded_too(name, options):
    model = small([name], mixer={"pattern": [name], "num_heads": 2, name: options}, embed_norm=True, embed_scale=2.0)
    decoder = Decoder(model, 1, 20, Sampling(0.0))
    decoder.admit([0], [[1, 2, 3]], [0], [5])
    found = [decoder.tokens.item(), *(decoder.step().item() for _ in range(9))]
    assert decoder.not_recorded is None
    with torch.inference_mode():
        logits = model(torch.tensor([[1, 2, 3, *found[:-1]]]))[0, 2:]
    assert found == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("name", "options"),
    [("mla", {"qk_norm": True}), ("kda", {"state_dtype": "int8"}), ("simplified", {"conv_width": 0})],
    ids=["norm", "int8", "silu"],
)
def test_what_cannot_be_recorded_is_called(name, options):
    model = small([name], mixer={"pattern": [name], "num_heads": 2, name: options})
    decoders = [Decoder(model, 2, 20, Sampling(), graphs=graphs) for graphs in (True, False)]
    for decoder in decoders:
        decoder.admit([0, 1], [[1, 2, 3], [4]], [0, 1], [5, 6])
    for _ in range(8):
        first, second = (decoder.step().tolist() for decoder in decoders)
        assert first == second
    assert decoders[0].not_recorded is not None


@pytest.mark.skipif(LIBRARY.reason_cannot_run() is not None, reason="no C++ compiler")
def test_recorded_steps_keep_the_memory_of_the_weights():
    """Where the model's weights move to other memory, the steps go on with those that were recorded."""
    model = small(["kda", "mla"])
    decoders = [Decoder(copy.deepcopy(model), 1, 30, Sampling(0.0)), Decoder(model, 1, 30, Sampling(0.0))]
    found = []
    for decoder in decoders:
        decoder.admit([0], [[1, 2, 3]], [0], [5])
        first = [decoder.step().item() for _ in range(3)]
        if decoder is decoders[1]:
            model.double()
            scratch = [torch.full_like(p, float("nan"), dtype=torch.float32) for p in model.parameters()]
        found.append(first + [decoder.step().item() for _ in range(9)])
    assert found[0] == found[1]
    assert scratch
