"""Runs NVIDIA's compute-sanitizer over every CUDA kernel of KDA and of its layer, at small shapes.

    python -m lkda.bench.sanitize --out docs/results/kda_sanitized_NAME/table.json

memcheck finds accesses outside of the memory of a tensor, racecheck finds threads of a block that use the same shared
memory without a barrier between them. The cases are those of `lkda.bench.sanitized_cases`. All of them run in one
process for each tool, because torch starts slowly under the sanitizer; if it finds something, each case runs again in a
process of its own, which tells whose error it is. The cases first run without a tool, which compiles the kernels. Then
each tool must find the fault of `planted_fault.cu`, so that "0 errors" is the result of a check. The command exits with
1 if a tool reports an error or a case does not end.

For memcheck, torch's caching allocator is off and memory that nobody may use follows each tensor. Otherwise an access
beyond the end of a tensor would hit another one, or a free part of the same block. compute-sanitizer must be of 2023.3
or later.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lkda.bench.files import write_json
from lkda.bench.measure import header
from lkda.bench.sanitized_cases import PLANTED_FAULT, cases
from lkda.io import write_atomically

TOOLS = ("memcheck", "racecheck")
NO_TOOL = "none"
INSTALL = "install it with `pip install nvidia-cuda-sanitizer-api`, or with the CUDA toolkit (package cuda-sanitizer)"
# Parts of the names of the kernels that are checked. torch's own kernels would take most of the time.
KERNELS = ("kda_", "short_conv_", "gated_norm_", "column_sums")
PADDING = 512  # bytes
FOUND = 86  # the exit code of a process in which the tool found something and which ended well otherwise
_SUMMARY = re.compile(r"^=+ (?:RACECHECK|ERROR) SUMMARY: (\d+) (?:hazard|error)s?\b", re.MULTILINE)


@dataclass(frozen=True)
class Checked:
    """What a tool found in a case. `errors` is None if the case did not end; `reason` then says why."""

    case: str
    tool: str
    errors: int | None
    seconds: float | None
    reason: str = ""

    @property
    def clean(self) -> bool:
        return self.errors == 0


def find_sanitizer() -> Path:
    """compute-sanitizer of PATH, of a CUDA toolkit, or of the Python package nvidia-cuda-sanitizer-api.

    Raises: SystemExit with what to install if there is none.
    """
    spec = importlib.util.find_spec("nvidia")
    wheels = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    on_path = shutil.which("compute-sanitizer")
    toolkits = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    places = [Path(on_path)] if on_path else []
    places += [Path(home) / "bin" / "compute-sanitizer" for home in toolkits if home]
    places += [wheel / "cu13" / "bin" / "compute-sanitizer" for wheel in wheels]
    for place in places:
        if os.access(place, os.X_OK):
            return place
    raise SystemExit(
        "error: there is no compute-sanitizer on PATH, in CUDA_HOME/bin, in /usr/local/cuda/bin or among the Python "
        f"packages: {INSTALL}."
    )


def command(sanitizer: Path, tool: str, names: Sequence[str]) -> list[str]:
    """The command line of a process that runs the named cases under `tool`; NO_TOOL: without one."""
    program = [sys.executable, "-m", "lkda.bench.sanitized_cases", *names]
    if tool == NO_TOOL:
        return program
    # cuda-bindings makes calls of the driver at its start that fail, which are not errors of the kernels.
    options = ["--tool", tool, "--report-api-errors", "no", "--error-exitcode", str(FOUND)]
    if tool == "memcheck":
        options += ["--padding", str(PADDING)]
    for part in KERNELS:
        options += ["--kernel-name", f"kernel_substring={part}"]
    return [str(sanitizer), *options, *program]


def errors_in(output: str) -> int | None:
    """The errors, or hazards, of the tool's summaries in what a process wrote; None if there is no summary."""
    counts = [int(count) for count in _SUMMARY.findall(output)]
    return sum(counts) if counts else None


def records_in(output: str) -> dict[str, dict]:
    """The records of the cases that are done, by name."""
    lines = (line for line in output.splitlines() if line.startswith('{"case": '))
    return {record["case"]: record for line in lines if "seconds" in (record := json.loads(line))}


def run(arguments: Sequence[str], tool: str, on_line: Callable[[str], None]) -> tuple[int, str]:
    """Runs a process. Returns its exit code and all that it wrote; `on_line` gets each line at once."""
    environment = dict(os.environ)
    if tool == "memcheck":
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    process = subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    assert process.stdout is not None
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            on_line(line)
    finally:
        if process.poll() is None:
            process.stdout.close()
            process.terminate()
    return process.wait(), "".join(lines)


def judged(tool: str, names: Sequence[str], code: int, output: str) -> list[Checked]:
    """A result for each case of one process.

    Where the tool found something in a process of several cases, every case gets the sum, for it may be of any.
    """
    done = records_in(output)
    errors = 0 if tool == NO_TOOL else errors_in(output)
    reason = ""
    if errors is None:
        reason = f"exit code {code} without a summary of {tool}: {_last_words(output)}"
    elif errors == 0 and code != 0:
        errors, reason = None, f"exit code {code}: {_last_words(output)}"
    found = []
    for name in names:
        if name in done:
            found.append(Checked(name, tool, errors, done[name]["seconds"], reason))
        else:
            found.append(Checked(name, tool, errors or None, None, reason or f"it did not end: {_last_words(output)}"))
    return found


