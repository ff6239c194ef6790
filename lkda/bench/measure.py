"""Measures operators: a row for each implementation, with its time, bandwidth, error, memory and kernel resources."""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import lkda
from lkda.bench.op_benchmark import DTYPES, Implementation, Inputs, OpBenchmark, Shape
from lkda.bench.timing import copy_gb_per_s, graph_of, host_microseconds, launches, steady_clock
from lkda.checks import InputError
from lkda.device import device_name
from lkda.ops.runtime.jit import architecture

Row = dict[str, Any]
MODES = ("fwd", "fwd+bwd")
STATE = "final_state"  # a forward pass may return it after the results
PACKAGES = ("torch", "triton", "cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "fla-core", "nvidia-cudnn-frontend")
REFERENCE_HEADS = 2  # float64 is evaluated on these heads of the first sequence: heads and sequences are independent


@dataclass(frozen=True)
class Case:
    """One row to measure. `name` is a backend of lkda where `peer` is None, else an implementation of that library."""

    benchmark: OpBenchmark
    shape: Shape
    dtype: str
    gate: str | None
    name: str
    peer: str | None
    mode: str
    replay: str


def header(device: torch.device) -> dict[str, Any]:
    """The device, its copy speed, the versions of the packages, and the date."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "lkda": lkda.__version__,
        "copy_gb_per_s": copy_gb_per_s(device),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(PACKAGES),
    }


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """The installed version of each package; None where it is not installed."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def cases(
    benchmarks: Sequence[OpBenchmark],
    shapes: Sequence[Shape],
    dtypes: Sequence[str],
    backends: Sequence[str],
    peers: Sequence[str],
    modes: Sequence[str],
    replays: Sequence[str],
    gates: Sequence[str] | None = None,
) -> list[Case]:
    """Every combination of the arguments. Cases with the same inputs follow one another.

    Args:
        peers: names of libraries; `library@shape` measures one at that shape only.
        gates: which regimes of the decay are measured, for operators that have several; all of them where None.
    Raises: ValueError for a name that no benchmark knows.
    """
    known = {word for benchmark in benchmarks for word in benchmark.backends}
    families = {family for benchmark in benchmarks for family in benchmark.peers}
    regimes = {gate for benchmark in benchmarks for gate in benchmark.gates if gate}
    for what, words, allowed in (
        ("backends", backends, known),
        ("peers", [word.partition("@")[0] for word in peers], families),
        ("gates", gates or (), regimes),
        ("dtypes", dtypes, set(DTYPES)),
        ("modes", modes, set(MODES)),
        ("replays", replays, {"eager", "graph"}),
    ):
        for word in words:
            if word not in allowed:
                raise InputError(f"{what}: there is no {word}; there are {', '.join(sorted(allowed)) or 'none'}.")
    for word in peers:
        family, at, shape = word.partition("@")
        if at and shape not in map(str, shapes):
            raise InputError(
                f"peers: {word} is {family} at a shape that is not in shapes, {', '.join(map(str, shapes))}."
            )
    found = []
    for benchmark in benchmarks:
        implementations: list[tuple[str, str | None, str]] = [
            (w, None, "") for w in backends if w in benchmark.backends
        ]
        for word in peers:
            family, _, only = word.partition("@")
            if family in benchmark.peers:
                implementations += [(name, family, only) for name in _names(benchmark, family)]
        found += [
            Case(benchmark, shape, dtype, gate, name, peer, mode, replay)
            for shape in shapes
            for dtype in dtypes
            for gate in benchmark.gates
            if gates is None or gate is None or gate in gates
            for name, peer, only in implementations
            if only in ("", str(shape))
            for mode in modes
            for replay in replays
        ]
    return found


def _names(benchmark: OpBenchmark, family: str) -> list[str]:
    """The names of a library's implementations. Where it is not installed, its own name, so that it still has a row."""
    try:
        return list(benchmark.peers[family]())
    except ImportError:
        return [family]


def measure(
    cases: Sequence[Case], device: torch.device, copy_speed: float, *, milliseconds: float = 100
) -> Iterator[Row]:
    """Yields a row for each case, in order. Where nothing could be measured, `reason` says why."""
    inputs: Inputs = {}
    inputs_of: tuple[Any, ...] = ()
    for case in cases:
        wanted = (case.benchmark.op, case.shape, case.dtype, case.gate)
        if inputs_of != wanted:
            inputs.clear()  # frees them first: the next ones may need most of the memory
            torch.manual_seed(0)
            inputs.update(case.benchmark.inputs(case.shape, DTYPES[case.dtype], device, case.gate))
            inputs_of = wanted
        yield _row(case, inputs, device, copy_speed, milliseconds)


