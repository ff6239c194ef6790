"""Sampling: the counter's random numbers, the sets of tokens, and the kernel, run on the CPU."""

from __future__ import annotations

import shutil

import pytest
import torch

from lkda.ops.runtime import cpp
from lkda.ops.sampling.cpu import sample_cpu
from lkda.ops.sampling.cuda import sample_cuda
from lkda.ops.sampling.op import sample_tokens
from lkda.ops.sampling.reference import draw_key, sample_torch, uniforms
from tests.ops.emulation import kernels_on_the_cpu  # noqa: F401

DRAWS = 4000


def drawn(logits, **options):
    """DRAWS tokens of one row of logits."""
    rows = logits.expand(DRAWS, -1)
    keys = torch.full((DRAWS,), draw_key(3, 1, 2))
    return sample_tokens(rows, keys=keys, positions=torch.arange(DRAWS), **options)


def test_random_numbers_are_those_of_splitmix64():
    """The first outputs of the generator with seed 1234567, as its authors publish them."""
    got = uniforms(torch.full((3,), 1234567), torch.arange(3))
    want = [(x >> 11) * 2.0**-53 for x in (6457827717110365317, 3203168211198807973, 9817491932198370423)]
    assert got.tolist() == want


def test_a_key_depends_on_each_number():
    keys = {draw_key(seed, i, j) for seed in range(5) for i in range(5) for j in range(5)}
    assert len(keys) == 125
    assert all(-(2**63) <= key < 2**63 for key in keys)


def test_frequencies_are_the_probabilities():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])
    got = drawn(logits, temperature=0.7).bincount(minlength=5) / DRAWS
    torch.testing.assert_close(got, torch.softmax(logits / 0.7, 0), atol=0.025, rtol=0)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 3}, {0, 1, 2, 3}),  # 2 and 3 are equally likely
        ({"top_p": 0.39}, {0}),
        ({"top_p": 0.41}, {0, 1}),
        ({"top_p": 0.71}, {0, 1, 2, 3}),
        ({"min_p": 0.5}, {0, 1}),
        ({"top_k": 2, "top_p": 0.6}, {0, 1}),
        ({"top_k": 2, "top_p": 0.55}, {0}),  # of the two, the first has 4 / 7
        ({}, {0, 1, 2, 3, 4}),
    ],
)
def test_the_sets_of_tokens(options, kept):
    logits = torch.tensor([0.4, 0.3, 0.125, 0.125, 0.05]).log()
    assert set(drawn(logits, **options).tolist()) == kept


def test_a_large_vocabulary_is_searched_among_the_likeliest_first():
    logits = torch.randn(2, 6000, generator=torch.Generator().manual_seed(0))
    for scale in (0.0, 0.01, 4.0):  # the nucleus has most tokens, and few
        counts = (torch.softmax(logits * scale, -1) * 1e6).sort(descending=True).values
        size = int((counts[0].cumsum(0) < 0.9e6).sum()) + 1
        found = sample_tokens(
            (logits[:1] * scale).expand(500, -1),
            keys=torch.full((500,), 5),
            positions=torch.arange(500),
            top_p=0.9,
        )
        allowed = (logits[0] * scale).sort(descending=True).values[size - 1]
        assert (logits[0, found] * scale >= allowed - 1e-6).all()


def test_logits_that_are_not_finite_give_no_token():
    logits = torch.tensor([[0.0, float("nan")], [1.0, float("inf")], [0.0, float("-inf")]])
    for temperature in (0.0, 1.0):
        got = sample_tokens(logits, keys=torch.arange(3), positions=torch.zeros(3).long(), temperature=temperature)
        assert got.tolist() == [-1, -1, 0]


OPTIONS = [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.8, 0, 0.95, 0.0), (1.2, 20, 0.7, 0.05)]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.usefixtures("kernels_on_the_cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_kernel_samples_what_the_definition_does(options, dtype):
    logits = (2 * torch.randn(3, 2500, generator=torch.Generator().manual_seed(1))).to(dtype)
    logits[1, 7] = float("-inf")
    given = logits, torch.arange(3) - 1, torch.tensor([0, 5, 2**40])
    assert sample_cuda(*given, *options).tolist() == sample_torch(*given, *options).tolist()


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.usefixtures("kernels_on_the_cpu")
def test_the_kernel_gives_no_token_for_logits_that_are_not_finite():
    logits = torch.zeros(3, 1100)
    logits[0, 5], logits[1, 1099], logits[2, 3] = float("nan"), float("inf"), 1.0
    got = sample_cuda(logits, torch.arange(3), torch.zeros(3).long(), 0.0, 0, 1.0, 0.0)
    assert got.tolist() == [-1, -1, 3]


@pytest.mark.skipif(cpp.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("scale", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("options", [*OPTIONS, (1.0, 3, 1.0, 0.0), (1.0, 0, 0.01, 0.0), (1.0, 0, 1.0, 0.3)])
def test_the_cpp_samples_what_the_definition_does(options, scale):
    """But for the last bits of exp, which decide one draw of thousands."""
    logits = scale * torch.randn(300, 3000, generator=torch.Generator().manual_seed(1))
    logits[:, 7] = float("-inf")
    given = logits, torch.arange(300) - 1, torch.arange(300) ** 4
    found = sample_cpu(*given, *options)
    assert (found == sample_torch(*given, *options)).float().mean() >= 0.99
    assert torch.equal(torch.cat([sample_cpu(*(x[n : n + 1] for x in given), *options) for n in (0, 7)]), found[[0, 7]])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernel is emulated, not run")
@pytest.mark.parametrize("options", OPTIONS)
def test_on_a_gpu_the_tokens_are_those_of_a_cpu(options):
    logits = 2 * torch.randn(64, 32000, generator=torch.Generator().manual_seed(1))
    given = logits, torch.arange(64), torch.arange(64)
    got = sample_cuda(*(x.cuda() for x in given), *options).cpu()
    assert (got == sample_torch(*given, *options)).float().mean() >= 0.98  # exp differs in its last bit
