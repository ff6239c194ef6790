"""Compiles every kernel for every architecture, without a GPU, and shows the resources that each uses.

`python -m lkda.bench.resources` exits with 1 where a kernel spills registers or needs more shared memory than a block
can have.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import io
import multiprocessing
import pkgutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

from rich.console import Console
from rich.progress import track

import lkda.ops
from lkda.io import write_atomically
from lkda.ops.runtime.jit import ARCHITECTURES, SHARED_BYTES_PER_BLOCK


@dataclass(frozen=True)
class Usage:
    """The resources of one kernel on one architecture. `shared_bytes` counts dynamic and static shared memory."""

    op: str
    kernel: str
    variant: str
    arch: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int

    def complaint(self) -> str | None:
        limit = SHARED_BYTES_PER_BLOCK[self.arch]
        name = f"{self.op}/{self.kernel} [{self.variant}] on {self.arch}"
        if self.spill_bytes:
            return f"{name} spills {self.spill_bytes} bytes of registers"
        if self.shared_bytes > limit:
            return f"{name} needs {self.shared_bytes} bytes of shared memory, and a block can have {limit}"
        return None


def kernel_modules() -> list[ModuleType]:
    """The modules with a function `kernels(arch)`: in lkda.ops each `cuda.py` and those in a folder `cuda`, and the
    ablations."""
    found = pkgutil.walk_packages(lkda.ops.__path__, "lkda.ops.")
    names = [*(module.name for module in found if "cuda" in module.name.split(".")), "lkda.bench.notes.ablations"]
    return [module for module in map(importlib.import_module, names) if hasattr(module, "kernels")]


def usage(task: tuple[str, str, int]) -> Usage:
    """Compile kernel number n of a module's list for an architecture."""
    module, arch, n = task
    kernel = importlib.import_module(module).kernels(arch)[n]
    used = kernel.module.binary(arch).resources()[kernel.entry]
    shared = used.static_shared_bytes + kernel.shared_bytes
    variant = " ".join(word for word in kernel.module.defines if not word.startswith("SHARED_BYTES="))
    op = module.split(".")[2]
    return Usage(op, kernel.entry, variant, arch, used.registers, shared, used.stack_bytes, used.spill_bytes)


def collect(operators: Sequence[str] | None, architectures: Sequence[str], processes: int) -> list[Usage]:
    modules = [m for m in kernel_modules() if operators is None or m.__name__.split(".")[2] in operators]
    if not modules:
        raise SystemExit(f"no operator among {', '.join(operators or [])} has kernels")
    tasks = [(m.__name__, arch, n) for m in modules for arch in architectures for n in range(len(m.kernels(arch)))]
    print(f"compiling {len(tasks)} kernels, {processes} at a time", file=sys.stderr)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        found = pool.imap(usage, tasks, chunksize=4)
        console = Console(stderr=True)
        return list(track(found, "kernels", len(tasks), console=console, disable=not console.is_terminal))


def summary(table: Sequence[Usage]) -> str:
    """A line for each kernel: the range of registers over its variants and the largest shared KiB, by architecture."""
    architectures = list(dict.fromkeys(row.arch for row in table))
    lines = [f"{'registers / shared KiB':36s}" + "".join(f"{arch:>18s}" for arch in architectures)]
    for op, kernel in dict.fromkeys((row.op, row.kernel) for row in table):
        cells = []
        for arch in architectures:
            rows = [row for row in table if (row.op, row.kernel, row.arch) == (op, kernel, arch)]
            registers, shared = ([getattr(row, name) for row in rows] for name in ("registers", "shared_bytes"))
            cells.append(
                f"{min(registers)}-{max(registers)} / {max(shared) / 1024:.0f}" if rows else "",
            )
        lines.append(f"{op + '/' + kernel:36s}" + "".join(f"{cell:>18s}" for cell in cells))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/kernel_resources.csv"), help="the table, as CSV")
    parser.add_argument("--op", nargs="+", help="operators whose kernels are compiled; default: all")
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES, help="default: all")
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count(), help="kernels at a time")
    options = parser.parse_args()
    start = time.perf_counter()
    table = collect(options.op, options.arch, options.processes)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(asdict(table[0])))
    writer.writeheader()
    writer.writerows(asdict(row) for row in table)
    write_atomically(options.out, text.getvalue())
    print(summary(table))
    complaints = [complaint for row in table if (complaint := row.complaint())]
    print("\n".join(complaints), end="\n" if complaints else "")
    seconds = time.perf_counter() - start
    print(f"{len(table)} kernels, {len(complaints)} with a problem, {seconds:.0f} s; all of them in {options.out}")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