def _last_words(output: str) -> str:
    """The last line that is the program's own, or else the last of all."""
    lines = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith('{"case": ')]
    own = [line for line in lines if not line.startswith("=========")]
    return (own or lines or ["it wrote nothing"])[-1][:200]


def check(sanitizer: Path, tool: str, names: Sequence[str]) -> tuple[list[Checked], str]:
    """Runs the cases under a tool. Returns a result for each, and what the processes wrote.

    Where all together are not clean, each runs again alone.
    """
    begun = time.perf_counter()

    def progress(line: str) -> None:
        if line.startswith('{"case": '):
            record = json.loads(line)
            if "seconds" in record:
                print(f"{tool:9s} {record['case']}: {record['seconds']:.1f} s", flush=True)
        elif line.startswith("========= ") and not line.startswith("=========  "):
            print(f"{tool:9s} {line.rstrip()}", flush=True)

    code, output = run(command(sanitizer, tool, names), tool, progress)
    found = judged(tool, names, code, output)
    print(f"{tool}: {time.perf_counter() - begun:.0f} s for {len(names)} cases in one process", flush=True)
    if len(names) == 1 or all(result.clean for result in found):
        return found, output
    print(f"{tool}: not all cases are clean; each runs again alone", flush=True)
    alone, outputs = [], [output]
    for name in names:
        code, output = run(command(sanitizer, tool, [name]), tool, progress)
        alone += judged(tool, [name], code, output)
        outputs.append(output)
    return alone, "".join(outputs)


def find_planted_fault(sanitizer: Path, tool: str) -> int:
    """How many errors a tool finds in the kernel with a planted fault.

    Raises: SystemExit if it finds none.
    """
    code, output = run(command(sanitizer, tool, [PLANTED_FAULT]), tool, lambda line: None)
    errors = errors_in(output)
    if not errors:
        raise SystemExit(f"error: {tool} does not find the planted fault (exit code {code}). It wrote:\n{output}")
    print(f"{tool}: it finds the planted fault ({errors} errors)", flush=True)
    return errors


def table(found: Sequence[Checked]) -> str:
    lines = [f"{'case':36s}{'tool':>10s}{'errors':>13s}{'seconds':>9s}"]
    for result in found:
        errors = "did not end" if result.errors is None else str(result.errors)
        seconds = "" if result.seconds is None else f"{result.seconds:.1f}"
        lines.append(f"{result.case:36s}{result.tool:>10s}{errors:>13s}{seconds:>9s}  {result.reason}".rstrip())
    return "\n".join(lines)


def chosen(only: Sequence[str] | None) -> list[str]:
    """The names of the cases that contain one of the words; all of them where there is no word."""
    names = [name for name in cases() if only is None or any(word in name for word in only)]
    if not names:
        raise SystemExit(f"error: no case has {' or '.join(only or [])} in its name; there are {', '.join(cases())}.")
    return names


def sanitizer_version(sanitizer: Path) -> str:
    text = subprocess.run([str(sanitizer), "--version"], capture_output=True, text=True).stdout
    version = re.search(r"Version (\S+)", text)
    return version[1] if version else "unknown"


def write(out: Path | None, found: Sequence[Checked], texts: str, kernels: dict[str, list[str]], version: str) -> None:
    """Writes the results with the device and the versions, the kernels of each case, and beside it what was printed."""
    if out is None:
        return
    machine = header(torch.device("cuda", 0)) | {"compute-sanitizer": version}
    note = f"{machine['device']}, torch {machine['torch']}, compute-sanitizer {version}."
    rows = [asdict(result) for result in found]
    write_json(out, {"kind": "table", "header": machine, "rows": rows, "note": note, "kernels": kernels})
    write_atomically(out.with_suffix(".txt"), texts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", nargs="+", default=TOOLS, choices=TOOLS, help="default: both")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases that have one of these in their name")
    parser.add_argument("--out", type=Path, help="a JSON file to write; beside it, the text of the tools")
    options = parser.parse_args()
    names = chosen(options.only)
    if not torch.cuda.is_available():
        raise SystemExit("error: torch sees no CUDA device, and compute-sanitizer checks kernels while they run.")
    sanitizer = find_sanitizer()
    version = sanitizer_version(sanitizer)
    print(f"{sanitizer}, version {version}; {len(names)} cases", flush=True)
    found, texts = check(sanitizer, NO_TOOL, names)
    kernels = {name: record["kernels"] for name, record in records_in(texts).items()}
    if all(result.clean for result in found):  # else the tools would find what stops the cases without them
        found = []
        for tool in options.tool:
            find_planted_fault(sanitizer, tool)
            results, text = check(sanitizer, tool, names)
            found, texts = found + results, texts + text
            write(options.out, found, texts, kernels, version)
    write(options.out, found, texts, kernels, version)
    print(table(found))
    bad = sum(not result.clean for result in found)
    launched = len({kernel for kernels_of_case in kernels.values() for kernel in kernels_of_case})
    print(f"{len(names)} cases, {launched} kernels, {bad} results with an error")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
