"""The benchmarks, one module for each operator. A new module is found by its name."""

from __future__ import annotations

import importlib
import pkgutil

from lkda.bench.op_benchmark import OpBenchmark
from lkda.checks import InputError


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str) -> OpBenchmark:
    """The benchmark of an operator. Raises ValueError, listing those that exist, for a name without one."""
    if name not in names():
        raise InputError(f"ops={name}: there is no such benchmark; there are {', '.join(names())}.")
    return importlib.import_module(f"{__name__}.{name}").BENCHMARK
