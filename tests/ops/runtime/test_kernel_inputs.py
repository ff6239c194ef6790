"""What the kernels take, said alike by all of them."""

from __future__ import annotations

import importlib

import pytest
import torch

from lkda.ops.runtime import kernel_inputs

MODULES = {
    "kda.cuda.core": "chunk",
    "kda.cuda.recurrent": "chunk",
    "kda.cuda.step": "torch",
    "simplified.cuda.core": "chunk",
    "short_conv.cuda": "torch",
    "softmax.cuda.naive": "naive",
    "softmax.cuda.step": "torch",
    "gated_norm.cuda": "torch",
}


@pytest.mark.parametrize(("module", "otherwise"), MODULES.items())
def test_what_the_kernels_cannot_take_is_said(module, otherwise, monkeypatch):
    reason, device = importlib.import_module(f"lkda.ops.{module}").reason_cannot_run, torch.device("cuda", 0)
    on_cpu = f"not on a CUDA device; use backend='auto' or backend='{otherwise}', or move them"
    assert on_cpu in reason(torch.device("cpu"), 64, torch.bfloat16)
    assert on_cpu in reason(torch.device("cpu"), 96, torch.float64)
    monkeypatch.setattr(kernel_inputs, "reason_cannot_run", lambda device, otherwise: None)  # as on a machine that can
    assert f"heads of 32, 64, 128, got 96; use backend='{otherwise}'" in reason(device, 96, torch.bfloat16)
    assert f"got torch.float64; use backend='{otherwise}'" in reason(device, 64, torch.float64)
    assert reason(device, 64, torch.bfloat16) is None


def test_the_reason_is_a_constant_to_the_tracer():
    reason = kernel_inputs.cannot_take(otherwise="chunk")

    def choose(x):
        return x + (reason(x.device, 96, x.dtype) is None)

    assert float(torch.compile(choose, backend="eager", fullgraph=True)(torch.zeros(1))) == 0


def test_what_is_read_is_contiguous_and_aligned():
    x = torch.arange(64.0)
    assert kernel_inputs.readable(x) is x
    for view in (x[1:9], x.view(8, 8).T):
        copy = kernel_inputs.readable(view)
        assert copy.is_contiguous()
        assert copy.data_ptr() % 16 == 0
        assert torch.equal(copy, view)
