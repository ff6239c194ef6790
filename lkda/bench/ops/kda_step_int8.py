"""KDA's decoding step with its state in int8."""

from __future__ import annotations

import torch

from lkda.bench.ops.kda_step import benchmark

BENCHMARK = benchmark("kda_step_int8", torch.int8)
