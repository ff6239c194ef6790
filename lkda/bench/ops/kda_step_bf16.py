"""KDA's decoding step with its state in bfloat16."""

from __future__ import annotations

import torch

from lkda.bench.ops.kda_step import benchmark

BENCHMARK = benchmark("kda_step_bf16", torch.bfloat16)
