"""The mixers' contract: whole, in pieces, token by token and packed are one function."""

from __future__ import annotations

import sys

import pytest
import torch

from lkda.models import build_model, mixers
from lkda.ops.kda.reference.gate import KDAGate, log_decay, write_strength
from tests.models.helpers import IDS, PATTERNS, config, small, tokens


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("pattern", PATTERNS, ids=IDS)
class TestEveryMixer:
    def test_steps_equal_forward(self, pattern):
        """Where gradients could be recorded, steps are in PyTorch, and otherwise in C++, where there is a compiler."""
        model, x = small(pattern), tokens(3, 20)
        for recording, max_tokens in ((True, None), (True, 20), (False, None), (False, 20)):
            with torch.set_grad_enabled(recording):
                want, state = model(x), model.init_state(3, max_tokens=max_tokens)
                for t in range(20):
                    logits, state = model.step(x[:, t], state)
                    close(logits, want[:, t])

    def test_a_carried_state_continues_the_sequence(self, pattern):
        model, x = small(pattern), tokens(2, 90)
        want, state = model(x), model.init_state(2)
        parts = []
        for piece in x.split([1, 2, 70, 17], 1):
            logits, state = model.forward_from(piece, state)
            parts.append(logits)
        close(torch.cat(parts, 1), want)

    def test_packed_documents_have_the_logits_they_have_alone(self, pattern):
        model, x = small(pattern), tokens(1, 100)
        bounds = [0, 0, 2, 3, 70, 100, 100]
        packed = model(x, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
        for start, end in zip(bounds, bounds[1:]):
            if start < end:
                close(packed[:, start:end], model(x[:, start:end]))

    def test_packed_documents_do_not_reach_each_other(self, pattern):
        model, x = small(pattern), tokens(1, 40)
        embedded = model.embed_tokens(x).detach().requires_grad_()
        hidden, cu_seqlens = embedded, torch.tensor([0, 25, 40])
        for block in model.blocks:
            hidden, _ = block(hidden, cu_seqlens=cu_seqlens)
        hidden[:, 25:].square().sum().backward()
        assert embedded.grad[:, :25].abs().max() == 0
        assert embedded.grad[:, 25:].abs().max() > 0

    def test_future_tokens_change_nothing_before_them(self, pattern):
        model, x = small(pattern), tokens(1, 50)
        changed = torch.cat([x[:, :30], tokens(1, 20, seed=1)], 1)
        close(model(changed)[:, :30], model(x)[:, :30])
        assert not torch.allclose(model(changed)[:, 30:], model(x)[:, 30:], atol=1e-3)

    def test_every_parameter_learns(self, pattern):
        model, x = small(pattern), tokens(2, 40)
        torch.nn.functional.cross_entropy(model(x).flatten(0, 1), x.roll(-1, 1).flatten()).backward()
        silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert silent == []

    def test_state_bytes_are_those_of_the_state(self, pattern):
        model, x = small(pattern), tokens(1, 24)
        _, state = model.forward_from(x, model.init_state(1))
        held = sum(part.numel() * part.element_size() for layer in state for part in layer)
        assert model.state_bytes(24) == held

    def test_flops_are_at_least_two_a_weight(self, pattern):
        model = small(pattern)
        weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
        assert 2 * weights <= model.flops_per_token(16) < 4 * weights

    def test_state_cannot_be_carried_into_packed_sequences(self, pattern):
        model = small(pattern)
        mixer = model.mixers()[0]
        with pytest.raises(ValueError, match="cannot be given together with cu_seqlens"):
            mixer(torch.zeros(1, 4, 32), cu_seqlens=torch.tensor([0, 4]), state=mixer.init_state(1))

    def test_bfloat16_autocast_stays_near(self, pattern):
        model, x = small(pattern), tokens(1, 40)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = model(x).float()
        want = model(x)
        assert (got - want).norm() / want.norm() < 0.05

    def test_float64_is_computed_in_float64(self, pattern):
        """Steps and the whole agree to float64's digits, which nothing done in float32 on the way would."""
        model, x = small(pattern).double(), tokens(2, 20)
        for recording, max_tokens in ((True, None), (False, None), (False, 20)):  # see above
            with torch.set_grad_enabled(recording):
                want, state = model(x), model.init_state(2, max_tokens=max_tokens)
                assert want.dtype == torch.float64
                for t in range(20):
                    logits, state = model.step(x[:, t], state)
                    torch.testing.assert_close(logits, want[:, t], rtol=1e-11, atol=1e-11)

    @torch.no_grad()
    def test_a_state_that_is_not_of_the_batch_or_the_model_is_refused(self, pattern):
        """In C++ a step would read and write beside the tensors of the state."""
        model, x = small(pattern), torch.zeros(2, dtype=torch.int64)
        other = small(pattern, d_model=16)
        for max_tokens in (8, None):
            states = [model.init_state(n, max_tokens=max_tokens) for n in (1, 3)]
            for state in (*states, model.init_state(2, max_tokens=max_tokens)[1:]):
                with pytest.raises(ValueError, match="the state must have"):
                    model.step(x, state)
            with pytest.raises((ValueError, RuntimeError), match=r"must be|needs a state of|of this mixer|must match"):
                model.step(x, other.init_state(2, max_tokens=max_tokens))
        with pytest.raises(ValueError, match=r"a step takes tokens \[B\]"):
            model.step(x[:, None], model.init_state(2, max_tokens=8))
        with pytest.raises(ValueError, match="max_tokens must be a whole number of 0 or more, got -1"):
            model.init_state(2, max_tokens=-1)

    @torch.no_grad()
    def test_bfloat16_states_do_not_wear_out(self, pattern):
        """With weights in bfloat16, steps after 260 tokens are as near to the logits in float64 as the whole is."""
        model, x = small(pattern, scale=1), tokens(1, 300)
        want = model.double()(x)[:, 260:]
        model.bfloat16()
        whole, (_, state) = model(x)[:, 260:], model.prefill(x[:, :260], model.init_state(1, max_tokens=300))
        steps = []
        for t in range(260, 300):
            logits, state = model.step(x[:, t], state)
            steps.append(logits)
        error, allowed = ((y.double() - want).norm() for y in (torch.stack(steps, 1), whole))
        assert error < 1.5 * allowed

    @torch.no_grad()
    def test_preallocated_caches_equal_growing_ones(self, pattern):
        """Packed, in steps, and read on: two sequences of unequal length, each as it is alone, in float64 exactly."""
        model, x = small(pattern).double(), tokens(2, 30)
        lengths = [7, 12]
        packed = torch.cat([x[0, :7], x[1, :12]]).unsqueeze(0)
        logits, state = model.prefill_packed(
            packed, model.init_state(2, max_tokens=30), cu_seqlens=torch.tensor([0, 7, 19], dtype=torch.int32)
        )
        want = model(x)
        exactly = {"rtol": 1e-11, "atol": 1e-11}
        torch.testing.assert_close(logits, torch.stack([want[b, n - 1] for b, n in enumerate(lengths)]), **exactly)
        for t in range(4):
            chosen = torch.stack([x[b, n + t] for b, n in enumerate(lengths)])
            logits, after = model.step(chosen, model.cut_state(state, 16))
            for row, new in zip(state, after):
                for whole, part in zip(row, new):
                    if whole.shape == part.shape:  # otherwise `part` is a view of it, written in place
                        whole.copy_(part)
            torch.testing.assert_close(logits, torch.stack([want[b, n + t] for b, n in enumerate(lengths)]), **exactly)
        rest = torch.stack([x[b, n + 4 : n + 14] for b, n in enumerate(lengths)])
        logits, _ = model.forward_from(rest, state)
        torch.testing.assert_close(
            logits, torch.stack([want[b, n + 4 : n + 14] for b, n in enumerate(lengths)]), **exactly
        )

    def test_prefill_gives_the_last_logits(self, pattern):
        model, x = small(pattern), tokens(2, 20)
        want, left = model.forward_from(x, model.init_state(2))
        got, state = model.prefill(x, model.init_state(2))
        close(got, want[:, -1])
        assert all(torch.equal(a, b) for one, two in zip(state, left) for a, b in zip(one, two))


# Of the mixers, simplified takes the tracer longest. Those of a hybrid are traced one by one.
MARKS = {"kda": [], "simplified": [pytest.mark.slow]}
TRACED = [
    pytest.param(pattern, id=name, marks=MARKS.get(name, [pytest.mark.long])) for pattern, name in zip(PATTERNS, IDS)
]


@pytest.mark.parametrize("pattern", TRACED)
def test_the_tracer_takes_it_whole(pattern):
    """torch.compile(fullgraph=True): no graph break, forward and backward; the backend adds no rounding.

    The PyTorch forms count their chunks in Python, so lengths must be constants to the tracer.
    """
    model, x = small(pattern, num_layers=len(pattern)), tokens(2, 20)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    want, got = model(x), compiled(x)
    close(got, want)
    (wanted,) = torch.autograd.grad(want.square().sum(), model.embed_tokens.weight)
    (gotten,) = torch.autograd.grad(got.square().sum(), model.embed_tokens.weight)
    assert (gotten - wanted).norm() <= 1e-4 * wanted.norm()


OPTIONS = [
    ("kda", {"conv_width": 0}),
    ("kda", {"conv_width": 0, "activation": "none"}),
    ("kda", {"gate": "head"}),
    ("kda", {"gate": "none"}),
    ("kda", {"gate_form": "bounded", "lower_bound": -3.0}),
    ("kda", {"negative_eigenvalues": True, "output_gate": False}),
    ("simplified", {"conv_width": 0, "decay": "constant", "output_norm": False, "output_gate": False}),
    ("simplified", {"output_gate": False}),
    ("mla", {"kv_lora_rank": 8, "qk_nope_head_dim": 12, "qk_rope_head_dim": 4, "v_head_dim": 10}),
    ("softmax", {"rope_base": 500.0}),
    ("softmax", {"rope_base": None}),
    ("softmax", {"qk_norm": True}),
    ("softmax", {"conv_width": 4}),
    ("mla", {"qk_norm": True}),
    ("mla", {"conv_width": 3}),
    ("mla", {"rope_base": 100.0}),
    ("mla", {"rope_base": 100.0, "conv_width": 3}),
    ("mla", {"rope_base": 100.0, "qk_norm": True}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_options_keep_the_contract(name, options):
    x = tokens(1, 20)
    model = small([name], mixer={"pattern": [name], "num_heads": 2, name: options})
    want, state = model(x), model.init_state(1)
    assert not torch.allclose(want, small([name])(x), atol=1e-3)
    for t in range(20):
        logits, state = model.step(x[:, t], state)
        close(logits, want[:, t])
    assert model.state_bytes(20) == sum(part.numel() * part.element_size() for layer in state for part in layer)
    pieces, state = [], model.init_state(1)
    for piece in x.split([1, 2, 17], 1):
        logits, state = model.forward_from(piece, state)
        pieces.append(logits)
    close(torch.cat(pieces, 1), want)
    packed = model(torch.cat([x[:, 5:], x], 1), cu_seqlens=torch.tensor([0, 15, 35], dtype=torch.int32))
    close(packed[:, 15:], want)


def test_softmax_without_positions_does_not_know_the_order():
    """The last output of one layer is that of the same tokens before it in another order."""
    x = tokens(1, 20)
    shuffled = torch.cat([x[:, torch.randperm(19)], x[:, 19:]], 1)
    for base, same in ((None, True), (10000.0, False)):
        mixer = {"pattern": ["softmax"], "num_heads": 2, "softmax": {"rope_base": base, "qk_norm": True}}
        model = small(["softmax"], scale=2, num_layers=1, mixer=mixer)
        assert torch.allclose(model(shuffled)[:, -1], model(x)[:, -1], rtol=1e-4, atol=1e-4) is same


@pytest.mark.parametrize("backend", ["auto", "chunk", "recurrent"])
@pytest.mark.parametrize("name", ["kda", "simplified", "softmax", "mla"])
def test_a_batch_without_rows(name, backend):
    """As the last share of a batch that others divide. Its gradients are zeros."""
    model = small([name], backend=backend if name in ("kda", "simplified") else "auto")
    logits = model(tokens(0, 70))
    assert logits.shape == (0, 70, 50)
    logits.sum().backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@torch.inference_mode()
@pytest.mark.parametrize("pattern", PATTERNS, ids=IDS)
def test_steps_take_states_that_lie_apart(pattern):
    """A state that is a part of a larger tensor, which only PyTorch can step. KDA and simplified refuse it."""
    model, x = small(pattern), tokens(2, 6)
    want, state = model(x), model.init_state(2, max_tokens=8)
    state = [tuple(torch.stack([part, part], -1)[..., 0] for part in layer) for layer in state]
    assert not any(part.is_contiguous() for layer in state for part in layer if part.numel() > 2)
    if {"kda", "simplified"} & set(pattern):
        with pytest.raises(ValueError, match="is written in place and must be contiguous"):
            model.step(x[:, 0], state)
        return
    for t in range(6):
        logits, state = model.step(x[:, t], state)
        close(logits, want[:, t])


@pytest.mark.parametrize("activation", ["silu", "none"])
@pytest.mark.parametrize("name", ["kda", "simplified"])
def test_without_convolutions_the_silu_stays_unless_it_is_left_out(name, activation, monkeypatch):
    options = {"conv_width": 0, "activation": activation} if activation == "none" else {"conv_width": 0}
    (block,) = small([name], num_layers=1, mixer={"pattern": [name], "num_heads": 2, name: options}).blocks
    mixer, x, seen = block.mixer, torch.randn(1, 5, 32), []

    def attend(q, k, v, *rest, **options):
        seen.append(v.flatten(-2))
        return type(mixer).attend(mixer, q, k, v, *rest, **options)

    monkeypatch.setattr(mixer, "attend", attend)
    mixer(x)
    v = mixer.v_proj(x)
    close(seen[0], torch.nn.functional.silu(v) if activation == "silu" else v)


@pytest.mark.parametrize("name", ["kda", "simplified"])
def test_no_activation_needs_no_convolution(name):
    with pytest.raises(ValueError, match="activation=none needs conv_width=0, got 4"):
        small([name], mixer={"pattern": [name], "num_heads": 2, name: {"activation": "none"}})


@pytest.mark.parametrize(("state_dtype", "share", "bound"), [("bfloat16", 2, 0.02), ("int8", 4, 0.06)])
def test_narrow_states_stay_near(state_dtype, share, bound):
    """Steps after a prompt, with the state in fewer bits: near the whole in float32, and as small as told."""
    wide, x = small(["kda"]), tokens(2, 40)
    narrow = small(["kda"], mixer={"pattern": ["kda"], "num_heads": 2, "kda": {"state_dtype": state_dtype}})
    narrow.load_state_dict(wide.state_dict())
    want, (_, state) = wide(x), narrow.forward_from(x[:, :20], narrow.init_state(2))
    for t in range(20, 40):
        logits, state = narrow.step(x[:, t], state)
        error = (logits - want[:, t]).norm() / want[:, t].norm()
        assert 0 < error < bound
    held = sum(part.numel() * part.element_size() for layer in state for part in layer) // 2
    assert narrow.state_bytes(40) == held
    own = [
        mixer.state_bytes(1) - sum(c.numel() * 4 for c in mixer._split_state(mixer.init_state(1))[0])
        for m in (wide, narrow)
        for mixer in m.mixers()[:1]
    ]
    factors = 4 * 2 * 16 if state_dtype == "int8" else 0
    assert own[0] == share * (own[1] - factors)


@pytest.mark.parametrize("pattern", PATTERNS, ids=IDS)
def test_a_step_may_spend_its_state_but_never_a_clone(pattern):
    """The contract of Mixer.step and forward: from clones of one state, the same tokens give the same logits."""
    model, x = small(pattern), tokens(2, 12)
    _, state = model.forward_from(x[:, :8], model.init_state(2))

    def continued(start):
        found = []
        for t in range(8, 12):
            logits, start = model.step(x[:, t], start)
            found.append(logits)
        return torch.stack(found)

    def cloned():
        return [tuple(part.clone() for part in layer) for layer in state]

    before, first = cloned(), continued(cloned())
    model.forward_from(x[:, 8:], state)
    assert all(torch.equal(a, b) for one, two in zip(state, before) for a, b in zip(one, two))
    assert torch.equal(continued(cloned()), first)
    assert torch.equal(continued(state), first)


@pytest.mark.parametrize("name", ["softmax", "mla"])
def test_a_full_cache_is_refused(name):
    model = small([name])
    with pytest.raises(ValueError, match="holds 4 tokens per sequence, and a sequence would have 5: give init_state"):
        model.forward_from(tokens(1, 5), model.init_state(1, max_tokens=4))
    _, state = model.forward_from(tokens(1, 4), model.init_state(1, max_tokens=4))
    with pytest.raises(ValueError, match="would have 5"):
        model.step(tokens(1), state)


def test_kda_begins_with_a_long_memory():
    torch.manual_seed(0)
    mixer = build_model(config(["kda"], d_model=256)).mixers()[0]
    logits = mixer.heads(mixer.f_b_proj(mixer.f_a_proj(torch.randn(1, 100, 256))))
    g = log_decay(logits, KDAGate(mixer.A_log, mixer.dt_bias), head_dim=mixer.head_dim)
    A = mixer.A_log.exp()
    dt = torch.nn.functional.softplus(mixer.dt_bias)
    assert A.min() >= 1
    assert A.max() <= 16
    assert dt.min() >= 1e-3
    assert dt.max() <= 0.1001
    assert -0.5 < g.median() < 0


def test_gates_are_computed_in_float32_under_autocast():
    mixer = build_model(config(["kda"])).mixers()[0]
    assert {mixer.A_log.dtype, mixer.dt_bias.dtype} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = torch.randn(1, 9, 32)
        logits, strengths = mixer.heads(mixer.f_b_proj(mixer.f_a_proj(x))), mixer.b_proj(x)
        assert {logits.dtype, strengths.dtype} == {torch.bfloat16}
        gate = KDAGate(mixer.A_log, mixer.dt_bias)
        g = log_decay(logits, gate, head_dim=mixer.head_dim)
        assert {g.dtype, write_strength(strengths, gate).dtype} == {torch.float32}


def test_tied_embeddings_are_one_matrix():
    tied, untied = (build_model(config(["kda"], tie_embeddings=tie)) for tie in (True, False))
    assert tied.lm_head.weight is tied.embed_tokens.weight
    assert untied.lm_head.weight is not untied.embed_tokens.weight
    assert untied.num_parameters() - tied.num_parameters() == 50 * 32
    assert tied.num_parameters(embedding=False) == untied.num_parameters(embedding=False)


def test_simplified_heads_remember_from_4_to_4096_tokens():
    mixer = build_model(config(["simplified"])).mixers()[0]
    memory = 1 / (1 - mixer.decay(mixer.b_proj(torch.zeros(1, 32))))
    torch.testing.assert_close(memory[0], torch.tensor([4.0, 4096.0]), rtol=1e-2, atol=0)


def test_a_mixer_dropped_into_the_package_is_found(tmp_path, monkeypatch):
    (tmp_path / "echo.py").write_text(
        "from lkda.models.mixer import Mixer\n"
        "class Echo(Mixer):\n"
        "    def forward(self, x, *, cu_seqlens=None, state=None):\n        return x, ()\n"
        "    def step(self, x, state):\n        return x, ()\n"
        "    def init_state(self, batch_size, *, device=None):\n        return ()\n"
        "    def flops_per_token(self, context):\n        return 0.0\n"
    )
    monkeypatch.setattr(mixers, "__path__", [*mixers.__path__, str(tmp_path)])
    assert "echo" in mixers.mixer_names()
    model = build_model(config(["echo"]))
    assert model(tokens(1, 4)).shape == (1, 4, 50)
    assert model.resolve_backends(torch.device("cpu"), torch.float32) == {}
    sys.modules.pop("lkda.models.mixers.echo")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mixer": {"pattern": ["kdaa"], "num_heads": 2}},
            r"unknown mixer 'kdaa'; there are conv, kda, mla, simplified, softmax",
        ),
        (
            {"mixer": {"pattern": ["kda"], "num_heads": 5}},
            r"mixer.num_heads must divide model.d_model = 32, got 5; choose",
        ),
        (
            {"mixer": {"pattern": ["kda"], "num_heads": 2, "kda": {"gat": 1}}},
            r"mixer 'kda' has no option gat; it has conv",
        ),
        (
            {"mixer": {"pattern": ["kda"], "num_heads": 2, "kda": {"gate": "x"}}},
            r"gate must be one of channel, head, none",
        ),
        ({"mixer": {"pattern": [], "num_heads": 2}}, "mixer must hold `pattern`"),
        (
            {"mixer": {"pattern": ["kda"] * 10**6, "num_heads": 2}},
            r"mixer.pattern holds 1,000,000 names, expected at most 16,384",
        ),
        ({"mixer": {"pattern": "kda", "num_heads": 2}}, r"got pattern 'kda' .* has a pattern of one name, as \[kda\]"),
        ({"mixer": {"pattern": ["kda"], "num_heads": 2, "patern": 1}}, "under the mixers' names .*; unknown: patern"),
        ({"num_layers": 0}, "model.num_layers must be a whole number of 1 or more, got 0"),
        ({"d_modle": 3}, "unknown: d_modle"),
        ({"backend": "fast"}, "no mixer of kda has a backend 'fast'; they have auto, chunk, cpu, cuda"),
    ],
)
def test_what_cannot_be_built_is_said(changes, message):
    with pytest.raises(ValueError, match=message):
        build_model(config(["kda"]) | changes)


def test_a_backend_word_goes_to_the_mixers_that_know_it():
    model = small(["kda", "softmax"], backend="recurrent")
    assert model.resolve_backends(torch.device("cpu"), torch.float32) == {"kda": "recurrent", "softmax": "sdpa"}