def _row(case: Case, inputs: Inputs, device: torch.device, copy_speed: float, milliseconds: float) -> Row:
    benchmark, shape = case.benchmark, case.shape
    moved = benchmark.moved_bytes(shape, DTYPES[case.dtype], case.mode)
    row: Row = {
        **{"op": benchmark.op, "backend": None if case.peer else case.name, "peer": case.name if case.peer else None},
        **{"B": shape.B, "T": shape.T, "H": shape.H, "D": shape.D, "dtype": case.dtype, "gate": case.gate},
        **{"mode": case.mode, "replay": case.replay, "ms_median": None, "ms_p20": None, "ms_p80": None, "noisy": None},
        **{"gb_per_s": None, "lower_bound_ms": moved / copy_speed / 1e6, "fraction_of_lower_bound": None},
        **{
            "error": None,
            "errors": {},
            "peak_mib": None,
            "launches": None,
            "host_us": None,
            "registers": None,
            "shared_bytes": None,
        },
        "reason": None,
    }
    try:
        implementation = benchmark.peers[case.peer]()[case.name] if case.peer else benchmark.backends[case.name]
    except ImportError as error:
        return row | {"reason": f"not installed ({error})"}
    if case.replay == "graph" and device.type != "cuda":
        return row | {"reason": "no CUDA graphs on a CPU"}
    if case.mode == "fwd+bwd" and not implementation.gradients:
        return row | {"reason": "no backward"}
    try:
        call, outputs, peak = prepare(implementation, inputs, case, device)
        row["peak_mib"] = peak
        timed = graph_of(call) if case.replay == "graph" else call
        timing = steady_clock(timed, device, milliseconds=milliseconds)
        if case.replay == "eager" and device.type == "cuda":
            row["host_us"], row["launches"] = host_microseconds(call), launches(call)
        if implementation.comparable and case.replay == "eager":
            row["errors"] = errors(case, implementation, inputs, outputs)
            row["error"] = max(row["errors"].values())
    except Exception as error:  # the row says what stopped this implementation, and the others are still measured
        text = str(error).strip().splitlines()
        return row | {"reason": f"{type(error).__name__}: {text[0][:200] if text else ''}"}
    row |= {"ms_median": timing.median, "ms_p20": timing.p20, "ms_p80": timing.p80, "noisy": timing.is_noisy}
    row |= {"gb_per_s": moved / timing.median / 1e6, "fraction_of_lower_bound": row["lower_bound_ms"] / timing.median}
    return row | resources(case, device)


def prepare(
    implementation: Implementation, inputs: Inputs, case: Case, device: torch.device, *, compiled: bool = False
) -> tuple[Callable[[], object], dict[str, Tensor], float | None]:
    """Returns the call to time, its results and gradients by name, and the peak MiB it needs beyond its inputs.

    Args:
        compiled: whether the kernels are compiled, so that the first call need not be repeated.
    """
    results = case.benchmark.results
    own = {name: x.detach() for name, x in implementation.adapt(inputs).items()}
    if case.mode == "fwd":

        @torch.inference_mode()
        def forward() -> Sequence[Tensor]:
            return implementation.run(own)

        outputs, peak = _with_peak(lambda: dict(zip((*results, STATE), forward())), device, compiled)
        return forward, {name: x for name, x in outputs.items() if x is not None}, peak
    leaves = {name: own[name].requires_grad_() for name in implementation.gradients}
    with torch.no_grad():
        wanted = {f"grad_{name}": torch.randn_like(x) for name, x in zip(results, implementation.run(own))}

    def both() -> Sequence[Tensor]:
        found = implementation.run(own)[: len(results)]
        gradients = torch.autograd.grad(found, list(leaves.values()), list(wanted.values()))
        return *(
            x.detach() for x in found
        ), *gradients  # an autograd graph that stays alive keeps the stream it was made on

    names = (*results, *(f"d{name}" for name in leaves))
    outputs, peak = _with_peak(lambda: dict(zip(names, both())), device, compiled)
    return both, outputs | wanted, peak


def _with_peak(
    call: Callable[[], dict[str, Tensor]], device: torch.device, compiled: bool
) -> tuple[dict[str, Tensor], float | None]:
    if not compiled:
        call()
    if device.type != "cuda":
        return call(), None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    outputs = call()
    return outputs, (torch.cuda.max_memory_allocated(device) - before) / 2**20


def errors(case: Case, implementation: Implementation, inputs: Inputs, outputs: dict[str, Tensor]) -> dict[str, float]:
    """Relative L2 errors of the results, and of the final state or of each gradient, against float64 on a few heads."""

    def few(x: Tensor, name: str = "") -> Tensor:
        heads = x[:1, :REFERENCE_HEADS] if name == STATE else x[:1, :, :REFERENCE_HEADS]
        return heads.detach().double()

    exact = {
        name: few(x).requires_grad_(case.mode != "fwd" and name in implementation.gradients)
        for name, x in inputs.items()
    }
    results = case.benchmark.results
    truth = {name: x for name, x in zip((*results, STATE), case.benchmark.truth(exact)) if name in outputs}
    if case.mode != "fwd":
        leaves = [exact[name] for name in implementation.gradients]
        wanted = [few(outputs[f"grad_{name}"]) for name in results]
        gradients = torch.autograd.grad([truth[name] for name in results], leaves, wanted)
        truth |= {
            f"d{n}": x
            for n, x in zip(implementation.gradients, gradients)
            if case.benchmark.has_reference(n, case.shape)
        }
    return {
        name: ((few(outputs[name], name) - x.detach()).norm() / x.detach().norm().clamp_min(1e-30)).item()
        for name, x in truth.items()
    }


def resources(case: Case, device: torch.device) -> Row:
    """The largest number of registers and of shared bytes among the lkda kernels that run."""
    if case.peer or device.type != "cuda":
        return {}
    arch = architecture(device)
    kernels = case.benchmark.kernels(case.name, case.mode, case.shape, DTYPES[case.dtype], arch)
    if not kernels:
        return {}
    found = [(kernel, kernel.module.binary(arch).resources()[kernel.entry]) for kernel in kernels]
    return {
        "registers": max(used.registers for _, used in found),
        "shared_bytes": max(kernel.shared_bytes + used.static_shared_bytes for kernel, used in found),
    }
