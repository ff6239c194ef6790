"""A batch of sequences that are decoded together, on any device."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from lkda.models import decoder as decoding
from lkda.models import decoding_block
from lkda.models.cached_attention import CachedAttention
from lkda.models.decoder import Decoder, Sampling
from lkda.models.decoding import _use_few_launches
from lkda.models.decoding_block import DecodingBlock
from lkda.models.mixers import softmax
from lkda.ops.runtime import cpp
from lkda.ops.runtime.backend import Backend
from lkda.ops.softmax import step as softmax_step
from lkda.ops.softmax.cuda import step as softmax_cuda
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


@pytest.mark.parametrize(
    ("pattern", "of_mla"),
    [
        *((["softmax"], {}), (["mla"], {}), (["mla"], {"rope_base": 100.0}), (["kda", "mla"], {})),
        *((["mla"], {"rope_base": base, "qk_norm": True}) for base in (100.0, None)),
    ],
    ids=["softmax", "mla", "mla_rotary", "kda_mla", "mla_rotary_norm", "mla_norm"],
)
def test_sequences_of_unequal_lengths_read_on(pattern, of_mla):
    """Each gives the logits that it has alone."""
    mixer = {"pattern": pattern, "num_heads": 2, "mla": of_mla}
    model, texts = small(pattern, mixer=mixer).double(), tokens(2, 30)
    with torch.inference_mode():
        state = model.init_state(2, max_tokens=30)
        packed = torch.cat([texts[:1, :9], texts[1:, :4]], 1)
        _, state = model.prefill_packed(packed, state, cu_seqlens=torch.tensor([0, 9, 13], dtype=torch.int32))
        more = torch.stack([texts[0, 9:20], texts[1, 4:15]])
        got, _ = model.forward_from(more, state)
        for row, (start, end) in enumerate([(9, 20), (4, 15)]):
            torch.testing.assert_close(got[row], model(texts[row, None, :end])[0, start:])


def test_a_state_that_does_not_keep_its_shape_is_an_error(monkeypatch):
    """A mixer that grows by copying, although `max_tokens` was given."""
    made = CachedAttention.init_state
    monkeypatch.setattr(CachedAttention, "init_state", lambda self, batch, max_tokens=None: made(self, batch))
    message = r"state of \[2, 0, 16\] per sequence.* has become \[2, 3, 16\]: the mixer must allocate it for max_tokens"
    decoder = Decoder(small(["softmax"]), 1, 20, Sampling())
    with pytest.raises(ValueError, match=message):
        decoder.admit([0], [[1, 2, 3]], [0], [5])
    with pytest.raises(ValueError, match=message):
        decoder.read([1, 2, 3])


@pytest.mark.skipif(cpp.compiler() is None, reason="no C++ compiler")
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


RECORDED = [
    ("softmax", {"qk_norm": True}),
    ("softmax", {"conv_width": 3}),
    ("mla", {"conv_width": 4, "rope_base": 100.0}),
    ("kda", {"gate": "head", "gate_form": "bounded"}),
    ("kda", {"gate": "none", "conv_width": 0, "activation": "none", "negative_eigenvalues": True}),
    ("kda", {"output_gate": False}),
    ("simplified", {"decay": "constant", "output_gate": False}),
]


@pytest.mark.skipif(cpp.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize(("name", "options"), RECORDED, ids=str)
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
    [
        *(("mla", {"qk_norm": True}), ("mla", {"qk_norm": True, "rope_base": 100.0})),
        *(("kda", {"state_dtype": "int8"}), ("simplified", {"conv_width": 0})),
    ],
    ids=["norm", "norm_rotary", "int8", "silu"],
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


class Doubled(torch.nn.Module):
    """A module that has taken the place of another: twice its output, in C++ alone where its layers are."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls, self.in_features, self.out_features = inner, 0, None, None
        if isinstance(inner, torch.nn.Linear):
            self.in_features, self.out_features = inner.in_features, inner.out_features

    @property
    def weight(self):
        return self.inner.weight

    bias, eps = None, 1e-5

    def forward(self, *x):
        return 2 * self.inner(*x)


@pytest.mark.parametrize(
    "name", ["kda", *(pytest.param(name, marks=pytest.mark.long) for name in ("simplified", "softmax", "mla", "conv"))]
)
def test_modules_that_were_replaced_are_called_in_steps(name):
    """Linear layers, norms and the embedding, by the outputs of the whole sequence. A hook is called at each step."""
    wide = small([name]).double()
    names = [n for n, m in wide.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Embedding))]
    names += [n for n, m in wide.named_modules() if type(m).__name__ in ("RMSNorm", "GatedHeadNorm")]
    assert len(names) > 6
    for which in names:
        model = small([name]).double()
        place, _, last = which.rpartition(".")
        setattr(model.get_submodule(place), last, Doubled(model.get_submodule(which)))
        decoder = Decoder(model, 1, 20, Sampling(0.0))
        decoder.admit([0], [[1, 2, 3]], [0], [5])
        found, logits = [decoder.tokens.item()], []
        for _ in range(5):
            found.append(decoder.step().item())
            logits.append(decoder.logits.clone())
        with torch.inference_mode():
            want = model(torch.tensor([[1, 2, 3, *found[:-1]]]))[0, 3:]
        torch.testing.assert_close(torch.cat(logits), want, msg=lambda text, which=which: f"{which}: {text}")
    seen, model = [], small([name])
    model.blocks[0].mixer.o_proj.register_forward_hook(lambda *_: seen.append(1))
    decoder = Decoder(model, 1, 20, Sampling(0.0))
    decoder.admit([0], [[1, 2, 3]], [0], [5])
    before = len(seen)
    for _ in range(5):
        decoder.step()
    assert len(seen) == before + 5
    assert decoder.not_recorded == "a hook of blocks.0.mixer.o_proj"


