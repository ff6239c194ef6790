"""C++ for the CPU, compiled at first use by the machine's own compiler, cached on disk and called through ctypes.

    library = Library(Path(__file__).with_name("recurrence.cpp"))
    library.call("kda_forward_float32", q, o, length, scale)

A .cpp file includes nothing of PyTorch, which keeps its compilation under a second. Its functions are `extern "C"`.
OpenMP is the one that PyTorch has loaded, so that both share their threads.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lkda.io import replace_file
from lkda.ops.runtime import cubin_cache

# The suffix of a function for tensors of that type.
NAMES = {torch.float32: "float32", torch.float64: "float64"}

INCLUDE = Path(__file__).parents[1] / "include"
_COMPILERS = ("c++", "g++", "clang++")
# No -ffast-math: a gate may be -inf.
_OPTIONS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC")


Argument = Tensor | int | float | list[Tensor] | torch.Size | None
Add = Callable[[Callable[..., Any], tuple[object, ...], tuple[object, ...]], None]
_added_to: ContextVar[Add | None] = ContextVar("added_to", default=None)


@contextmanager
def calls_added_to(add: Add) -> Iterator[None]:
    """Every call made inside is also passed to `add`: the function, its converted arguments, and those given."""
    token = _added_to.set(add)
    try:
        yield
    finally:
        _added_to.reset(token)


class CompileError(RuntimeError):
    """The compiler could not compile a source file. The message has the file and the compiler's message."""


@cache
def compiler() -> str | None:
    """The C++ compiler: that of the environment variable CXX, or the first one of c++, g++ and clang++. None if there
    is none."""
    given = os.environ.get("CXX")
    return shutil.which(given) if given else next(filter(None, map(shutil.which, _COMPILERS)), None)


def _run(*command: str) -> str:
    """The standard output of a command. Raises CompileError with its messages."""
    try:
        # A compiler's message need not be in the encoding of the locale.
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    except OSError as error:
        raise CompileError(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        raise CompileError(f"{' '.join(command)}\n{done.stderr.strip()}")
    return done.stdout


@cache
def _target() -> str:
    """What the compiler defines for this processor: its own version, and the instructions that it may use."""
    executable = compiler()
    assert executable is not None
    return _run(executable, *_OPTIONS, "-dM", "-E", "-x", "c++", os.devnull)


def _openmp() -> tuple[str, ...]:
    """The linker's word for PyTorch's OpenMP library. A second library would have threads of its own, which would wait
    for work on the processors of the first."""
    own = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return (str(own[0]),) if own else ("-fopenmp",)


class Library:
    """A .cpp file as a shared library. It is compiled and loaded when it is first needed."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self._loaded: ctypes.CDLL | None = None
        self._reason: str | None = None

    def reason_cannot_run(self) -> str | None:
        """Why it cannot be compiled and loaded here, or None if it can. Compiles it at the first call."""
        if self._loaded is None and self._reason is None:
            try:
                self._loaded = self._load()
            except (CompileError, OSError) as error:
                self._reason = str(error)
        return self._reason

    def call(self, function: str, *arguments: Argument) -> int:
        """Calls one of its functions.

        Args:
            arguments: a tensor for a pointer, None for a null pointer, an int for an int64_t, a float for a double,
                tensors for an array of pointers, a torch.Size for an array of int64_t.
        Returns: its int64_t, which means nothing if the function is void.
        """
        reason = self.reason_cannot_run()
        if self._loaded is None:
            raise RuntimeError(reason)
        entry = getattr(self._loaded, function)
        entry.restype = ctypes.c_int64
        converted = tuple(map(_as_c, arguments))
        add = _added_to.get()
        if add is not None:
            add(entry, converted, arguments)
        return int(entry(*converted))

    def can_take(self, x: Tensor, *contiguous: Tensor) -> bool:
        """Whether it can compute these without gradients: all float32, or all float64, on a CPU. The rows of x may lie
        apart; the others are contiguous."""
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return False
        if x.dtype not in NAMES or x.device.type != "cpu" or x.stride(-1) != 1:
            return False
        alike = all(y.dtype == x.dtype and y.device == x.device and y.is_contiguous() for y in contiguous)
        return alike and self.reason_cannot_run() is None

    def _load(self) -> ctypes.CDLL:
        executable = compiler()
        if executable is None:
            raise CompileError(f"there is no C++ compiler ({', '.join(_COMPILERS)}, or the variable CXX)")
        texts = [self.source.read_bytes(), *(path.read_bytes() for path in sorted(INCLUDE.glob("*.h")))]
        key = cubin_cache.key((_target(), torch.__version__, *_OPTIONS), texts)
        name = f"{self.source.stem}-{platform.machine()}-{key}.so"
        folder = cubin_cache.directory()
        if (folder / name).exists():
            try:
                return ctypes.CDLL(str(folder / name))
            except OSError:  # damaged
                warnings.warn(f"{folder / name} cannot be loaded and is compiled again", RuntimeWarning, stacklevel=2)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".") as scratch:
                self._compile(executable, Path(scratch) / name)
                replace_file(Path(scratch) / name, folder / name)
            return ctypes.CDLL(str(folder / name))
        except OSError as error:
            cubin_cache.warn(error)
        with tempfile.TemporaryDirectory() as scratch:
            self._compile(executable, Path(scratch) / name)
            return ctypes.CDLL(str(Path(scratch) / name))

    def _compile(self, executable: str, result: Path) -> None:
        compiled = result.with_suffix(".o")
        _run(executable, *_OPTIONS, f"-I{INCLUDE}", "-c", str(self.source), "-o", str(compiled))
        _run(executable, "-shared", str(compiled), *_openmp(), "-o", str(result))


def cpu_only(
    library: Library, *, otherwise: str, dtypes: Collection[torch.dtype] | None = None
) -> Callable[[torch.device, int, torch.dtype], str | None]:
    """The `cannot_run` of a backend that calls `library`.

    Args:
        otherwise: the backend to name in the reason.
        dtypes: those that the backend can take; None for any.
    """

    def reason(device: torch.device, head_dim: int, dtype: torch.dtype) -> str | None:
        if dtypes is not None and dtype not in dtypes:
            names = " and ".join(str(one).removeprefix("torch.") for one in dtypes)
            return f"it computes in {names}, got {dtype}; use backend={otherwise!r}."
        if device.type != "cpu":
            where = f"the tensors are on {device.type}, not on a CPU"
            return f"{where}; use backend='auto' or backend={otherwise!r}, or move them."
        why = library.reason_cannot_run()
        return None if why is None else f"its C++ cannot be compiled: {why}; use backend={otherwise!r}."

    # As `cannot_take` in kernel_inputs.py does.
    reason._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return reason


def contiguous_rows(x: Tensor) -> Tensor:
    """x [B, ...] with contiguous rows, between which there may be gaps. Copied only where a row is not contiguous."""
    return x if x[0].is_contiguous() else x.contiguous()


def _as_c(value: Argument) -> object:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, torch.Size):
        return (ctypes.c_int64 * len(value))(*value)
    if isinstance(value, list):
        return (ctypes.c_void_p * len(value))(*(x.data_ptr() for x in value))
    return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int64(value)
