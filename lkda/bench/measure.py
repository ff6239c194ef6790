"""A contest -> rows: time, bandwidth, share of the floor, error, memory and resources of each entrant."""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import lkda
from lkda.bench.contest import DTYPES, Contest, Entrant, Inputs, Shape
from lkda.bench.timing import clock, copy_gb_per_s, graph_of, host_microseconds, launches
from lkda.checks import InputError
from lkda.ops.runtime.jit import architecture

Row = dict[str, Any]
MODES = ("fwd", "fwd+bwd")
STATE = "final_state"  # what an entrant may give after its results in a forward pass
PACKAGES = ("torch", "triton", "cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "fla-core", "nvidia-cudnn-frontend")
TRUE_HEADS = 2  # float64 on so many heads of the first sequence: heads and sequences do not mix


@dataclass(frozen=True)
class Case:
    """One row to measure; `peer` names its family where `name` is not a backend of ours."""

    contest: Contest
    shape: Shape
    dtype: str
    gate: str | None
    name: str
    peer: str | None
    mode: str
    replay: str


def header(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured with."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "lkda": lkda.__version__,
        "copy_gb_per_s": copy_gb_per_s(device),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions,
    }


def cases(
    contests: Sequence[Contest],
    shapes: Sequence[Shape],
    dtypes: Sequence[str],
    backends: Sequence[str],
    peers: Sequence[str],
    modes: Sequence[str],
    replays: Sequence[str],
    gates: Sequence[str] | None = None,
) -> list[Case]:
    """Every combination, those on the same inputs together.

    Args:
        peers: families; `family@shape` measures one at that shape alone.
        gates: of the contests that have several regimes, which; all where None.
    Raises: ValueError for a word that no contest knows.
    """
    known = {word for contest in contests for word in contest.backends}
    families = {family for contest in contests for family in contest.peers}
    regimes = {gate for contest in contests for gate in contest.gates if gate}
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
    for contest in contests:
        entrants: list[tuple[str, str | None, str]] = [(w, None, "") for w in backends if w in contest.backends]
        for word in peers:
            family, _, only = word.partition("@")
            if family in contest.peers:
                entrants += [(name, family, only) for name in _names(contest, family)]
        found += [
            Case(contest, shape, dtype, gate, name, peer, mode, replay)
            for shape in shapes
            for dtype in dtypes
            for gate in contest.gates
            if gates is None or gate is None or gate in gates
            for name, peer, only in entrants
            if only in ("", str(shape))
            for mode in modes
            for replay in replays
        ]
    return found


def _names(contest: Contest, family: str) -> list[str]:
    """A family's entrants; of a missing one its own name, so that it keeps a row."""
    try:
        return list(contest.peers[family]())
    except ImportError:
        return [family]


def measure(
    cases: Sequence[Case], device: torch.device, copy_speed: float, *, milliseconds: int = 100
) -> Iterator[Row]:
    """A row for each case, in order; `reason` says why where there is no time."""
    inputs: Inputs = {}
    drawn: tuple[Any, ...] = ()
    for case in cases:
        wanted = (case.contest.op, case.shape, case.dtype, case.gate)
        if drawn != wanted:
            inputs.clear()  # before the next ones are drawn: they may be as large as the memory
            torch.manual_seed(0)
            inputs.update(case.contest.inputs(case.shape, DTYPES[case.dtype], device, case.gate))
            drawn = wanted
        yield _row(case, inputs, device, copy_speed, milliseconds)


def _row(case: Case, inputs: Inputs, device: torch.device, copy_speed: float, milliseconds: int) -> Row:
    contest, shape = case.contest, case.shape
    moved = contest.moved_bytes(shape, DTYPES[case.dtype], case.mode)
    row: Row = {
        **{"op": contest.op, "backend": None if case.peer else case.name, "peer": case.name if case.peer else None},
        **{"B": shape.B, "T": shape.T, "H": shape.H, "D": shape.D, "dtype": case.dtype, "gate": case.gate},
        **{"mode": case.mode, "replay": case.replay, "ms_median": None, "ms_p20": None, "ms_p80": None},
        **{"gb_per_s": None, "floor_ms": moved / copy_speed / 1e6, "fraction_of_floor": None},
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
        entrant = contest.peers[case.peer]()[case.name] if case.peer else contest.backends[case.name]
    except ImportError as error:
        return row | {"reason": f"not installed ({error})"}
    if case.replay == "graph" and device.type != "cuda":
        return row | {"reason": "no CUDA graphs on a CPU"}
    if case.mode == "fwd+bwd" and not entrant.gradients:
        return row | {"reason": "no backward"}
    try:
        call, outputs, peak = _prepare(entrant, inputs, case, device)
        row["peak_mib"] = peak
        timing = clock(graph_of(call) if case.replay == "graph" else call, device, milliseconds=milliseconds)
        if case.replay == "eager" and device.type == "cuda":
            row["host_us"], row["launches"] = host_microseconds(call), launches(call)
        if entrant.comparable and case.replay == "eager":
            row["errors"] = _errors(case, entrant, inputs, outputs)
            row["error"] = max(row["errors"].values())
    except Exception as error:  # whatever stops one entrant is told in its row, and the others are measured
        text = str(error).strip().splitlines()
        return row | {"reason": f"{type(error).__name__}: {text[0][:200] if text else ''}"}
    row |= {"ms_median": timing.median, "ms_p20": timing.p20, "ms_p80": timing.p80}
    row |= {"gb_per_s": moved / timing.median / 1e6, "fraction_of_floor": row["floor_ms"] / timing.median}
    return row | _resources(case, device)


def _prepare(
    entrant: Entrant, inputs: Inputs, case: Case, device: torch.device
) -> tuple[Callable[[], object], dict[str, Tensor], float | None]:
    """The call to time, what it gave once (results and gradients, by name), and the MiB it took beyond its inputs."""
    results = case.contest.results
    own = {name: x.detach() for name, x in entrant.adapt(inputs).items()}
    if case.mode == "fwd":

        @torch.inference_mode()
        def forward() -> Sequence[Tensor]:
            return entrant.run(own)

        outputs, peak = _with_peak(lambda: dict(zip((*results, STATE), forward())), device)
        return forward, {name: x for name, x in outputs.items() if x is not None}, peak
    leaves = {name: own[name].requires_grad_() for name in entrant.gradients}
    with torch.no_grad():
        wanted = {f"grad_{name}": torch.randn_like(x) for name, x in zip(results, entrant.run(own))}

    def both() -> Sequence[Tensor]:
        found = entrant.run(own)[: len(results)]
        gradients = torch.autograd.grad(found, list(leaves.values()), list(wanted.values()))
        return *(x.detach() for x in found), *gradients  # a graph kept alive holds on to the stream it was made on

    names = (*results, *(f"d{name}" for name in leaves))
    outputs, peak = _with_peak(lambda: dict(zip(names, both())), device)
    return both, outputs | wanted, peak


def _with_peak(call: Callable[[], dict[str, Tensor]], device: torch.device) -> tuple[dict[str, Tensor], float | None]:
    call()  # compiles
    if device.type != "cuda":
        return call(), None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    outputs = call()
    return outputs, (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _errors(case: Case, entrant: Entrant, inputs: Inputs, outputs: dict[str, Tensor]) -> dict[str, float]:
    """Relative L2 error of the results, and of the state or of each gradient, against float64, on a few heads."""

    def few(x: Tensor, name: str = "") -> Tensor:
        heads = x[:1, :TRUE_HEADS] if name == STATE else x[:1, :, :TRUE_HEADS]
        return heads.detach().double()

    exact = {
        name: few(x).requires_grad_(case.mode != "fwd" and name in entrant.gradients) for name, x in inputs.items()
    }
    results = case.contest.results
    truth = {name: x for name, x in zip((*results, STATE), case.contest.truth(exact)) if name in outputs}
    if case.mode != "fwd":
        leaves = [exact[name] for name in entrant.gradients]
        wanted = [few(outputs[f"grad_{name}"]) for name in results]
        gradients = torch.autograd.grad([truth[name] for name in results], leaves, wanted)
        truth |= {f"d{n}": x for n, x in zip(entrant.gradients, gradients) if case.contest.told(n, case.shape)}
    return {
        name: ((few(outputs[name], name) - x.detach()).norm() / x.detach().norm().clamp_min(1e-30)).item()
        for name, x in truth.items()
    }


def _resources(case: Case, device: torch.device) -> Row:
    """The most registers and shared memory that a kernel of ours takes."""
    if case.peer or device.type != "cuda":
        return {}
    arch = architecture(device)
    kernels = case.contest.kernels(case.name, case.mode, case.shape, DTYPES[case.dtype], arch)
    if not kernels:
        return {}
    found = [(kernel, kernel.module.binary(arch).resources()[kernel.entry]) for kernel in kernels]
    return {
        "registers": max(used.registers for _, used in found),
        "shared_bytes": max(kernel.shared_bytes + used.static_shared_bytes for kernel, used in found),
    }
