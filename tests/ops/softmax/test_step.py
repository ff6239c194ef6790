"""Softmax attention's decoding step: the kernels on the CPU, the form in PyTorch, and a GPU, against float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from lkda.ops import softmax_step
from lkda.ops.runtime import cpp
from lkda.ops.runtime.jit import ARCHITECTURES
from lkda.ops.softmax.cuda import step as cuda
from lkda.ops.softmax.rotary import frequencies
from tests.ops.cases import relative
from tests.ops.emulation import kernels_on_the_cpu  # noqa: F401

ERROR = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
BASE = 10000.0
needs_compiler = pytest.mark.skipif(cpp.compiler() is None, reason="no C++ compiler")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernels are emulated")


def drawn(lengths, H, D, S, dtype, *, device="cpu", capacity=None, seed=0):
    """q, k and v, which lie side by side in rows; caches, views of larger ones, NaN from `lengths` on; the lengths."""
    generator, B = torch.Generator().manual_seed(seed), len(lengths)
    rows = torch.randn(B, 3 * H * D + 16, generator=generator).to(dtype).to(device)
    heads = [x.unflatten(1, (H, D)) for x in rows[:, : 3 * H * D].chunk(3, 1)]
    caches = torch.randn(2, B, H, capacity or S, D, generator=generator).to(dtype).to(device)
    for b, n in enumerate(lengths):
        caches[:, b, :, n:] = torch.nan
    return *heads, *caches[..., :S, :], torch.tensor(lengths, device=device)


def turned(x, position, D, device):
    """x [H, D] in float64, rotated by the angles that float32 has, with the frequencies that `device` computes."""
    angle = (position * frequencies(D, BASE, torch.float32, device)).double().cpu()
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def exact(q, k, v, k_cache, v_cache, lengths, scale=None):
    """o in float64, and the new entries [B, H, D] of the caches as they are stored."""
    D, dtype, S, device = q.shape[-1], q.dtype, k_cache.shape[2], q.device
    q, k, v, k_cache, v_cache = (x.double().cpu() for x in (q, k, v, k_cache, v_cache))
    outputs, keys = [], []
    for b, n in enumerate(lengths.tolist()):
        new = turned(k[b], n, D, device).to(dtype).double()
        n_cached = min(n, S - 1)
        seen = [torch.cat([x[b, :, :n_cached], y[:, None]], 1) for x, y in ((k_cache, new), (v_cache, v[b]))]
        scores = torch.einsum("hd,hsd->hs", turned(q[b], n, D, device), seen[0]) * (D**-0.5 if scale is None else scale)
        outputs.append(torch.einsum("hs,hsd->hd", scores.softmax(-1), seen[1]))
        keys.append(new)
    return torch.stack(outputs), torch.stack(keys), v


def check(run, x, dtype, scale=None):
    """That `run` gives o and writes the new entries, and nothing else."""
    q, _, _, k_cache, v_cache, lengths = x
    want, new_key, new_value = exact(*x, scale=scale)
    before = [cache.clone() for cache in (k_cache, v_cache)]
    count = lengths.clone()
    o = run(*x)
    assert o.dtype == dtype
    assert o.shape == q.shape
    assert relative(o, want) < ERROR[dtype]
    assert torch.equal(lengths, count)
    for cache, old, new, error in ((k_cache, before[0], new_key, ERROR[dtype]), (v_cache, before[1], new_value, 0)):
        at = lengths.clamp(max=cache.shape[2] - 1)
        rows = torch.arange(len(at), device=at.device)
        torch.testing.assert_close(cache[rows, :, at].double().cpu(), new, rtol=2 * error, atol=error)
        old[rows, :, at] = cache[rows, :, at]
        assert torch.equal(cache.nan_to_num(7.0), old.nan_to_num(7.0))


def by_kernel(q, k, v, k_cache, v_cache, lengths, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return cuda.softmax_step_cuda(q, k, v, k_cache, v_cache, lengths, rope_base=BASE, scale=scale)


def by_function(backend):
    return lambda *x: softmax_step(*x, rope_base=BASE, backend=backend)


@pytest.fixture
def few_tokens_a_part(monkeypatch):
    for name, tokens in (("WHOLE", 40), ("MULTIPLE", 4), ("LEAST", 20)):
        monkeypatch.setattr(cuda, name, tokens)


# Every size and every type, and in the long tests every pair.
PAIRS = ((torch.float32, 32), (torch.bfloat16, 64), (torch.float16, 128))


@pytest.mark.parametrize(
    ("dtype", "D"),
    [
        pytest.param(*pair, marks=[] if pair in PAIRS else [pytest.mark.long])
        for pair in itertools.product(ERROR, (32, 64, 128))
    ],
    ids=str,
)
def test_kernels_against_float64(kernels_on_the_cpu, few_tokens_a_part, dtype, D):  # noqa: F811
    """Sequences that have nothing, end before, at and after a part's bounds, and fill the cache."""
    assert cuda.parts_of(2, 70, 6) == (24, 3)
    for lengths in ((0, 69), (23, 24), (25, 48)):
        check(by_kernel, drawn(lengths, 1, D, 70, dtype, capacity=90), dtype)
    check(by_kernel, drawn((37,), 2, D, 40, dtype, capacity=40), dtype)  # one part


