"""Decoding on a GPU: captured steps are those that run one by one, and texts are those of a CPU but for near ties."""

from __future__ import annotations

import pytest
import torch

from lkda.models.decoder import Decoder, Sampling
from lkda.models.decoding import prepare_decoding
from lkda.models.generate import BatchGenerator, Request
from tests.models.helpers import IDS, PATTERNS, small

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing is captured"),
]

PROMPTS = [[1, 2, 3], [4], list(range(5, 45)), [11, 12]]
NEAR = 1e-2  # texts may part where the two likeliest logits differ by less


def model_of(pattern):
    return small(pattern, d_model=64, scale=2)


@pytest.mark.parametrize("pattern", PATTERNS, ids=IDS)
def test_captured_steps_are_those_that_run_one_by_one(pattern):
    model, found = model_of(pattern).cuda(), []
    for graphs in (True, False):
        decoder = Decoder(model, 4, 600, Sampling(top_p=0.9), graphs=graphs)
        decoder.admit(range(4), PROMPTS, range(4), [5, 6, 7, 8])
        drawn = [decoder.step().tolist() for _ in range(300)]  # across a bucket of the growing caches
        assert decoder.not_captured == (None if graphs else "graphs=False")
        assert len(decoder._graphs) == (0 if not graphs else 1 if decoder.constant else 2)
        found.append(drawn)
    assert found[0] == found[1]


@pytest.mark.parametrize("options", [{}, {"conv_width": 4, "qk_norm": True}], ids=["plain", "conv-norm"])
def test_captured_steps_over_a_long_cache(options):
    """A cache of several parts, whose sums a second launch adds up."""
    mixer = {"pattern": ["softmax"], "num_heads": 2, "softmax": options}
    model, found = small(["softmax"], d_model=128, scale=2, mixer=mixer).cuda(), []
    for graphs in (True, False):
        decoder = Decoder(model, 2, 3000, Sampling(top_p=0.9), graphs=graphs)
        decoder.admit(range(2), [list(range(50)) * 20, [7] * 600], range(2), [5, 6])
        found.append([decoder.step().tolist() for _ in range(100)])  # across a bucket
        assert len(decoder._graphs) == (2 if graphs else 0)
    assert found[0] == found[1]


@pytest.mark.parametrize("options", [{}, {"conv_width": 4}, {"qk_norm": True}], ids=["plain", "conv", "norm"])
def test_captured_steps_of_latents_with_rotary_positions(options):
    """Also of sequences of unequal lengths. Heads of 64 have 32 rotary channels, which the kernel takes."""
    mixer = {"pattern": ["mla"], "num_heads": 2, "mla": {"rope_base": 100.0, **options}}
    model, found = small(["mla"], d_model=128, scale=2, mixer=mixer).cuda(), []
    for graphs in (True, False):
        decoder = Decoder(model, 4, 600, Sampling(top_p=0.9), graphs=graphs)
        decoder.admit(range(4), PROMPTS, range(4), [5, 6, 7, 8])
        found.append([decoder.step().tolist() for _ in range(300)])  # across a bucket
        assert decoder.not_captured == (None if graphs else "graphs=False")
    assert found[0] == found[1]


@pytest.mark.parametrize("pattern", PATTERNS, ids=IDS)
def test_greedy_texts_part_from_those_of_a_cpu_only_at_near_ties(pattern):
    model, texts = model_of(pattern), []
    for device in ("cpu", "cuda"):
        requests = [Request(prompt, i) for i, prompt in enumerate(PROMPTS)]
        batch = BatchGenerator(model.to(device), requests, max_new_tokens=40, sampling=Sampling(0.0))
        found = {i: [] for i in range(len(PROMPTS))}
        for request, token in batch:
            if token is not None:
                found[request.prompt_index].append(token)
        texts.append(found)
    model.cpu()
    for i, prompt in enumerate(PROMPTS):
        one, two = texts[0][i], texts[1][i]
        assert len(one) == len(two) == 40
        parted = next((t for t in range(40) if one[t] != two[t]), None)
        if parted is not None:
            likeliest = model(torch.tensor([prompt + one[:parted]]))[0, -1].topk(2).values
            assert likeliest[0] - likeliest[1] < NEAR


@pytest.mark.parametrize("name", ["kda", "simplified"])
@torch.inference_mode()
def test_the_operator_of_a_step_is_one_launch(name):
    """In bf16, with parts of one product: nothing is cast or copied before or after it."""
    from lkda.bench.timing import launches

    model = prepare_decoding(model_of([name]).bfloat16().cuda())
    mixer = model.mixers()[0]
    state, x = mixer.init_state(3), torch.randn(3, 64, device="cuda", dtype=torch.bfloat16)
    sizes = [layer.out_features for layer in mixer.step_layers()]
    joined = torch.cat([layer(x) for layer in mixer.step_layers()], -1)
    joined = torch.nn.functional.pad(joined, (0, -joined.shape[1] % 8))[:, : sum(sizes)]
    (q, k, v, *gates), latents = mixer.split_step(joined.split(sizes, -1))
    factors = [second(latent) for (_, second), latent in zip(mixer.factor_layers(), latents, strict=True)]
    given = (*factors[:-1], *gates)
    assert launches(lambda: mixer.attend_step(q, k, v, given, state=state)) == 1
