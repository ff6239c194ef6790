"""CUDA kernels compiled at first use: .cu -> cubin with NVRTC (cuda-core), cached on disk, launched on torch's stream.

    module = Module(Path(__file__).with_name("forward.cu"), {"HEAD_DIM": 64, "ELEMENT": "bfloat16"})
    forward = module.kernel("simplified_forward", "PPPi", shared_bytes=32768)
    forward((blocks, 1, 1), 256, q, k, o, length, device=q.device)

A .cu file has `extern "C"` kernels; macros select its variant. Creating a Module or a Kernel compiles nothing. The
first launch on a device compiles, or `Module.binary(arch)`, which needs no device.
"""

import ctypes
import importlib.util
import io
import os
import re
import struct
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from lkda.ops.runtime import cubin_cache

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120")
# The most that one block can have, dynamic and static together (CUDA programming guide, compute capabilities).
SHARED_BYTES_PER_BLOCK = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90a": 227 * 1024,
    "sm_100a": 227 * 1024,
    "sm_120": 99 * 1024,
}
INCLUDE = Path(__file__).parents[1] / "include"
_OPTIONS = ("c++17", "-v")
_INCLUDED = re.compile(r'^[ \t]*#[ \t]*include[ \t]*[<"]([^>"]+)[>"]', re.MULTILINE)
_importing = threading.Lock()
_thread = threading.local()
_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


class KernelCompileError(RuntimeError):
    """NVRTC could not compile a source file. The message has the file, the architecture and the compiler's message."""


@dataclass(frozen=True)
class Resources:
    """What ptxas reports for one kernel."""

    registers: int
    static_shared_bytes: int
    stack_bytes: int
    spill_bytes: int  # stores and loads together


@dataclass(frozen=True)
class Binary:
    cubin: bytes
    log: str  # ptxas -v

    def resources(self) -> dict[str, Resources]:
        """Kernel name -> Resources."""
        found = {}
        pieces = _ENTRY.split(self.log)
        for entry, text in zip(pieces[1::2], pieces[2::2]):
            used, spill, shared = _USED.search(text), _SPILL.search(text), _SHARED.search(text)
            stack, stores, loads = (int(n) for n in spill.groups()) if spill else (0, 0, 0)
            found[entry] = Resources(
                int(used.group(1)) if used else 0, int(shared.group(1)) if shared else 0, stack, stores + loads
            )
        return found


