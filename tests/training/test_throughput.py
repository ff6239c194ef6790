"""What a run says of its device."""

from __future__ import annotations

import pytest
import torch

from lkda.models.build import build_model
from lkda.training.throughput import Throughput, peak_flops

CPU = torch.device("cpu")


def test_a_backward_counts_two_forwards() -> None:
    model = build_model(
        {"vocab_size": 100, "d_model": 16, "num_layers": 1, "mixer": {"pattern": ["softmax"], "num_heads": 2}}
    )
    found = Throughput.of(model, context=8, device=CPU, dtype=torch.float32)
    assert found.flops_per_token == 3 * model.flops_per_token(8) > 6 * 16 * 100
    assert found.columns(1e9)["tflops_per_s"] == pytest.approx(found.flops_per_token / 1e3)
    assert "mfu" not in found.columns(1e9)  # of a CPU the peak is not known


def test_mfu_is_a_share_of_the_peak() -> None:
    assert Throughput(flops_per_token=2e6, peak=1e12).columns(1e5)["mfu"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("name", "dtype", "want"),
    [
        ("NVIDIA H200", torch.bfloat16, 989.4e12),
        ("NVIDIA H100 80GB HBM3", torch.float16, 989.4e12),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("A device of next year", torch.bfloat16, None),
    ],
)
def test_peaks_are_of_dense_products(
    name: str, dtype: torch.dtype, want: float | None, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), dtype) == want
    assert peak_flops(CPU, dtype) is None
    assert not recwarn.list
