"""Errors of the gradients of `kda_attention_fused` against float64, including those of A_log and dt_bias.

    python -m lkda.bench.layer_gradients --out docs/results/layer_gradients_h100/table.json

The same inputs, representable in bf16, are passed in bf16 and in float32. The reference is the chunk form in float64.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lkda.bench.files import write_json
from lkda.bench.measure import header
from lkda.bench.op_benchmark import Shape
from lkda.device import resolve_device
from lkda.ops import KDAGate, kda_attention_fused

SHAPES = ("8x2048x16x64", "1x8192x16x128")


def errors(shape: Shape, device: torch.device) -> list[dict[str, Any]]:
    """A row for each dtype of the inputs, with the relative L2 error of the gradient of each input."""
    B, T, H, D = shape.B, shape.T, shape.H, shape.D
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    tokens = {name: normal(B, T, H, D) for name in ("q", "k", "v", "gate_logits")} | {"beta_logits": normal(B, T, H)}
    A_log = torch.log(1 + 15 * torch.rand(H, generator=generator, device=device))
    parameters = {"A_log": A_log, "dt_bias": normal(H * D) - 4.6}  # decays as in a newly initialised layer
    grad_o = normal(B, T, H, D).bfloat16()

    def gradients(dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
        own = torch.promote_types(dtype, torch.float32)
        inputs: dict[str, Any] = {name: x.to(own).requires_grad_() for name, x in parameters.items()}
        inputs |= {name: x.bfloat16().to(dtype).requires_grad_() for name, x in tokens.items()}
        gate = KDAGate(inputs["A_log"], inputs["dt_bias"])
        o, _ = kda_attention_fused(**{name: inputs[name] for name in tokens}, gate=gate, backend=backend)
        return dict(zip(inputs, torch.autograd.grad(o, list(inputs.values()), grad_o.to(o.dtype))))

    truth, rows = gradients(torch.float64, "chunk"), []
    for dtype in (torch.bfloat16, torch.float32):
        found = gradients(dtype, "auto")
        wrong = {
            f"d{name}": f"{((x - truth[name]).norm() / truth[name].norm()).item():.1e}" for name, x in found.items()
        }
        rows.append({"B T H D": f"{B} {T} {H} {D}", "inputs": str(dtype).removeprefix("torch."), **wrong})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="B x T x H x D")
    options = parser.parse_args()
    device = resolve_device("auto")
    machine = header(device)
    rows = [row for text in options.shapes for row in errors(Shape.parse(text), device)]
    note = f"{machine['device']}, torch {machine['torch']}; relative error of gradients through kda_attention_fused."
    write_json(options.out, {"kind": "table", "header": machine, "rows": rows, "note": note})
    for row in rows:
        print(*(f"{name} {x}" for name, x in row.items()))


if __name__ == "__main__":
    main()
