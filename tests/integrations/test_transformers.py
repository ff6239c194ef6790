"""transformers' KDA models with lkda's kernels: the same numbers as their own PyTorch code, in every use of a model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import lkda.integrations.transformers as integration
from lkda.integrations.transformers import use_lkda_kernels

transformers = pytest.importorskip("transformers", minversion="5.24")

VOCAB, WIDTH, HEADS = 50, 32, 2
HEAD = WIDTH // HEADS
SHARED = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "kv_lora_rank": HEAD,
    "qk_nope_head_dim": HEAD,
    "v_head_dim": HEAD,
    "linear_head_dim": HEAD,
    "linear_num_heads": HEADS,
    "linear_conv_kernel_dim": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LAYERS = ["linear_attention", "linear_attention", "full_attention"]


def kimi(**changes):
    options = {"qk_rope_head_dim": 8, "num_hidden_layers": 3, "layer_types": LAYERS, "mlp_layer_types": ["dense"] * 3}
    return transformers.KimiLinearForCausalLM(transformers.KimiLinearConfig(**SHARED | options | changes))


def bailing(safe=True):
    options = {"qk_rope_head_dim": 8, "num_hidden_layers": 3, "layer_types": LAYERS, "mlp_layer_types": ["dense"] * 3}
    options |= {"kda_safe_gate": safe, "kda_lower_bound": -4.0}
    return transformers.BailingHybridForCausalLM(transformers.BailingHybridConfig(**SHARED | options))


def glm(bound=-5.0, **changes):
    options = {"num_hidden_layers": 2, "layer_types": LAYERS[:2], "mlp_layer_types": ["dense"] * 2, "hc_mult": 2}
    options |= {"linear_lower_bound": bound, "qk_rope_head_dim": 0, "q_lora_rank": HEAD}
    return transformers.Glm5NextTextModel(transformers.Glm5NextTextConfig(**SHARED | options | changes))


FAMILIES = {
    "kimi_linear": kimi,
    "bailing_hybrid": bailing,
    "bailing_hybrid_softplus": lambda: bailing(safe=False),
    "glm5_next": glm,
    "glm5_next_softplus": lambda: glm(bound=None),
}


def pair(build=kimi):
    """The same model twice: as transformers runs it, and with lkda's kernels."""
    torch.manual_seed(0)
    theirs = build().float().eval()
    with torch.no_grad():  # large enough that a mistake shows
        for p in theirs.parameters():
            p.mul_(3 if p.dim() == 2 else 1)
    ours = copy.deepcopy(theirs)
    use_lkda_kernels(ours)
    return theirs, ours


def tokens(*shape, seed=0):
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(x):
    mask = torch.ones_like(x)
    mask[0, :7] = 0
    return mask


def outputs(model, x, **options):
    found = model(input_ids=x, **options)
    return found.logits if "logits" in found else found.last_hidden_state


def close(got, want, tolerance=2e-5):
    assert (got - want).norm() <= tolerance * want.norm()


