"""The notes' table: its kernels against float64, on the CPU and on a GPU, and what is counted."""

from __future__ import annotations

import shutil

import pytest
import torch

from lkda.bench.notes import ablations, table
from lkda.bench.op_benchmark import Shape
from lkda.bench.ops import find
from lkda.ops.runtime import jit
from tests.ops.cases import poisoned, relative
from tests.ops.emulation import kernels_on_the_cpu  # noqa: F401

emulated = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler"),
    pytest.mark.usefixtures("kernels_on_the_cpu"),
]
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernels are emulated"),
]
# One of each choice. Compiling a variant for the CPU takes a second.
EMULATED = ("the notes' choices", "8-byte loads", "blocks of 32 channels", "4 bytes, 24 KB, 16 channels, 32 threads")


def check(op, run, shape, device):
    torch.manual_seed(0)
    benchmark = find(op)
    inputs = benchmark.inputs(shape, torch.bfloat16, torch.device(device), benchmark.gates[0])
    with poisoned():
        (o,) = run(inputs)
    want = benchmark.truth({name: x.double() for name, x in inputs.items()})[0]
    assert relative(o, want) < 2.5e-3  # rounding to bfloat16 alone gives 1.7e-3


class TestEmulated:
    pytestmark = emulated

    @pytest.mark.parametrize("option", EMULATED)
    def test_variants_of_the_simplified_kernel(self, option):
        choices = ablations.SIMPLIFIED[option]
        T = 2 * choices.tokens + choices.tokens // 3
        check("simplified", lambda x: ablations.run_simplified(x, choices), Shape(1, T, 2, ablations.HEAD_DIM), "cpu")

    @pytest.mark.parametrize("option", ["2 threads per column", "8 threads per column"])
    def test_variants_of_the_recurrent_kernel(self, option):
        variant = ablations.RECURRENT[option]
        shape = Shape(1, 3, 1, ablations.RECURRENT_HEAD_DIM)
        check("kda", lambda x: ablations.run_recurrent(x, variant), shape, "cpu")


@pytest.mark.parametrize("option", ablations.SIMPLIFIED)
def test_a_block_uses_as_much_shared_memory_as_the_option_says(option):
    choices = ablations.SIMPLIFIED[option]
    assert 0.88 < choices.shared_bytes / (choices.shared_kib * 1024) <= 1
    assert choices.tokens // choices.strips % 2 == 1
    assert choices.shared_bytes <= min(jit.SHARED_BYTES_PER_BLOCK.values())


def test_operations_by_hand():
    shape = Shape(2, 128, 3, 64)
    tokens = 2 * 128 * 3
    assert table._elementwise(shape) == 12 * 64 * tokens
    assert table._recurrent(shape) == 7 * 64 * 64 * tokens
    assert table._chunked(shape) == pytest.approx(tokens * (6 * 64**2 + 4 * 64 * 64 + 64**2 / 3))
    assert table._quadratic(shape) == 2 * 3 * (4 * 64) * (128 * 129 // 2)


def test_state_bytes_are_those_of_what_the_operators_return():
    shape = Shape(1, 6, 2, 32)
    for op in ("simplified", "kda"):
        benchmark = find(op)
        inputs = benchmark.inputs(shape, torch.float32, torch.device("cpu"), benchmark.gates[0])
        state = benchmark.backends["recurrent"].run(inputs)[1]
        assert table.STATE_BYTES[op](shape) == state.nbytes
    q = find("softmax").inputs(shape, torch.bfloat16, torch.device("cpu"), None)
    assert table.STATE_BYTES["softmax"](shape) == q["k"].nbytes + q["v"].nbytes


class TestOnAGPU:
    pytestmark = gpu

    @pytest.mark.parametrize("option", ablations.SIMPLIFIED)
    def test_each_variant_of_the_simplified_kernel(self, option):
        choices = ablations.SIMPLIFIED[option]
        check("simplified", lambda x: ablations.run_simplified(x, choices), Shape(3, 1000, 5, 64), "cuda:0")

    @pytest.mark.parametrize("option", ablations.RECURRENT)
    def test_each_variant_of_the_recurrent_kernel(self, option):
        variant = ablations.RECURRENT[option]
        check("kda", lambda x: ablations.run_recurrent(x, variant), Shape(2, 300, 3, 128), "cuda:0")
