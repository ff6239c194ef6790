"""Activations that cannot fit are refused, and freed memory stays with the process."""

import ctypes
import platform
import subprocess
import sys

import pytest
import torch

from lkda.training import memory
from lkda.training.losses import ModelLoss
from tests.models.helpers import IDS, PATTERNS, small, tokens

CODE = """
import resource, torch
from lkda.training.memory import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        torch.ones(12_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
plain = faults()
assert keep_freed_memory()
torch.ones(12_000_000)
print(plain, faults())
"""


@pytest.mark.long
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the setting")
def test_freed_memory_is_used_again():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    plain, kept = map(int, done.stdout.split())
    assert kept < plain / 4


RETURNED = """
import torch
from lkda.training.memory import return_freed_memory
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
for _ in range(2):  # the first time, glibc learns from what is freed to take such blocks from its heap
    blocks = [torch.ones(500_000) for _ in range(100)]
    last = torch.ones(500_000)  # so that the others are not at the end of the heap
    full = resident()
    del blocks
kept = resident()
assert return_freed_memory()
print(full, kept, resident())
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the function")
def test_freed_memory_is_returned():
    done = subprocess.run([sys.executable, "-c", RETURNED], capture_output=True, text=True, check=True)
    full, kept, left = map(int, done.stdout.split())
    assert full - kept < 100_000_000
    assert full - left > 190_000_000


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert memory.keep_freed_memory() is False
    assert memory.return_freed_memory() is False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("checkpointing", ["none", "block"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=IDS)
def test_no_batch_that_fits_is_refused(pattern: list[str], checkpointing: str, dtype: torch.dtype) -> None:
    """What autograd keeps of a batch is more than the bound."""
    model, x = small(pattern).train(), tokens(2, 256)
    kept = {parameter.untyped_storage().data_ptr(): 0 for parameter in model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast:
        loss = ModelLoss(model, checkpointing=checkpointing).mean(x, x)
    total = sum(kept.values())
    options = {"tokens": x.numel(), "checkpointing": checkpointing, "dtype": dtype}
    memory.check_activations(model.config, **options, available=total)
    with pytest.raises(ValueError, match=r"one batch of 512 tokens needs more than 0 GiB .*: lower data.batch_size"):
        memory.check_activations(model.config, **options, available=total // 100)
    assert loss.isfinite()


@pytest.mark.parametrize("used", [False, True])
def test_a_run_begins_without_the_memory_of_earlier_jobs(used: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also without creating a context on a GPU that the process has not used yet."""
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: done.append(name))
    memory.free_memory_of_earlier_runs()
    assert done == (["empty_cache", "reset_peak_memory_stats"] if used else [])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_peak_is_of_this_run() -> None:
    x = torch.empty(2**28, device="cuda")
    del x
    memory.free_memory_of_earlier_runs()
    assert torch.cuda.max_memory_reserved() < 2**28
