"""A kernel's .cu, compiled by the host's C++ compiler and run on the CPU, to check its arithmetic and indices."""

import ctypes
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lkda.ops.jit import INCLUDE, Kernel

HERE = Path(__file__).parent
_KINDS = {"P": ctypes.c_void_p, "i": ctypes.c_int, "q": ctypes.c_longlong, "f": ctypes.c_float}


class Emulated:
    """Launched like the kernel that it stands for: `emulated(blocks, threads, *arguments)`; tensors on the CPU."""

    def __init__(self, kernel: Kernel, folder):
        source = kernel.module.source.read_text()
        parameters = re.search(rf"{kernel.entry}\((.*?)\) \{{", source, re.DOTALL).group(1)
        names = ", ".join(parameter.split()[-1] for parameter in parameters.split(","))
        text = (
            f'#include "mma.cuh"\n{source}\n#include "launch.h"\n'
            f'extern "C" void run(int blocks, int threads, {parameters}) {{\n'
            f"  launch(blocks, threads, [&] {{ {kernel.entry}({names}); }});\n}}\n"
        )
        headers = folder / "include"  # the project's, those that hold device instructions replaced
        headers.mkdir(exist_ok=True)
        for header in (*INCLUDE.glob("*.cuh"), *HERE.glob("*.cuh"), *HERE.glob("*.h")):
            (headers / header.name).write_text(header.read_text())
        path = folder / f"{kernel.entry}.cpp"
        path.write_text(text)
        defines = [f"-D{define}" for define in kernel.module.defines]
        flags = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-fno-strict-aliasing", f"-I{headers}"]
        subprocess.run(["g++", *flags, *defines, "-o", path.with_suffix(".so"), path], check=True)
        self._run = ctypes.CDLL(str(path.with_suffix(".so"))).run
        self._kinds = [_KINDS[letter] for letter in kernel.signature]

    def __call__(self, blocks, threads, *arguments):
        values = (x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments)
        self._run(blocks, threads, *(kind(value) for kind, value in zip(self._kinds, values, strict=True)))


@pytest.fixture
def kernels_on_the_cpu(monkeypatch, tmp_path):
    """Every launch runs the kernel's source on the CPU, so that an op's function can be called with tensors there."""
    made = {}

    def launch(kernel, grid, block, *arguments, device):
        assert grid[1:] == (1, 1)
        if kernel not in made:
            (folder := tmp_path / f"kernel{len(made)}").mkdir()
            made[kernel] = Emulated(kernel, folder)
        made[kernel](grid[0], block, *arguments)

    monkeypatch.setattr(Kernel, "__call__", launch)
    few = SimpleNamespace(multi_processor_count=3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: few)
