"""Times KDA in the tree that `lkda` is imported from. `lkda.bench.two_trees` starts it; nobody else needs to.

It writes a line of JSON about the environment, and one for each shape and gate. The inputs and the clock are those of
the files beside this one. They are loaded by their paths, because the measured tree may be older and lack them.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

import lkda
from lkda.ops import kda_attention


def beside(name: str) -> ModuleType:
    """The module `name` of this folder, whose package need not be `lkda` here. It may import torch, but not lkda."""
    spec = importlib.util.spec_from_file_location(f"beside_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


timing, kda_inputs = beside("timing"), beside("kda_inputs")


def row(text: str, gate: str, device: torch.device, backend: str, milliseconds: float) -> dict[str, Any]:
    """Times in ms [median, 20th and 80th percentile], and the bytes kept between forward and backward beyond inputs and
    outputs. On a CPU there are no replayed graphs and no such bytes."""
    torch.manual_seed(0)
    shape = SimpleNamespace(**dict(zip("BTHD", map(int, text.split("x")), strict=True)))
    drawn = kda_inputs.inputs(shape, torch.bfloat16, device, gate)
    found: dict[str, Any] = {"shape": text, "gate": gate, "mean_g": float(drawn["g"].mean()), "kept_bytes": None}
    leaves = [drawn[name].requires_grad_() for name in kda_inputs.NAMES]
    grad_o = torch.randn_like(drawn["v"])

    def forward() -> object:
        with torch.no_grad():
            return kda_attention(*leaves, backend=backend)

    def both() -> object:
        return torch.autograd.grad(kda_attention(*leaves, backend=backend)[0], leaves, grad_o)

    both()
    if device.type == "cuda":
        before = timing.requested_bytes(device)
        outputs = kda_attention(*leaves, backend=backend)
        found["kept_bytes"] = timing.requested_bytes(device) - before - sum(x.nbytes for x in outputs if x is not None)
        del outputs
    calls: list[tuple[str, Callable[[], object]]] = [("fwd", forward), ("fwd+bwd", both)]
    for mode, call in calls:
        for replay in ("eager", "replayed") if device.type == "cuda" else ("eager",):
            timed = call if replay == "eager" else timing.graph_of(call)
            times = timing.steady_clock(timed, device, milliseconds=milliseconds)
            found[f"{mode} {replay}"] = [round(x, 5) for x in (times.median, times.p20, times.p80)]
    return found


def main(backend: str, milliseconds: str, *shapes: str) -> None:
    device = torch.device("cuda" if backend == "cuda" else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(json.dumps({"lkda": lkda.__file__, "device": name, "torch": torch.__version__}), flush=True)
    for text in shapes:
        for gate in kda_inputs.GATES:
            print(json.dumps(row(text, gate, device, backend, float(milliseconds))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