@pytest.mark.skipif(cpp.compiler() is None, reason="no C++ compiler")
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


OPTIONS = [
    ("softmax", {"qk_norm": True}),
    ("softmax", {"conv_width": 4}),
    ("softmax", {"conv_width": 3, "qk_norm": True, "rope_base": 500.0}),
    ("softmax", {"qk_norm": True, "rope_base": None}),
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


MLA = [{}, {"conv_width": 3}, {"qk_norm": True}, {"kv_lora_rank": 5, "qk_nope_head_dim": 6, "v_head_dim": 7}]
MLA += [{"rope_base": 100.0}, {"rope_base": 100.0, "conv_width": 3, "kv_lora_rank": 5}]
MLA += [{"rope_base": 100.0, "qk_norm": True}, {"rope_base": 100.0, "qk_norm": True, "conv_width": 3}]


@pytest.mark.parametrize("kernel", [False, True], ids=["many", "few"])
@pytest.mark.parametrize("options", MLA, ids=str)
@torch.no_grad()
def test_mla_steps_in_pytorch(monkeypatch, options, kernel):
    """As on a GPU, with blocks of few launches: sequences of unequal lengths, in caches cut to a bucket, and alone.
    Few sequences have the projections of the heads in those before and after them."""
    monkeypatch.setattr(CachedAttention, "state_fits_cpp", lambda *_: False)
    monkeypatch.setattr(decoding_block, "takes", lambda x: kernel)
    plain = with_options("mla", options).double()
    fused, texts, bounds = copy.deepcopy(plain), tokens(2, 13), torch.tensor([0, 7, 9], dtype=torch.int32)
    _use_few_launches(fused, torch.float64)
    for block in fused.blocks:
        assert block._projections is not None
        assert (block._last is not None) == ("conv_width" not in options and "qk_norm" not in options)
        if kernel and block._last is not None:
            monkeypatch.setattr(block.mixer, "step_from", None)
    packed = torch.cat([texts[:1, :7], texts[1:, :2]], 1)
    for model in (plain, fused):
        _, state = model.prefill_packed(packed, model.init_state(2, max_tokens=20), cu_seqlens=bounds)
        state, single = model.cut_state(state, 14), model.init_state(1)
        for t in range(6):
            logits, state = model.step(torch.stack([texts[0, 7 + t], texts[1, 2 + t]]), state)
            for row, end in enumerate([8 + t, 3 + t]):
                torch.testing.assert_close(logits[row], plain(texts[row, None, :end])[0, -1], rtol=1e-9, atol=1e-9)
            logits, single = model.step(texts[:1, t], single)
            torch.testing.assert_close(logits, plain(texts[:1, : t + 1])[:, -1], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_projections_of_heads_are_absorbed_where_that_costs_little():
    """In bfloat16 they are rounded once, so that the output is as near to float64 as with both factors."""
    mixer, x = with_options("mla", {}, d_model=64).blocks[0].mixer, torch.randn(2, 12, 64)
    more = 2 * (2 * (2 * 32 - 32 - 32) * 64 - 2 * 64 * 32)
    assert mixer.bfloat16().absorbed(most_bytes=more - 1) is None
    weights, last = mixer.absorbed(most_bytes=more)
    assert [len(weight) for weight in weights] == [2 * (32 + 16), 32 + 16]
    assert last.shape == (64, 2 * 32)
    x = x.bfloat16()
    want, _ = copy.deepcopy(mixer).double()(x.double())
    states = [mixer.init_state(2, max_tokens=12) for _ in range(2)]
    found = ([], [])
    for t in range(12):
        both, states[0] = mixer.step(x[:, t], states[0])
        o, states[1] = mixer.absorbed_step_from([linear(x[:, t], weight) for weight in weights], states[1])
        found[0].append(both)
        found[1].append(linear(o, last))
    errors = [(torch.stack(y, 1).double() - want).norm() for y in found]
    assert errors[1] < 1.2 * errors[0]


@torch.no_grad()
def test_mla_attends_with_few_launches():
    """Scaling, the sum of both products and the mask are no products and copies of their own."""
    mixer = small(["mla"]).blocks[0].mixer.bfloat16()
    q, latent, shared = (torch.randn(3, *s).bfloat16() for s in ((2, 24), (8, mixer.rank), (8, mixer.rope)))
    empty = torch.arange(8) >= torch.tensor([[2], [8], [5]])
    with Called() as called:
        mixer._attend_one(q, (latent, shared), empty)
    assert called.names == ["bmm", "bmm", "baddbmm_", "masked_fill_", "_softmax", "bmm", "bmm"]
    with Called() as called:
        mixer._sum_of_latents(q[..., :16], q[..., 16:], latent, shared, empty)
    assert called.names == ["bmm", "baddbmm_", "masked_fill_", "_softmax", "bmm"]
    inverse = torch.rand(3, 8, 2)
    with Called() as called:
        mixer._sum_of_latents(q[..., :16], q[..., 16:], latent, shared, empty, inverse)
    assert called.names == ["bmm", "baddbmm_", "mul", "masked_fill_", "_softmax", "_to_copy", "bmm"]


class Called(TorchDispatchMode):
    """Names of the operations that are called, but for views."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        returned = [value.alias_info for value in function._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in returned):
            self.names.append(function.overloadpacket.__name__)
        return found


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
            monkeypatch.setattr(softmax.SoftmaxAttention, "state_fits_cpp", lambda *_: False)
            monkeypatch.setitem(softmax_step.BACKENDS, "cpu", Backend(softmax_cuda.softmax_step_cuda))
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
