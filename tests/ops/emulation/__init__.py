"""A kernel's .cu, compiled by the host's C++ compiler and run on the CPU, to check its arithmetic and indices."""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lkda.ops.runtime.jit import INCLUDE, Kernel

# Of tests that run an operator's kernels. `pytest -m gpu` opens only files that hold "mark.gpu", so they add it.
NEEDS_A_GPU = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: the kernels are emulated, not run"
)
# Of tests that emulate them.
EMULATED = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler"),
    pytest.mark.usefixtures("kernels_on_the_cpu"),
]
HERE = Path(__file__).parent
FLAGS = ["-std=c++17", "-O0", "-w", "-fPIC", "-fno-strict-aliasing"]
# The linker needs as long for the C++ library as g++ for a kernel. The process has it: `Emulated` makes it visible.
LINKED = ["-shared", "-nodefaultlibs"] if sys.platform == "linux" else ["-shared"]
_KINDS = {"P": ctypes.c_void_p, "i": ctypes.c_int, "q": ctypes.c_longlong, "f": ctypes.c_float, "d": ctypes.c_double}


class Emulated:
    """Launched like the kernel that it stands for: `emulated(blocks, threads, *arguments)`; tensors on the CPU."""

    def __init__(self, kernel: Kernel):
        # Dynamic shared memory is what launch.h defines; other shared variables are static ones, which all threads see.
        source = re.sub(r"extern __shared__ .*shared_memory\[\];", "", kernel.module.source.read_text())
        clusters = re.search(r"__cluster_dims__\((\d+)", source)
        cluster = int(clusters.group(1)) if clusters else 1
        parameters = re.search(rf"{kernel.entry}\((.*?)\) \{{", source, re.DOTALL).group(1)
        names = ", ".join(parameter.split()[-1] for parameter in parameters.split(","))
        text = (
            f'#include "mma.cuh"\n{source}\n#include "launch.h"\n'
            f'extern "C" void run(int blocks, int threads, {parameters}) {{\n'
            f"  launch(blocks, {cluster}, threads, [&] {{ {kernel.entry}({names}); }});\n}}\n"
        )
        if "-nodefaultlibs" in LINKED:
            ctypes.CDLL("libstdc++.so.6", mode=ctypes.RTLD_GLOBAL)
        library = ctypes.CDLL(str(_compiled(text, [f"-D{define}" for define in kernel.module.defines])))
        self._run, self._make_late = library.run, library.make_late
        self._kinds = [_KINDS[letter] for letter in kernel.signature]

    @contextmanager
    def late(self, first: int, last: int) -> Iterator[None]:
        """Of each cluster, the threads from `first` to before `last` run seldom, counted through its blocks."""
        self._make_late(first, last)
        yield
        self._make_late(0, 0)

    def __call__(self, blocks, threads, *arguments):
        values = (x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments)
        self._run(blocks, threads, *(kind(value) for kind, value in zip(self._kinds, values, strict=True)))


def _compiled(text: str, defines: list[str]) -> Path:
    """The library of this source. Compiling takes longer than most launches, so all tests of a session share it."""
    # The project's headers, those that hold device instructions replaced.
    headers = {
        path.name: path.read_text()
        for folder, kinds in ((INCLUDE, ["*.cuh"]), (HERE, ["*.cuh", "*.h"]))
        for kind in kinds
        for path in sorted(folder.glob(kind))
    }
    name = hashlib.sha256(repr((text, defines, FLAGS, headers)).encode()).hexdigest()
    (folder := Path(os.environ["LKDA_CACHE"]) / "emulated").mkdir(parents=True, exist_ok=True)
    library = folder / f"{name}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            for header, content in headers.items():
                (Path(work) / header).write_text(content)
            (Path(work) / "kernel.cpp").write_text(text)
            begin = ["-include", str(_precompiled(folder, headers["standard.h"]))]
            subprocess.run(
                ["g++", *FLAGS, *LINKED, *defines, *begin, "-o", "kernel.so", "kernel.cpp"], check=True, cwd=work
            )
            os.replace(Path(work) / "kernel.so", library)
    return library


def _precompiled(folder: Path, text: str) -> Path:
    """standard.h, which g++ finds compiled beside it: parsing it takes as long as the rest of a small kernel."""
    header = folder / "standard.h"
    if not (compiled := folder / "standard.h.gch").exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            (Path(work) / "standard.h").write_text(text)
            command = ["g++", *FLAGS, "-x", "c++-header", "-o", "standard.h.gch", "standard.h"]
            subprocess.run(command, check=True, cwd=work)
            os.replace(Path(work) / "standard.h", header)
            os.replace(Path(work) / "standard.h.gch", compiled)
    return header


emulated = cache(Emulated)


@pytest.fixture
def kernels_on_the_cpu(monkeypatch):
    """Every launch runs the kernel's source on the CPU, so that an op's function can be called with tensors there."""

    def launch(kernel, grid, block, *arguments, device):
        assert grid[1:] == (1, 1)
        emulated(kernel)(grid[0], block, *arguments)

    monkeypatch.setattr(Kernel, "__call__", launch)
    few = SimpleNamespace(multi_processor_count=3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: few)


@contextmanager
def ops_run_on_the_cpu(**launches: Callable) -> Iterator[None]:
    """The custom ops `lkda::NAME` themselves, also on the CPU, where these functions launch emulated kernels."""
    library = torch.library.Library("lkda", "FRAGMENT")
    for name, launch in launches.items():
        library.impl(name, launch, "CPU")
    yield
    library._destroy()
