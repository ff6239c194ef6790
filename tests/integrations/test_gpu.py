"""Models of transformers and FLA with lkda's kernels on a GPU. On a CUDA machine: pytest -m gpu tests/integrations"""

from __future__ import annotations

import collections
import copy
import importlib
import re
import statistics
import sys

import pytest
import torch
import torch.nn.functional as F

from lkda.integrations import fla as integration
from lkda.integrations.transformers import use_lkda_kernels
from tests.ops.cases import relative

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
VOCAB = 1000


@pytest.fixture
def transformers(monkeypatch):
    """With its PyTorch code, also where FLA is installed: a family's module chooses when it is imported."""
    found = pytest.importorskip("transformers", minversion="5.24")
    with monkeypatch.context() as patch:
        for package in ("fla", "causal_conv1d"):
            patch.setitem(sys.modules, package, None)
        importlib.import_module("transformers.models.kimi_linear.modeling_kimi_linear")
    return found


def dense_kimi(transformers, layers=12, width=1024, seed=0):
    """Three KDA layers for each MLA layer, heads of 128."""
    heads = width // 128
    kinds = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(layers)]
    config = transformers.KimiLinearConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, kv_lora_rank=width // 2, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, layer_types=kinds, mlp_layer_types=["dense"] * layers,
        linear_head_dim=128, linear_num_heads=heads, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(seed)
    return transformers.KimiLinearForCausalLM(config).cuda().eval()


def tokens(*shape):
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(0)).cuda()


