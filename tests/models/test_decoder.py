"""A batch of sequences that are decoded together, on any device."""

from __future__ import annotations

import copy

import pytest
import torch

from lkda.models import decoder as decoding
from lkda.models.decoder import Decoder, Sampling
from lkda.models.decoding import _use_few_launches
from lkda.models.decoding_block import DecodingBlock
from lkda.models.mixers import softmax
from lkda.ops.runtime.backend import Backend
from lkda.ops.softmax import cuda as softmax_cuda
from lkda.ops.softmax import step as softmax_step
from tests.models.helpers import IDS, PATTERNS, small, tokens
from tests.ops.emulation import kernels_on_the_cpu  # noqa: F401


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


OPTIONS = [
    ("softmax", {"qk_norm": True}),
    ("softmax", {"conv_width": 4}),
    ("softmax", {"conv_width": 3, "qk_norm": True, "rope_base": 500.0}),
    ("simplified", {"output_norm": False, "output_gate": False}),
]


def with_options(name, options, **changes):
    return small([name], scale=2, mixer={"pattern": [name], "num_heads": 2, name: options}, **changes)


@pytest.mark.parametrize(
    "make",
    [*(lambda pattern=pattern: small(pattern, scale=2) for pattern in PATTERNS)]
    + [lambda name=name, options=options: with_options(name, options) for name, options in OPTIONS],
    ids=[*IDS, *(f"{name}-{'-'.join(options)}" for name, options in OPTIONS)],
)
@torch.no_grad()
def test_blocks_of_few_launches_are_the_blocks(make):
    model = make().double()
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


@pytest.mark.parametrize("options", [{}, {"conv_width": 3, "qk_norm": True}], ids=["plain", "conv-norm"])
@torch.no_grad()
def test_softmax_steps_by_its_kernel(kernels_on_the_cpu, monkeypatch, options):  # noqa: F811
    """Sequences of unequal lengths, in caches cut to a bucket: the logits and the state of the steps in PyTorch."""
    model, found, states = with_options("softmax", options, d_model=64), [], []
    prompts, bounds = tokens(1, 7), torch.tensor([0, 5, 7], dtype=torch.int32)
    for by_kernel in (False, True):
        if by_kernel:
            _use_few_launches(model, torch.float32)
            monkeypatch.setattr(softmax, "has_kernel", lambda *_: True)
            monkeypatch.setitem(softmax_step.BACKENDS, "torch", Backend(softmax_cuda.softmax_step_cuda))
        _, state = model.prefill_packed(prompts, model.init_state(2, max_tokens=20), cu_seqlens=bounds)
        state, logits = model.cut_state(state, 12), []
        for read in tokens(2, 6, seed=1).T:
            new, state = model.step(read, state)
            logits.append(new)
        found.append(torch.stack(logits))
        states.append(state)
    assert states[1][0][2].tolist() == [[11], [8]]
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-4)


def test_softmax_steps_in_pytorch_where_its_kernel_cannot(monkeypatch):
    """With gradients, and with a cache that grows by copying."""
    mixer, x = small(["softmax"]).blocks[0].mixer, torch.randn(1, 32)
    monkeypatch.setattr(softmax, "has_kernel", lambda *_: True)
    monkeypatch.setattr(softmax, "softmax_step", lambda *_, rope_base: pytest.fail("a step by the kernel"))
    mixer.step(x, mixer.init_state(1, max_tokens=4))[0].sum().backward()
    assert mixer.q_proj.weight.grad is not None
    with torch.no_grad():
        mixer.step(x, mixer.init_state(1))
        with pytest.raises(pytest.fail.Exception, match="by the kernel"):
            mixer.step(x, mixer.init_state(1, max_tokens=4))