@cache
def architecture(device: torch.device) -> str:
    """The NVRTC target of a CUDA device. sm_90 and sm_10x have the suffix a, for instructions of their own."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}" + ("a" if major in (9, 10) else "")


@cache
def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def reason_cannot_run(device: torch.device, otherwise: str = "torch") -> str | None:
    """Why no kernel can be compiled for this device and launched on it, or None if one can.

    Args:
        otherwise: the backend to name in the reason, which can run there.
    """
    if device.type != "cuda":
        where = f"the tensors are on {device.type}, not on a CUDA device"
        return f"{where}; use backend='auto' or backend={otherwise!r}, or move them."
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has compute capability below 8.0; use backend={otherwise!r}."
    return _reason_no_compiler()


@cache
def _reason_no_compiler() -> str | None:
    for package in ("cuda", "cuda.core", "cuda.bindings"):
        if importlib.util.find_spec(package) is None:
            return f"Python package {package} is missing; install lkda[cuda]."
    return None


@cache
def _toolkit_includes() -> tuple[Path, ...]:
    """The folders with the CUDA headers: those of the pip wheels, or else of an installed toolkit."""
    spec = importlib.util.find_spec("nvidia")
    wheels = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    folders = [root / part / "include" for root in wheels for part in ("cu13", "cuda_runtime")]
    if not any((folder / "cuda_fp16.h").exists() for folder in folders):
        folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"]
    return tuple(folder for folder in folders if folder.exists())


@cache
def _compiler_version() -> str:
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    return f"nvrtc {major}.{minor}"


@cache
def _source_closure(source: Path) -> tuple[bytes, ...]:
    """The text of a source and of every header that it includes, in the order of their first inclusion."""
    folders = (INCLUDE, *_toolkit_includes())
    texts, queue, seen = [], [source], {source}
    while queue:
        file = queue.pop(0)
        text = file.read_bytes()
        texts.append(text)
        for name in _INCLUDED.findall(text.decode()):
            found = next(
                (path for path in (folder / name for folder in (file.parent, *folders)) if path.exists()), None
            )
            if found is not None and found not in seen:
                seen.add(found)
                queue.append(found)
    return tuple(texts)


class Module:
    """One .cu file with one set of macros. It is compiled once per architecture and loaded once per device.

    Args:
        source: the .cu file.
        defines: macro -> value.

    Attributes:
        precompile_with: returns the modules that will be needed soon after this one. Where this one has to be compiled,
            they are compiled at the same time, each in a thread.
    """

    def __init__(self, source: Path, defines: Mapping[str, str | int | float]):
        self.source = source
        self.defines = tuple(f"{name}={value}" for name, value in defines.items())
        self.precompile_with: Callable[[], Iterable[Module]] = tuple
        self._lock = threading.RLock()
        self._binaries: dict[str, Binary] = {}
        self._handles: dict[int, object] = {}

    def __repr__(self) -> str:
        return f"{self.operator}/{self.source.name}[{' '.join(self.defines)}]"

    @property
    def operator(self) -> str:
        """The name of the operator's folder: the source's, or the one above if that is `cuda`."""
        folder = self.source.parent
        return (folder.parent if folder.name == "cuda" else folder).name

    def kernel(self, entry: str, signature: str, *, shared_bytes: int = 0, overlapping: bool = False) -> "Kernel":
        """A launchable kernel of this module.

        Args:
            entry: its `extern "C"` name.
            signature: one letter per parameter: P pointer, i int32, q int64, f float32. Parentheses enclose the members
                of a struct.
            shared_bytes: dynamic shared memory of every launch.
            overlapping: whether a launch in a CUDA graph may begin before the one before it has ended. The kernel must
                then wait for that one itself; see overlap.cuh.
        """
        return Kernel(self, entry, signature, shared_bytes, overlapping)

    def binary(self, arch: str) -> Binary:
        """The cubin for `arch` ("sm_90a") with the compiler's log, from memory, from disk, or compiled. Needs no GPU.

        Raises: KernelCompileError with the compiler's message and the file.
        """
        with self._lock:
            if arch not in self._binaries:
                self._binaries[arch] = self._read_or_compile(arch)
            return self._binaries[arch]

    def _read_or_compile(self, arch: str) -> Binary:
        words = (_compiler_version(), arch, *_OPTIONS, *self.defines)
        key = cubin_cache.key(words, _source_closure(self.source))
        name = f"{self.operator}-{self.source.stem}-{arch}-{key}.cubin"
        entry = cubin_cache.read(name)
        if entry is None:
            for module in self.precompile_with():
                threading.Thread(target=module._compile_early, args=(arch,)).start()
            binary = _compile(self.source, arch, self.defines)
            cubin_cache.write(name, binary.cubin, binary.log)
            return binary
        return Binary(*entry)

    def _compile_early(self, arch: str) -> None:
        with suppress(KernelCompileError):  # raised again when the kernel is needed
            self.binary(arch)

    def function(self, entry: str, device: int):
        """The driver's handle for a kernel on a device, whose context must be current."""
        from cuda.bindings import driver

        with self._lock:
            if device not in self._handles:
                binary = self.binary(architecture(torch.device("cuda", device)))
                self._handles[device] = _checked(driver.cuModuleLoadData(binary.cubin))
        return _checked(driver.cuModuleGetFunction(self._handles[device], entry.encode()))


def _compile(source: Path, arch: str, defines: tuple[str, ...]) -> Binary:
    with _importing:  # of two threads that import cuda.core at once, one can see it half imported
        from cuda.core import Program, ProgramOptions

    standard, verbose = _OPTIONS
    options = ProgramOptions(
        name=source.name,
        arch=arch,
        std=standard,
        ptxas_options=[verbose],
        no_cache=True,  # this project has a cache, and an entry of the compiler's own has no log
        define_macro=list(defines) or None,
        include_path=[str(folder) for folder in (source.parent, INCLUDE, *_toolkit_includes())],
    )
    log = io.StringIO()
    try:
        code = Program(source.read_text(), "c++", options).compile("cubin", logs=log)
    except Exception as error:  # cuda-core moved its exception class between versions
        raise KernelCompileError(f"{source} does not compile for {arch} with {' '.join(defines)}:\n{error}") from error
    return Binary(bytes(code.code), log.getvalue().strip("\0 \n"))


def _checked(result: tuple):
    """The value of a cuda.bindings call. Raises RuntimeError with the driver's name for an error."""
    from cuda.bindings import driver

    status, *values = result
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"CUDA driver error {status.name}")
    return values[0] if values else None


def _ensure_context(device: int) -> None:
    """Makes the device's primary context current if this thread has none.

    An autograd worker thread may launch a kernel before it has called the CUDA runtime, which binds a context: torch's
    allocator does not call it for memory from its cache.
    """
    if getattr(_thread, "has_context", False):
        return
    from cuda.bindings import driver

    if int(_checked(driver.cuCtxGetCurrent())) == 0:
        _checked(
            driver.cuCtxSetCurrent(_checked(driver.cuDevicePrimaryCtxRetain(_checked(driver.cuDeviceGet(device)))))
        )
    _thread.has_context = True


