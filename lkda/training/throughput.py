"""What a training step makes of its device: model FLOP/s, their share of the device's peak (MFU), and peak memory."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops

from lkda.models.lm import LanguageModel

# TFLOP/s of dense matrix products in half precision, in TF32, and in float64 (0: not stated), from data sheets.
# Lightning knows other devices, but these not, or with sparse products, or without their tensor cores.
_PEAK = {
    "A10": (125, 62.5, 0),
    "A10G": (70, 35, 0),
    "A30": (165, 82, 10.3),
    "A40": (149.7, 74.8, 0),
    "RTX A6000": (154.8, 77.4, 0),
    "RTX 3090": (71, 35.6, 0),
    "RTX 4090": (165.2, 82.6, 0),
    "L40": (181, 90.5, 0),
    "L40S": (362, 183, 0),
    "H100 NVL": (835.5, 417.5, 60),
    "H200": (989.4, 494.7, 67),
    "GH200": (989.4, 494.7, 67),
    "B200": (2250, 1125, 37),
    "GB200": (2250, 1125, 37),
}
_COLUMN = {torch.bfloat16: 0, torch.float16: 0, torch.float32: 1, torch.float64: 2}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of matrix products with inputs of that type, at best; None for a CPU and for a device that is unknown.

    float32 stands for TF32, in which training multiplies what is left in float32.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = next((peak for chip, peak in _PEAK.items() if re.search(rf"\b{chip}\b", name)), None)
    if known is not None:
        return 1e12 * known[_COLUMN[dtype]] or None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the device is unknown: the result says so
        found = get_available_flops(device, dtype)
    return None if found is None else float(found)


@dataclass(frozen=True)
class Throughput:
    """What the training of a model makes of a device.

    Attributes:
        model: whose FLOPs are counted. A multiply-add counts two, a backward pass two forward passes. What is computed
            again to save memory does not count.
        context: tokens of a sequence.
        peak: FLOP/s of all devices, from `peak_flops`.
    """

    model: LanguageModel
    context: int
    peak: float | None
    _per_token: dict[int, float] = field(default_factory=dict)  # by tokens of a sequence

    @classmethod
    def of(
        cls, model: LanguageModel, *, context: int, device: torch.device, dtype: torch.dtype, devices: int = 1
    ) -> Throughput:
        """Of training `model` on sequences of `context` tokens on that many devices."""
        peak = peak_flops(device, dtype)
        return cls(model, context, None if peak is None else devices * peak)

    def flops_per_token(self, length: int) -> float:
        """FLOPs of forward and backward per token of a sequence of `length` tokens."""
        if length not in self._per_token:
            self._per_token[length] = 3 * self.model.flops_per_token(length)
        return self._per_token[length]

    def flops_of(self, batch: Mapping[str, Any]) -> float:
        """FLOPs of forward and backward of a batch.

        A batch that names its few targets ("target_positions") has logits for these alone, and sequences of a length of
        its own. The rows of any other are as long as the context, also if several documents are packed in them.
        """
        tokens, positions = batch["tokens"], batch.get("target_positions")
        if positions is None:
            return tokens.numel() * self.flops_per_token(self.context)
        without = tokens.numel() - len(positions)
        head = 6 * self.model.lm_head.weight.numel()
        return tokens.numel() * self.flops_per_token(tokens.shape[1]) - without * head

    def columns(self, tokens_per_s: float, flops_per_s: float) -> dict[str, float]:
        """The columns of metrics.csv that say how fast a training is: tokens_per_s and tflops_per_s of all devices, mfu
        where the peak is known, and on a GPU the memory that was reserved at most, in GiB, on this device."""
        row = {"tokens_per_s": tokens_per_s, "tflops_per_s": flops_per_s / 1e12}
        if self.peak is not None:
            row["mfu"] = flops_per_s / self.peak
        if torch.cuda.is_available():
            row["peak_memory_gib"] = torch.cuda.max_memory_reserved() / 2**30
        return row
