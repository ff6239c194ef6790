"""Linear layers of a few tokens: the kernel's source on the CPU, and the kernel on a GPU, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lkda.ops.token_linear import cuda
from lkda.ops.token_linear.op import add_gated_linear_, add_linear_, grouped_linear, normed_linear
from tests.ops.cases import relative
from tests.ops.emulation import kernels_on_the_cpu  # noqa: F401

ERROR = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
EPS = 1e-5


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rms(x, weight):
    return F.rms_norm(x, weight.shape, weight, EPS)


def cases(dtype, tokens, inputs, outputs, device="cpu"):
    """x has rows that are part of longer ones, as where several layers share a product."""
    wide = drawn(tokens, inputs + 16, dtype=dtype, seed=1)
    given = wide[:, :inputs], drawn(inputs, seed=2), drawn(outputs, inputs, dtype=dtype, seed=3)
    return [x.to(device) for x in given]


def check_all(dtype, tokens, inputs, outputs, head_dim, device, normed, grouped, added, gated):
    x, norm, weight = cases(dtype, tokens, inputs, outputs, device)
    X, N, W = (v.double().cpu() for v in (x, norm, weight))
    want = rms(X, N) @ W.T
    assert relative(normed(x, norm, weight, False), want) < ERROR[dtype]
    both = torch.cat([weight, drawn(outputs, inputs, dtype=dtype, seed=4).to(device)])
    gate, up = (rms(X, N) @ both.double().cpu().T).chunk(2, -1)
    assert relative(normed(x, norm, both, True), F.silu(gate) * up) < 2 * ERROR[dtype]

    groups = drawn(2, outputs, inputs // 2, dtype=dtype, seed=5).to(device)
    pieces = zip(X.chunk(2, -1), groups.double().cpu(), strict=True)
    assert relative(torch.cat(list(grouped(x, groups)), -1), torch.cat([a @ b.T for a, b in pieces], -1)) < ERROR[dtype]

    stream = drawn(tokens, outputs, dtype=dtype, seed=6).to(device)
    want = stream.double().cpu() + X @ W.T
    added(stream, x, weight)
    assert relative(stream, want) < ERROR[dtype]

    o = x.contiguous().view(tokens, -1, head_dim)
    head_norm, gates = drawn(head_dim, seed=7).to(device), drawn(tokens, inputs + 8, dtype=dtype, seed=8).to(device)
    for gate in (gates[:, :inputs], None):  # a part of longer rows
        stream = drawn(tokens, outputs, dtype=dtype, seed=9).to(device)
        y = rms(o.double().cpu(), head_norm.double().cpu()).flatten(1)
        want = stream.double().cpu() + (y if gate is None else y * gate.double().cpu().sigmoid()) @ W.T
        gated(stream, o, gate, head_norm, weight)
        assert relative(stream, want) < ERROR[dtype]


@pytest.mark.parametrize(
    ("dtype", "tokens", "inputs", "outputs", "head_dim"),
    [
        (torch.bfloat16, 1, 1344, 9, 64),
        pytest.param(torch.float32, 1, 640, 13, 32, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, 4, 256, 20, 128, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_kernel_against_float64(kernels_on_the_cpu, dtype, tokens, inputs, outputs, head_dim):  # noqa: F811
    check_all(
        *(dtype, tokens, inputs, outputs, head_dim, "cpu"),
        lambda x, norm, weight, swiglu: cuda.normed_linear_cuda(x, norm, weight, EPS, swiglu),
        cuda.grouped_linear_cuda,
        cuda.add_linear_cuda,
        lambda x, o, gate, norm, weight: cuda.add_gated_linear_cuda(x, o, gate, norm, weight, EPS),
    )


@pytest.mark.slow
def test_many_outputs(kernels_on_the_cpu):  # noqa: F811
    for tokens in (1, 2):
        x, norm, weight = cases(torch.bfloat16, tokens, 64, 8195)
        want = rms(x.double(), norm.double()) @ weight.double().T
        got = cuda.normed_linear_cuda(x, norm, weight, EPS, False)
        assert relative(got, want) < ERROR[torch.bfloat16]


def by_functions(dtype, tokens, inputs, outputs, head_dim, device, backend):
    check_all(
        *(dtype, tokens, inputs, outputs, head_dim, device),
        lambda x, norm, weight, swiglu: normed_linear(x, norm, weight, eps=EPS, swiglu=swiglu, backend=backend),
        lambda x, weight: grouped_linear(x, weight, backend=backend),
        lambda x, y, weight: add_linear_(x, y, weight, backend=backend),
        lambda x, o, gate, norm, weight: add_gated_linear_(x, o, gate, norm, weight, backend=backend),
    )


def test_pytorch_against_float64():
    by_functions(torch.float32, 12, 256, 40, 64, "cpu", "torch")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernel is emulated, not run")
@pytest.mark.parametrize(
    ("dtype", "tokens"), [(torch.bfloat16, 1), (torch.bfloat16, 2), (torch.bfloat16, 4), (torch.float32, 1)], ids=str
)
def test_on_a_gpu(dtype, tokens):
    torch.backends.cuda.matmul.allow_tf32 = False
    for inputs, outputs, head_dim in ((512, 1672, 64), (1024, 1024, 128), (1376, 512, 32), (2752, 9000, 64)):
        by_functions(dtype, tokens, inputs, outputs, head_dim, "cuda", "cuda")


def test_more_tokens_than_the_kernel_takes_are_refused_by_name():
    reason = cuda.cannot_run(torch.device("cuda"), 5, torch.bfloat16)
    assert reason is not None
    assert "at most 4 in bfloat16 and 1 in float32), got 5 in bfloat16" in reason


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_more_tokens_than_the_kernel_takes_run_without_it():
    x, norm, weight = cases(torch.bfloat16, 5, 64, 16, "cuda")
    with pytest.raises(ValueError, match="got 5 in bfloat16"):
        normed_linear(x, norm, weight, eps=EPS, backend="cuda")
    assert normed_linear(x, norm, weight, eps=EPS).shape == (5, 16)
