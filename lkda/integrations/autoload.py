"""Registers lkda with FLA where the environment variable LKDA_FLA asks for it, without a line of code.

    LKDA_FLA=1 python train.py           all parts of `lkda.integrations.fla.register`
    LKDA_FLA=kda,conv python train.py    some of them

PyTorch calls `autoload` at the end of `import torch`, through the entry point group "torch.backends" (unless
TORCH_DEVICE_BACKEND_AUTOLOAD=0). It imports neither FLA nor torch: each part is registered when FLA's module that has
the functions of that part has been imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from lkda.integrations.fla import PARTS, check_parts, register

VARIABLE = "LKDA_FLA"
# The module of FLA whose import completes the functions of a part.
_COMPLETE = {
    "fla.ops.kda": "kda",
    "fla.modules.causal_conv1d.ops": "conv",
    "fla.modules.norm.fused_norm_gate": "norm",
    "fla.modules.activations.ops": "swiglu",
}


def autoload() -> None:
    """Prepare the registration that LKDA_FLA asks for. Nothing is done where it is unset, empty or 0, or again."""
    prepared = any(isinstance(finder, _AfterImport) for finder in sys.meta_path)
    if not prepared and os.environ.get(VARIABLE, "0") not in ("", "0"):
        sys.meta_path.insert(0, _AfterImport())


def requested_parts() -> tuple[str, ...]:
    """The parts that LKDA_FLA names: 1 or all for all of them. Raises InputError for an unknown one."""
    words = os.environ.get(VARIABLE, "")
    if words in ("1", "all"):
        return PARTS
    parts = tuple(word.strip() for word in words.split(","))
    check_parts(parts, VARIABLE)
    return parts


class _AfterImport(MetaPathFinder):
    """Finds FLA's modules as Python would, with a loader that registers lkda after the module has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        part = _COMPLETE.get(fullname)
        if part is None or part not in requested_parts():
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((found for found in others if found is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader, part)
        return spec


class _Registering(Loader):
    def __init__(self, loader: Loader, part: str) -> None:
        self.loader, self.part = loader, part

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        register((self.part,))