def lkdas_kernels(call):
    """The names of lkda's kernels for KDA that a call launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return {event.key for event in profile.key_averages() if event.key.startswith("kda_")}


def logits_and_gradients(model, x, mask):
    model.zero_grad()
    found = model(input_ids=x, attention_mask=mask, labels=x, use_cache=False)
    found.loss.backward()
    real = mask.bool()
    return {"logits": found.logits[real].float()} | {name: p.grad.float() for name, p in model.named_parameters()}


class TestKimiLinear:
    def test_logits_and_gradients_err_no_more_than_theirs(self, transformers):
        """Of bf16 weights against float32: lkda's kernels at most twice the error of transformers' own path.

        A parameter's error is the root mean square over layers and seeds: `A_log` has four numbers in a layer, whose
        errors with one seed are between 0.5% and 4% in either path.
        """
        x = tokens(2, 300)
        mask = torch.ones_like(x)
        mask[0, :50] = 0
        errors = collections.defaultdict(list)
        for seed in range(4):
            truth = dense_kimi(transformers, seed=seed)
            theirs = copy.deepcopy(truth).bfloat16()
            truth.load_state_dict({name: x.float() for name, x in theirs.state_dict().items()})
            ours = copy.deepcopy(theirs)
            use_lkda_kernels(ours)
            want, own, got = (logits_and_gradients(model, x, mask) for model in (truth, theirs, ours))
            for name, y in want.items():
                errors[re.sub(r"\.\d+\.", ".", name)].append((relative(got[name], y), relative(own[name], y)))
        found = {name: [statistics.fmean(x**2 for x in side) ** 0.5 for side in zip(*e)] for name, e in errors.items()}
        assert {name: pair for name, pair in found.items() if pair[0] > 2 * pair[1] + 1e-3} == {}

    def test_greedy_generation_is_theirs_for_200_tokens(self, transformers):
        theirs = dense_kimi(transformers)
        with torch.no_grad():  # so that the likeliest token is clear
            theirs.lm_head.weight.mul_(20)
        ours = copy.deepcopy(theirs)
        use_lkda_kernels(ours)
        x = tokens(2, 50)
        mask = torch.ones_like(x)
        mask[0, :11] = 0
        options = {"attention_mask": mask, "max_new_tokens": 200, "min_new_tokens": 200, "do_sample": False}
        assert torch.equal(ours.generate(x, **options), theirs.generate(x, **options))

    def test_compiles_without_a_graph_break(self, transformers):
        """The compiled model rounds at other places: against float32 it errs as much as the eager one."""
        truth = dense_kimi(transformers)
        ours = copy.deepcopy(truth).bfloat16()
        truth.load_state_dict({name: x.float() for name, x in ours.state_dict().items()})
        use_lkda_kernels(ours)
        x = tokens(2, 300)
        compiled = torch.compile(ours, fullgraph=True)
        with torch.no_grad():
            want, eager, got = (model(input_ids=x, use_cache=False).logits.float() for model in (truth, ours, compiled))
        assert relative(got, want) < 1.1 * relative(eager, want)
        assert {"kda_inter_chunk_fwd"} <= lkdas_kernels(lambda: compiled(input_ids=x, use_cache=False))

    def test_two_layers_of_the_published_48b_train_and_decode(self, transformers):
        """Hidden 2304, 32 heads of 128, 256 experts: one KDA layer and one MLA layer, random weights in bf16."""
        config = transformers.KimiLinearConfig(
            num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], mlp_layer_types=["sparse"] * 2
        )
        assert (config.hidden_size, config.linear_num_heads, config.linear_head_dim) == (2304, 32, 128)
        assert config.num_experts == 256
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = transformers.KimiLinearForCausalLM._from_config(config, dtype=torch.bfloat16)
        use_lkda_kernels(model)
        x = torch.randint(3, config.vocab_size, (1, 2048), device="cuda")
        losses, found = [], []

        def train():
            losses.append(model(input_ids=x, labels=x, use_cache=False).loss)
            losses[0].backward()

        assert {"kda_inter_chunk_fwd", "kda_inter_chunk_bwd"} <= lkdas_kernels(train)
        assert losses[0].isfinite()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        right = [name for name, grad in gradients.items() if grad is not None and grad.isfinite().all() and grad.any()]
        assert right == list(gradients)
        model.zero_grad()
        model.eval()
        prompt = x[:, :100]
        options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "eos_token_id": None}
        mask = torch.ones_like(prompt)
        kernels = lkdas_kernels(lambda: found.append(model.generate(prompt, attention_mask=mask, **options)))
        assert {"kda_inter_chunk_fwd", "kda_recurrent"} <= kernels
        (found,) = found
        with torch.no_grad():
            logits = model(input_ids=found[:, :-1], use_cache=False).logits[0, 99:].float()
        chosen = logits.gather(1, found[0, 100:, None]).squeeze(1)
        best = logits.max(1).values
        # The tokens of the cached steps are the likeliest of one pass too, up to rounding.
        assert ((best - chosen) <= 0.05 * logits.std(1) + 1e-3).all()


class TestFLA:
    @pytest.fixture
    def layers(self):
        pytest.importorskip("fla.ops.kda")
        from fla import layers

        yield layers
        integration.unregister()

    @pytest.mark.parametrize(
        "heads", [{"num_heads": 4}, {"num_heads": 2, "num_v_heads": 4}, {"num_heads": 4, "expand_v": 2}]
    )
    def test_a_layer_gives_its_own_results(self, layers, heads):
        torch.manual_seed(0)
        layer = layers.KimiDeltaAttention(hidden_size=512, head_dim=128, layer_idx=0, **heads).cuda()
        mask = torch.ones(2, 300, dtype=torch.long, device="cuda")
        mask[0, :70] = 0

        def results():
            x = torch.randn(2, 300, 512, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
            x.requires_grad_()
            with torch.autocast("cuda", torch.bfloat16):
                y = layer(x, attention_mask=mask)[0].float()
            return [y, *torch.autograd.grad(y.square().mean(), [x, *layer.parameters()])]

        integration.unregister()
        want = results()
        integration.register()
        got = results()
        errors = [relative(x, y) for x, y in zip(got, want, strict=True)]
        assert max(errors) < 0.03, errors

    @pytest.mark.parametrize("width", [512, 1024])
    @pytest.mark.parametrize("adds", [False, True])
    def test_a_norm_gives_its_own_results(self, layers, adds, width):
        from fla.modules import RMSNorm

        torch.manual_seed(0)
        layer = RMSNorm(width).cuda()
        torch.nn.init.normal_(layer.weight)
        x = torch.randn(2, 300, width, device="cuda").bfloat16().requires_grad_()
        residual = torch.randn(2, 300, width, device="cuda", requires_grad=True) if adds else None

        def results():
            y, s = layer(x, residual, True)
            leaves = [x, layer.weight, *([residual] if adds else [])]
            return [y, s, *torch.autograd.grad(y.float().square().mean() + s.float().sin().mean(), leaves)]

        integration.unregister()
        want = results()
        integration.register()
        errors = [relative(x.float(), y.float()) for x, y in zip(results(), want, strict=True)]
        assert max(errors) < 0.01, errors

    def test_decoding_gives_its_own_results(self, layers):
        from fla.models.utils import Cache

        torch.manual_seed(0)
        layer = layers.KimiDeltaAttention(hidden_size=512, head_dim=128, num_heads=4, layer_idx=0)
        layer = layer.cuda().bfloat16().eval()
        x = torch.randn(2, 110, 512, device="cuda", dtype=torch.bfloat16)

        @torch.no_grad()
        def decoded():
            cache, found = Cache(), []
            for part in x.split([100, *[1] * 10], 1):
                y, _, cache = layer(part, past_key_values=cache, use_cache=True)
                found.append(y)
            return torch.cat(found, 1).float()

        integration.unregister()
        want = decoded()
        integration.register()
        assert relative(decoded(), want) < 0.02

    def test_chunk_kda_runs_lkda(self, layers, caplog):
        from fla.ops.kda import chunk_kda

        q, k, v, g = (torch.randn(1, 100, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4))
        beta = torch.rand(1, 100, 2, device="cuda", dtype=torch.bfloat16)
        integration.register()
        with caplog.at_level("INFO", "fla.backends"):
            chunk_kda(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, -g.float().abs(), beta)
            chunk_kda(q[..., :48], k[..., :48], v, -g[..., :48].float().abs(), beta)
        said = [record.getMessage() for record in caplog.records]
        assert any("chunk_kda -> lkda" in line for line in said)
        assert any("lkda rejected: the kernel takes heads of 32, 64, 128, got 48" in line for line in said)