def test_a_part_of_several_rounds(kernels_on_the_cpu):  # noqa: F811
    assert cuda.parts_of(2, 600, 6) == (384, 2)
    check(by_kernel, drawn((599, 130), 1, 64, 600, torch.bfloat16, capacity=700), torch.bfloat16)
    check(by_kernel, drawn((300,), 1, 128, 384, torch.float32), torch.float32)


def test_as_many_parts_as_there_can_be(kernels_on_the_cpu, monkeypatch):  # noqa: F811
    for name, tokens in (("WHOLE", 1), ("MULTIPLE", 1), ("LEAST", 1), ("MOST", 2)):
        monkeypatch.setattr(cuda, name, tokens)
    assert cuda.parts_of(1, 128, 6) == (2, 64)
    check(by_kernel, drawn((127,), 1, 128, 128, torch.bfloat16), torch.bfloat16)
    check(by_kernel, drawn((70,), 1, 32, 128, torch.float32), torch.float32)


@pytest.mark.parametrize(("factor", "scale"), [(30.0, None), (-1.0, 0.7)])
def test_large_scores_and_another_scale(kernels_on_the_cpu, few_tokens_a_part, factor, scale):  # noqa: F811
    q, *rest = drawn((60, 5), 2, 32, 64, torch.float32)
    check(lambda *x: by_kernel(*x, scale=scale), (q * factor, *rest), torch.float32, scale)


def test_a_full_cache_loses_its_last_token(kernels_on_the_cpu, few_tokens_a_part):  # noqa: F811
    for length in (48, 51):
        check(by_kernel, drawn((length,), 1, 32, 48, torch.float32, capacity=64), torch.float32)


def test_a_sequence_alone_has_the_bits_that_it_has_in_a_batch(kernels_on_the_cpu, few_tokens_a_part, monkeypatch):  # noqa: F811
    """Where both have the same parts."""
    monkeypatch.setattr(cuda, "parts_of", lambda items, tokens, room: (20, 3))
    x = drawn((50, 7, 31), 2, 64, 60, torch.bfloat16)
    alone = [by_kernel(*(part[b : b + 1].clone() for part in x)) for b in range(3)]
    assert torch.equal(by_kernel(*x), torch.cat(alone))


def test_a_number_that_is_none_is_not_hidden(kernels_on_the_cpu, few_tokens_a_part):  # noqa: F811
    for name in range(5):
        x = drawn((60,), 1, 32, 64, torch.float32)
        (x[name][0, 0] if name < 3 else x[name][0, 0, 3]).fill_(torch.nan)
        assert by_kernel(*x).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pytorch_against_float64(dtype):
    q, k, v, k_cache, v_cache, lengths = drawn((0, 17, 39, 52), 3, 32, 40, dtype, capacity=64)
    k_cache.nan_to_num_(0.0), v_cache.nan_to_num_(0.0)
    check(by_function("torch"), (q, k, v, k_cache, v_cache, lengths), dtype)