def fill_words(x: torch.Tensor, value: int) -> None:
    """Sets every 32-bit word of a contiguous CUDA tensor, on torch's current stream.

    It calls the driver's memset, which takes a third of the host time of `torch.full`.
    """
    from cuda.bindings import driver

    index = x.device.index
    if index != torch._C._cuda_getDevice():
        with torch.cuda.device(index):
            return fill_words(x, value)
    _ensure_context(index)
    stream = torch._C._cuda_getCurrentRawStream(index)
    words = x.numel() * x.element_size() // 4
    _checked(driver.cuMemsetD32Async(x.data_ptr(), value & 0xFFFFFFFF, words, stream))


@cache
def _can_overlap(index: int) -> bool:
    return torch.cuda.get_device_capability(index) >= (9, 0)


def _launch_overlapping(function, grid, block, shared_bytes, stream, arguments):
    """cuLaunchKernel with programmatic stream serialization: the launch may begin before the one before it ends."""
    from cuda.bindings import driver

    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
    config.sharedMemBytes, config.hStream = shared_bytes, stream
    config.attrs, config.numAttrs = [attribute], 1
    (status,) = driver.cuLaunchKernelEx(config, function, arguments, 0)
    return status


class _Arguments(threading.local):
    """The packed kernel arguments of one thread, and the array of their addresses that cuLaunchKernel reads."""

    def __init__(self, signature: str):
        # "0q" adds nothing but padding to a multiple of 8, where a struct begins and ends.
        layout = "@" + signature.replace("(", "0q").replace(")", "0q")
        self.pack_into = struct.Struct(layout).pack_into
        self.buffer = ctypes.create_string_buffer(max(1, struct.calcsize(layout)))
        start, offset, addresses = ctypes.addressof(self.buffer), 0, []
        for parameter in re.findall(r"\(\w+\)|\w", signature):
            members = parameter.strip("()")
            alignment = "0q" if "(" in parameter else f"0{members}"
            offset = struct.calcsize(f"@{offset}x{alignment}")
            addresses.append(start + offset)
            offset = struct.calcsize(f"@{offset}x{members}{alignment}")
        self.array = (ctypes.c_void_p * max(1, len(addresses)))(*addresses)
        self.address = ctypes.addressof(self.array)


class Kernel:
    """A kernel of a Module. Calling it launches it, asynchronously, on torch's current stream of `device`."""

    def __init__(self, module: Module, entry: str, signature: str, shared_bytes: int, overlapping: bool):
        self.module, self.entry, self.signature, self.shared_bytes = module, entry, signature, shared_bytes
        self.overlapping = overlapping
        self._functions: dict[int, object] = {}
        self._arguments = _Arguments(signature)

    def __repr__(self) -> str:
        return f"{self.entry} of {self.module}"

    def __call__(self, grid: tuple[int, int, int], block: int, *arguments, device: torch.device) -> None:
        """Launches the kernel.

        Args:
            grid: blocks along x, y, z. Nothing is launched if one of them is 0.
            block: threads along x.
            arguments: as in the signature; a tensor for a pointer, None for a null pointer.
            device: the CUDA device of the tensors, with its index.
        """
        if 0 in grid:
            return
        index = device.index
        if index != torch._C._cuda_getDevice():
            with torch.cuda.device(index):
                self._launch(grid, block, arguments, index)
        else:
            self._launch(grid, block, arguments, index)

    def resident_blocks(self, block: int, device: torch.device) -> int:
        """How many blocks of `block` threads a multiprocessor of the device holds at a time."""
        from cuda.bindings import driver

        _ensure_context(device.index)
        function = self._load(device.index)
        return _checked(driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(function, block, self.shared_bytes))

    def _launch(self, grid, block, arguments, index) -> None:
        local = self._arguments
        _ensure_context(index)
        function = self._functions.get(index)
        if function is None:
            function = self._functions[index] = self._load(index)
        values = [
            a if type(a) is int else 0 if a is None else a if type(a) is float else a.data_ptr() for a in arguments
        ]
        local.pack_into(local.buffer, 0, *values)
        stream = torch._C._cuda_getCurrentRawStream(index)
        if self.overlapping and torch._C._cuda_isCurrentStreamCapturing() and _can_overlap(index):
            status = _launch_overlapping(function, grid, block, self.shared_bytes, stream, local.address)
        else:
            (status,) = _cu_launch_kernel()(function, *grid, block, 1, 1, self.shared_bytes, stream, local.address, 0)
        if status:
            raise RuntimeError(f"CUDA driver error {status.name} launching {self} with grid {grid}, block {block}")

    def _load(self, index: int):
        from cuda.bindings import driver

        function = self.module.function(self.entry, index)
        if self.shared_bytes > 48 * 1024:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuFuncSetAttribute(function, attribute, self.shared_bytes))
        return function


@cache
def _cu_launch_kernel():
    from cuda.bindings import driver

    return driver.cuLaunchKernel
