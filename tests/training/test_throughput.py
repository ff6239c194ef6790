"""What a run says of its device."""

from __future__ import annotations

import pytest
import torch

from lkda.models.build import build_model
from lkda.models.lm import LanguageModel
from lkda.training.throughput import Throughput, peak_flops

CPU = torch.device("cpu")


def small_model(mixer: str = "softmax") -> LanguageModel:
    return build_model(
        {"vocab_size": 100, "d_model": 16, "num_layers": 1, "mixer": {"pattern": [mixer], "num_heads": 2}}
    )


def test_a_backward_counts_two_forwards() -> None:
    model = small_model()
    found = Throughput.of(model, context=8, device=CPU, dtype=torch.float32)
    assert found.flops_per_token(8) == 3 * model.flops_per_token(8) > 6 * 16 * 100
    columns = found.columns(1e9, 1e9 * found.flops_per_token(8))
    assert columns["tokens_per_s"] == 1e9
    assert columns["tflops_per_s"] == pytest.approx(found.flops_per_token(8) / 1e3)
    assert "mfu" not in columns  # of a CPU the peak is not known


def test_mfu_is_a_share_of_the_peak() -> None:
    assert Throughput(small_model(), context=8, peak=1e12).columns(1e5, 2e11)["mfu"] == pytest.approx(0.2)


def test_a_batch_with_few_targets_has_few_logits_and_a_length_of_its_own() -> None:
    found = Throughput(small_model(), context=64, peak=None)
    text = {"tokens": torch.zeros(2, 64, dtype=torch.int64)}
    assert found.flops_of(text) == 128 * found.flops_per_token(64)
    packed = {"tokens": torch.zeros(1, 128, dtype=torch.int64), "cu_seqlens": torch.tensor([0, 70, 128])}
    assert found.flops_of(packed) == found.flops_of(text)
    few = {"tokens": torch.zeros(2, 16, dtype=torch.int64), "target_positions": torch.arange(5)}
    assert found.flops_of(few) == 32 * found.flops_per_token(16) - 27 * 6 * 16 * 100


@pytest.mark.parametrize(
    ("name", "dtype", "want"),
    [
        ("NVIDIA H200", torch.bfloat16, 989.4e12),
        ("NVIDIA H100 80GB HBM3", torch.float16, 989.4e12),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA GH200 480GB", torch.float32, 494.7e12),
        ("NVIDIA H100 NVL", torch.bfloat16, 835.5e12),
        ("NVIDIA A10G", torch.bfloat16, 70e12),
        ("NVIDIA A10", torch.float64, None),
        ("NVIDIA L40S", torch.bfloat16, 362e12),
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