@pytest.fixture
def calls(monkeypatch):
    """How often lkda's KDA has been called."""
    found = []
    own = integration.kda_attention

    def counted(*args, **options):
        found.append(options.get("backend"))
        return own(*args, **options)

    monkeypatch.setattr(integration, "kda_attention", counted)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_theirs(family, calls):
    theirs, ours = pair(FAMILIES[family])
    x = tokens(2, 40)
    found = []
    for model in (theirs, ours):
        y = outputs(model, x, attention_mask=left_padded(x), use_cache=False)
        y = torch.where(left_padded(x).bool().unsqueeze(-1), y, 0)
        model.zero_grad()
        y.square().mean().backward()
        found.append((y, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    assert len(calls) == 2  # of the two KDA layers of ours, and of none of theirs
    (want, wanted), (got, gotten) = found
    close(got, want)
    assert gotten.keys() == wanted.keys()
    # transformers computes the softplus of Kimi Linear as log(1 + exp(x)), which loses digits of small steps.
    wide = {name for name in wanted if "A_log" in name or "dt_bias" in name or "f_" in name}
    largest = max(gradient.norm() for gradient in wanted.values())
    for name, gradient in wanted.items():
        tolerance = 2e-3 if name in wide else 2e-4
        assert (gotten[name] - gradient).norm() <= tolerance * gradient.norm() + 1e-7 * largest, name


@pytest.mark.parametrize("family", ["kimi_linear", "bailing_hybrid"])
def test_generates_the_same_tokens(family, calls):
    theirs, ours = pair(FAMILIES[family])
    x = tokens(2, 10)
    options = {"attention_mask": left_padded(x), "max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    want = theirs.generate(x, **options)
    assert not calls
    assert torch.equal(ours.generate(x, **options), want)
    assert len(calls) == 2 * 12


def glm_with_a_cache():
    """glm5_next makes a cache only with a layer of indexed attention."""
    indexed = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 32, "index_kpool": 4}
    return glm(layer_types=["linear_attention", "indexed_attention"], **indexed)


@pytest.mark.parametrize("build", [kimi, bailing, glm_with_a_cache])
def test_a_cache_continues_a_sequence(build):
    """Prefill in two parts, the second of several tokens, then single tokens."""
    theirs, ours = pair(build)
    x = tokens(2, 24)
    want = outputs(theirs, x, use_cache=False)
    with torch.no_grad():
        cache, found = transformers.DynamicCache(config=ours.config), []
        for part in x.split([3, 15, 1, 1, 4], 1):
            found.append(outputs(ours, part, cache=cache, use_cache=True))
    close(torch.cat(found, 1), want)


@pytest.mark.parametrize("name", ["cu_seqlens", "cu_seq_lens_q"])
def test_packed_sequences_are_kept_apart(name):
    """transformers' own PyTorch code refuses the first and ignores the second."""
    config = {"layer_types": LAYERS[:2], "num_hidden_layers": 2, "mlp_layer_types": ["dense"] * 2}
    theirs, ours = pair(lambda: kimi(**config))
    x, bounds = tokens(1, 30), [0, 12, 30]
    got = outputs(ours, x, use_cache=False, **{name: torch.tensor(bounds)})
    for start, end in zip(bounds, bounds[1:]):
        close(got[:, start:end], outputs(theirs, x[:, start:end], use_cache=False))
    with pytest.raises(ValueError, match="packed sequences need cu_seqlens"):
        outputs(ours, x, use_cache=False, seq_idx=torch.zeros(1, 30, dtype=torch.int32))


def test_it_is_undone_by_a_second_call_or_at_the_end_of_a_context(calls):
    theirs, ours = pair()
    x = tokens(1, 8)
    use_lkda_kernels(ours)  # again: nothing changes
    outputs(ours, x)
    assert len(calls) == 2
    use_lkda_kernels(ours, enable=False)
    assert torch.equal(outputs(ours, x), outputs(theirs, x))
    assert len(calls) == 2
    assert [type(module) for module in ours.modules()] == [type(module) for module in theirs.modules()]
    with use_lkda_kernels(ours):
        outputs(ours, x)
        assert len(calls) == 4
    outputs(ours, x)
    assert len(calls) == 4


class TestContexts:
    """A context undoes its own call, and no other one."""

    @staticmethod
    def on(model):
        return not unchanged(model)

    def test_an_inner_one_leaves_the_outer_one(self):
        model = kimi()
        with use_lkda_kernels(model):
            with use_lkda_kernels(model):
                pass
            assert self.on(model)
        assert not self.on(model)

    def test_one_without_kernels_turns_them_on_again(self):
        model = kimi()
        use_lkda_kernels(model)
        with use_lkda_kernels(model, enable=False):
            assert not self.on(model)
        assert self.on(model)

    def test_an_exception_ends_it(self):
        model = kimi()
        with pytest.raises(KeyError), use_lkda_kernels(model):
            raise KeyError
        assert not self.on(model)

    def test_one_can_be_entered_again(self):
        model = kimi()
        for context in [use_lkda_kernels(model)] * 2:
            with context:
                assert self.on(model)
            assert not self.on(model)


def test_the_state_dict_and_copies_stay(tmp_path, calls):
    theirs, ours = pair()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.save_pretrained(tmp_path)
    loaded = transformers.KimiLinearForCausalLM.from_pretrained(tmp_path).eval()
    x = tokens(1, 8)
    want = outputs(ours, x)
    close(outputs(loaded, x), want)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        calls.clear()
        assert torch.equal(outputs(copied, x), want)
        assert len(calls) == 2
        use_lkda_kernels(copied, enable=False)
        assert unchanged(copied)


def test_gradient_checkpointing_has_the_same_gradients(calls):
    _, ours = pair()
    ours.train()
    x, found = tokens(2, 20), []
    for checkpointing in (False, True):
        if checkpointing:
            ours.gradient_checkpointing_enable()
        ours.zero_grad()
        ours(input_ids=x, labels=x, use_cache=False).loss.backward()
        found.append([p.grad.clone() for p in ours.parameters()])
    assert len(calls) == 2 + 2 * 2
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.long
def test_compiles_without_a_graph_break(calls):
    theirs, ours = pair(lambda: kimi(layer_types=["linear_attention"], num_hidden_layers=1, mlp_layer_types=["dense"]))
    x = tokens(1, 20)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    got = compiled(input_ids=x, use_cache=False).logits
    assert len(calls) == 1  # while it was traced
    want = outputs(theirs, x, use_cache=False)
    close(got, want)
    weight = "model.layers.0.self_attn.q_proj.weight"
    (wanted,) = torch.autograd.grad(want.square().mean(), theirs.get_parameter(weight))
    (gotten,) = torch.autograd.grad(got.square().mean(), ours.get_parameter(weight))
    close(gotten, wanted, 2e-4)


@pytest.mark.slow
def test_the_trainer_trains_it(tmp_path, calls):
    pytest.importorskip("accelerate")
    losses = []
    data = [{"input_ids": x, "labels": x} for x in tokens(8, 16)]
    for model in pair():
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, logging_steps=1, learning_rate=1e-2,
            report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert len(calls) == 4 * 2
    want, got = losses
    assert got[-1] < got[0]
    assert got == pytest.approx(want, rel=1e-3)


def test_the_hooks_of_accelerate_stay(calls):
    """As a model that `from_pretrained(device_map="auto")` puts on several devices has them."""
    hooks = pytest.importorskip("accelerate.hooks")
    theirs, ours = pair()
    use_lkda_kernels(ours, enable=False)
    runs = []

    class Counting(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            runs.append(module)
            return args, kwargs

    for module in ours.modules():
        hooks.add_hook_to_module(module, Counting())
    x, want = tokens(1, 8), outputs(theirs, tokens(1, 8))
    with use_lkda_kernels(ours):
        close(outputs(ours, x), want)
        assert len(calls) == 2
        assert ours.model.layers[0].self_attn in runs
    assert torch.equal(outputs(ours, x), want)
    assert len(calls) == 2
    use_lkda_kernels(ours)
    hooks.remove_hook_from_submodules(ours)
    close(outputs(ours, x), want)
    use_lkda_kernels(ours, enable=False)
    assert torch.equal(outputs(ours, x), want)
    assert len(calls) == 2 * 2


def unchanged(model):
    return all(type(module).__module__.startswith(("transformers.", "torch.")) for module in model.modules())


class TestRefusals:
    def test_a_model_without_kda_is_named(self):
        with pytest.raises(ValueError, match="Linear has no KDA layer of transformers"):
            use_lkda_kernels(nn.Linear(2, 2))

    def test_another_interface_is_named_with_the_version(self, monkeypatch):
        family, model = transformers.models.kimi_linear.modeling_kimi_linear, kimi()

        def causal_conv1d_fn(hidden_states, weight, bias=None, activation=None, seq_idx=None):
            raise AssertionError

        with monkeypatch.context() as patch:
            patch.setattr(family, "causal_conv1d_fn", causal_conv1d_fn)
            found = f"interface of transformers {transformers.__version__}: .*causal_conv1d_fn has the arguments"
            with pytest.raises(ValueError, match=found + ".*seq_idx, not"):
                use_lkda_kernels(model)
        with monkeypatch.context() as patch:
            patch.delattr(family, "causal_conv1d_update")
            with pytest.raises(ValueError, match="has no function causal_conv1d_update"):
                use_lkda_kernels(model)
        assert unchanged(model)

    def test_a_layer_of_other_parts_is_named_and_no_other_layer_changes(self):
        model = kimi()
        model.model.layers[1].self_attn.o_norm = nn.Identity()
        with pytest.raises(ValueError, match="KimiLinearDeltaAttention has 1 gates and 0 gated norms"):
            use_lkda_kernels(model)
        assert unchanged(model)

    def test_a_forward_that_would_hide_the_kernels_is_named(self):
        model = kimi()
        layer = model.model.layers[0].self_attn
        own = layer.forward
        layer.forward = lambda *args, **options: own(*args, **options)
        with pytest.raises(ValueError, match=r"KimiLinearDeltaAttention has a forward of its own, which hides"):
            use_lkda_kernels(model)
        assert unchanged(model)
        layer.forward = own
        use_lkda_kernels(model)
        assert not unchanged(model)
        layer.forward = lambda *args, **options: own(*args, **options)
        with pytest.raises(ValueError, match=r"KimiLinearDeltaAttention has a forward of its own, which hides"):
            use_lkda_kernels(model, enable=False)

    def test_a_class_that_was_made_of_lkdas_is_named(self):
        model = kimi()
        use_lkda_kernels(model)
        layer = model.model.layers[0].self_attn
        layer.__class__ = type("FSDPLayer", (type(layer),), {})  # what fully_shard does
        with pytest.raises(ValueError, match=r"class FSDPLayer was made after lkda's, as fully_shard does; undo"):
            use_lkda_kernels(model, enable=False)
        assert not unchanged(model)

    def test_a_derived_layer_with_another_forward_is_named(self):
        model = kimi()
        layer = model.model.layers[0].self_attn
        theirs = type(layer)

        class Mine(theirs):
            def forward(self, *args, **options):
                return theirs.forward(self, *args, **options)

        layer.__class__ = Mine
        with pytest.raises(ValueError, match="Mine is a KDA layer with a forward of its own"):
            use_lkda_kernels(model)
        layer.__class__ = type("Sharded", (theirs,), {})  # with the forward of its base
        use_lkda_kernels(model)
        assert not unchanged(model)

    def test_what_is_no_model_is_named(self):
        with pytest.raises(ValueError, match="model must be a model of transformers, got 'kimi'"):
            use_lkda_kernels("kimi")

    def test_a_gate_out_of_range_is_named(self):
        with pytest.raises(ValueError, match=r"lower bound of the gate must be in \[-5, 0\), got -8.0"):
            use_lkda_kernels(glm(bound=-8.0))

    def test_another_activation_is_named(self):
        with pytest.raises(ValueError, match="lkda have SiLU, those of the model 'gelu'"):
            use_lkda_kernels(kimi(hidden_act="gelu"))
