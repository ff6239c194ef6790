"""What a training step makes of its device: model FLOP/s, their share of the device's peak (MFU), and peak memory."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from lightning.fabric.utilities.throughput import get_available_flops

from lkda.models.lm import LanguageModel

# Of dense matrix products, from data sheets. Lightning knows other devices, but these not, or with sparse products.
_PEAK = {
    "H200": {torch.bfloat16: 989.4e12, torch.float16: 989.4e12, torch.float32: 494.7e12, torch.float64: 67e12},
    "B200": {torch.bfloat16: 2250e12, torch.float16: 2250e12, torch.float32: 1125e12, torch.float64: 37e12},
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of matrix products with inputs of that type, at best; None for a CPU and for a device that is unknown.

    float32 stands for TF32, in which training multiplies what is left in float32.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = next((peak for chip, peak in _PEAK.items() if chip in name), None)
    if known is not None:
        return known.get(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the device is unknown: the result says so
        found = get_available_flops(device, dtype)
    return None if found is None else float(found)


@dataclass(frozen=True)
class Throughput:
    """Turns tokens per second into what they are of a device.

    Attributes:
        flops_per_token: of forward and backward, a multiply-add counting two.
        peak: FLOP/s of all devices, from `peak_flops`.
    """

    flops_per_token: float
    peak: float | None

    @classmethod
    def of(
        cls, model: LanguageModel, *, context: int, device: torch.device, dtype: torch.dtype, devices: int = 1
    ) -> Throughput:
        """Of training `model` on sequences of `context` tokens on that many devices. A backward counts as two forwards;
        what is computed again to save memory does not count."""
        peak = peak_flops(device, dtype)
        return cls(3 * model.flops_per_token(context), None if peak is None else devices * peak)

    def columns(self, tokens_per_s: float) -> dict[str, float]:
        """The columns of metrics.csv that say it: tflops_per_s of all devices, mfu where the peak is known, and on a
        GPU the memory that was reserved at most, in GiB, on this device."""
        row = {"tflops_per_s": tokens_per_s * self.flops_per_token / 1e12}
        if self.peak is not None:
            row["mfu"] = tokens_per_s * self.flops_per_token / self.peak
        if torch.cuda.is_available():
            row["peak_memory_gib"] = torch.cuda.max_memory_reserved() / 2**30
        return row
