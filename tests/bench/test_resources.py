"""The kernels' resources: found by compiling, judged by the architecture's limits."""

import pytest

from lkda.bench import resources
from lkda.ops.runtime import jit

pytestmark = pytest.mark.skipif(jit._reason_no_compiler() is not None, reason=str(jit._reason_no_compiler()))


def row(**changes):
    usage = {"op": "kda", "kernel": "inter_chunk_fwd", "variant": "HEAD_DIM=64", "arch": "sm_86", "registers": 64}
    return resources.Usage(**(usage | {"shared_bytes": 99 * 1024, "stack_bytes": 0, "spill_bytes": 0} | changes))


def test_a_spill_and_too_much_shared_memory_are_complaints():
    assert row().complaint() is None
    assert row(spill_bytes=8).complaint() == "kda/inter_chunk_fwd [HEAD_DIM=64] on sm_86 spills 8 bytes of registers"
    assert "needs 101377 bytes of shared memory, and a block can have 101376" in row(shared_bytes=101377).complaint()
    assert row(arch="sm_90a", shared_bytes=101377).complaint() is None


def test_a_kernel_is_compiled_and_its_shared_memory_counts_both_kinds():
    from lkda.ops.simplified.cuda import core as cuda

    n = next(n for n, kernel in enumerate(cuda.kernels("sm_90a")) if kernel.entry == "simplified_forward")
    used = resources.usage((cuda.__name__, "sm_90a", n))
    assert (used.op, used.kernel, used.spill_bytes) == ("simplified", "simplified_forward", 0)
    assert used.shared_bytes == cuda.kernels("sm_90a")[n].shared_bytes
    assert 32 <= used.registers <= 255


def test_every_operator_with_kernels_is_found():
    assert "lkda.ops.simplified.cuda.core" in {module.__name__ for module in resources.kernel_modules()}