@needs_compiler
@pytest.mark.parametrize("D", [2, 30, 32, 64])
def test_cpp_against_float64(D):
    """Full caches and NaN beyond what is filled included, as the kernels do; and in float64."""
    check(by_function("cpu"), drawn((0, 17, 39, 52), 3, D, 40, torch.float32, capacity=64), torch.float32)
    x = drawn((0, 17, 39, 52), 3, D, 40, torch.float64, capacity=64)
    twin = [part.clone() for part in x[:3]] + [cache.nan_to_num(0.0) for cache in x[3:5]] + [x[5]]
    torch.testing.assert_close(by_function("cpu")(*x), by_function("torch")(*twin), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(x[3].nan_to_num(0.0), twin[3], rtol=1e-11, atol=1e-11)


@needs_compiler
@pytest.mark.parametrize("scale", [None, 0.7, 2])
def test_cpp_with_another_layout_and_scale(scale):
    q, k, v, *caches = drawn((5, 8), 2, 32, 20, torch.float32)
    q = q.mT.contiguous().mT
    check(lambda *x: softmax_step(*x, rope_base=BASE, scale=scale, backend="cpu"), (q, k, v, *caches), q.dtype, scale)


def test_cpp_takes_one_dtype():
    x = drawn((3, 4), 2, 32, 10, torch.float32)
    caches = [cache.double() for cache in x[3:5]]
    with pytest.raises(ValueError, match="backend must be one of auto, torch, got 'cpu'"):
        softmax_step(*x[:3], *caches, x[5], rope_base=BASE, backend="cpu")


def test_parts_cover_the_cache():
    for items in (1, 8, 64, 300, 4096):
        for tokens in (1, 256, 512, 513, 600, 2**10, 32768, 100_000, 2**20):
            part, splits = cuda.parts_of(items, tokens, 264)
            assert (splits - 1) * part < tokens <= splits * part
            assert 1 <= splits <= cuda.MAX_SPLITS
    assert cuda.parts_of(8, 32768, 264) == (1024, 32)
    assert cuda.parts_of(4096, 2048, 264) == (2048, 1)


def _lengths_of_int32(x):
    x[5] = x[5].int()


def _a_cache_of_columns(x):
    x[3] = x[3].mT.contiguous().mT


def _caches_of_two_layouts(x):
    x[4] = x[4].clone()


def _odd(x):
    x[:5] = [part[..., :31] for part in x[:5]]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_lengths_of_int32, "lengths must be int64"),
        (_a_cache_of_columns, "one layout"),
        (_caches_of_two_layouts, "one layout"),
        (_odd, "D must be even, got 31"),
    ],
)
def test_bad_input(spoil, message):
    x = list(drawn((3, 4), 2, 32, 10, torch.float32, capacity=12))
    spoil(x)
    with pytest.raises(ValueError, match=message):
        softmax_step(*x, rope_base=BASE)


@pytest.mark.sample(3)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile_without_spills(arch):
    kernel = cuda.step_kernel(64, torch.bfloat16)
    for used in kernel.module.binary(arch).resources().values():
        assert used.spill_bytes == 0
        assert used.registers <= 128


@pytest.mark.gpu
@needs_gpu
class TestOnAGPU:
    @pytest.mark.parametrize("dtype", list(ERROR), ids=str)
    @pytest.mark.parametrize("D", [32, 64, 128])
    def test_against_float64(self, dtype, D):
        for lengths, H, S in (
            *(((0,), 8, 256), ((255,), 8, 256), ((1023, 1, 512, 600), 3, 1024)),
            *(((20_000,), 8, 32768), ((32_767, 16_384), 4, 32768), ((700, 0, 3) * 20, 4, 1024)),
        ):
            x = drawn(lengths, H, D, S, dtype, device="cuda", capacity=S + 100)
            check(by_function("cuda"), x, dtype)

    def test_the_same_bits_again_and_in_a_graph(self):
        x = drawn((20_000, 31), 8, 64, 32768, torch.bfloat16, device="cuda")
        want = by_function("cuda")(*x)
        for _ in range(20):
            assert torch.equal(by_function("cuda")(*x), want)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o = by_function("cuda")(*x)
        for _ in range(20):
            o.zero_()
            graph.replay()
            assert torch.equal(o, want)

    @pytest.mark.parametrize(("S", "count"), [(256, 1), (512, 1), (1024, 2)])
    def test_it_is_one_launch_or_two(self, S, count):
        from lkda.bench.timing import launches

        x = drawn((200, 3), 4, 64, S, torch.bfloat16, device="cuda")
        assert launches(lambda: by_function("cuda")(*x)) == count

    def test_opcheck(self):
        *heads, k_cache, v_cache, lengths = drawn((200, 3), 4, 64, 1024, torch.bfloat16, device="cuda")
        arguments = (*heads, k_cache.nan_to_num(0.0), v_cache.nan_to_num(0.0), lengths, BASE, 0.125)
        torch.library.opcheck(torch.ops.lkda.softmax_step, arguments, test_utils=("test_schema", "test_faketensor"))
