"""Runs flash-linear-attention's (FLA's) own tests of KDA with lkda's kernels, on a GPU.

    python -m lkda.bench.fla_tests --out out/fla_tests.json
    python -m lkda.bench.fla_tests --out out/fla_tests.json --source DIR

FLA must be installed, and lkda is registered with it as `lkda.integrations.fla.register` does. FLA's packages do not
contain its tests. They come from a checkout of FLA's repository, --source, or else git fetches the tag of the installed
version into a temporary folder.

At the end the command prints how many tests passed through lkda, and names each test with a call that lkda declined,
with the reason; FLA's own code ran there. It exits with 1 if a test failed, or if none passed through lkda. The file
has the device, the versions, the result of every test (`results`) and for each test function the number of tests with
each result (`rows`). It is written again after each test, and `finished` is false in it until the last one.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lkda.bench.files import write_json
from lkda.bench.measure import header, versions
from lkda.bench.watched_tests import FAILED, PASSED, Watch, Watched, counts, summary
from lkda.checks import InputError
from lkda.integrations import fla
from lkda.io import check_output_file

REPOSITORY = "https://github.com/fla-org/flash-linear-attention"
TESTS = Path("tests") / "ops" / "test_kda.py"
PACKAGES = ("flash-linear-attention", "pytest")
FETCH_SECONDS = 600
_VERSION = re.compile(r"^__version__\s*=\s*['\"]([^'\"]+)", re.MULTILINE)


def registered_backends() -> list[type]:
    """Registers lkda with FLA and returns the classes of its backends. Raises InputError if FLA is not installed."""
    fla.register()
    return list(importlib.import_module("lkda.integrations.fla_backends").BACKENDS.values())


def fetch(version: str, folder: Path) -> None:
    """Clones the tag of a version of FLA into `folder`. Raises InputError if git is missing or fails."""
    command = ["git", "clone", "--quiet", "--depth", "1", "--branch", f"v{version}", REPOSITORY, str(folder)]
    environment = os.environ | {"GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=FETCH_SECONDS
        )
        reason = done.stderr.strip().splitlines()[-1:] if done.returncode else None
    except FileNotFoundError:
        reason = ["git is not installed"]
    except subprocess.TimeoutExpired:
        reason = [f"not done after {FETCH_SECONDS} s"]
    if reason is not None:
        raise InputError(
            f"FLA's tests could not be fetched from {REPOSITORY}, tag v{version} ({' '.join(reason)}); give a checkout "
            "of it with --source."
        )


def check_source(folder: Path, installed: str, *, any_version: bool = False) -> str:
    """The version of FLA's source in `folder`.

    Raises: InputError if the tests or the version are not in the folder, or if it is not the installed version (unless
        `any_version`).
    """
    for path in (TESTS, Path("fla") / "__init__.py"):
        if not (folder / path).is_file():
            raise InputError(f"--source={folder} has no {path}; give a checkout of {REPOSITORY}.")
    found = _VERSION.search((folder / "fla" / "__init__.py").read_text(encoding="utf-8", errors="replace"))
    version = found[1] if found else "unknown"
    if version != installed and not any_version:
        raise InputError(
            f"--source={folder} is FLA {version}, and FLA {installed} is installed; give the source of version "
            f"{installed}, or run these tests nevertheless with --any-version."
        )
    return version


def run(
    source: Path, backends: Sequence[type], on_result: Callable[[list[Watched]], None], *, select: str | None = None
) -> tuple[list[Watched], int]:
    """Runs FLA's tests in this process. Returns their results and pytest's exit status.

    Args:
        source: a checkout of FLA's repository. `fla` is the installed one.
        backends: the classes that are registered with FLA.
        on_result: called with the results so far after each test.
        select: as pytest's -k.
    Raises: InputError if pytest is not installed.
    """
    try:
        pytest: Any = importlib.import_module("pytest")
    except ImportError as error:
        raise InputError(
            f"FLA's tests need pytest, which could not be imported ({error}): pip install pytest."
        ) from error
    watch = Watch(backends, lambda: on_result(watch.results))
    source = source.resolve()
    # FLA's settings would put its source before the installed package. Calls in other processes would not be counted.
    options = ["-c", os.devnull, "--rootdir", str(source.parent), "--confcutdir", str(source)]
    options += ["--import-mode=importlib", "-p", "no:cacheprovider", "-p", "no:xdist", "-q", "--tb=short"]
    options += ["-k", select] if select else []
    with watch.counting():
        status = int(pytest.main([*options, str(source / TESTS)], plugins=[watch]))
    return watch.results, status


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a JSON file to write")
    parser.add_argument("--source", type=Path, help="a checkout of FLA's repository; default: git fetches it")
    parser.add_argument("--any-version", action="store_true", help="--source may be of another version than FLA")
    parser.add_argument("-k", metavar="EXPRESSION", help="run only these tests, as with pytest -k")
    return parser.parse_args()


def _tested(options: argparse.Namespace, temporary: Path) -> int:
    """Runs the tests that the options choose, writes the file and prints the summary. Returns the exit status."""
    if not torch.cuda.is_available():
        raise InputError("FLA's tests need a GPU, and torch sees no CUDA device.")
    check_output_file(options.out, option="--out")
    backends = registered_backends()
    installed = importlib.import_module("fla").__version__
    source = options.source
    if source is None:
        source = temporary / "flash-linear-attention"
        fetch(installed, source)
    version = check_source(source, installed, any_version=options.any_version)
    machine = header(torch.device("cuda", torch.cuda.current_device()))
    machine["versions"] |= versions(PACKAGES)
    tests = {"file": TESTS.as_posix(), "version": version, "installed": installed, "select": options.k}
    tests["sha256"] = hashlib.sha256((source / TESTS).read_bytes()).hexdigest()
    settings = {name: value for name, value in os.environ.items() if name.startswith("FLA_")}

    def save(results: Sequence[Watched], finished: bool = False) -> None:
        note = f"FLA {installed}, tests of version {version}, {machine['device']}, torch {machine['torch']}, "
        note += f"{machine['date'][:10]}." + ("" if finished else " The command was stopped before the last test.")
        record: dict[str, Any] = {
            "kind": "table",
            "header": machine,
            "tests": tests,
            "environment": settings,
            "note": note,
        }
        record |= {"finished": finished, "rows": counts(results), "results": [asdict(result) for result in results]}
        write_json(options.out, record)

    results, status = run(source, backends, save, select=options.k)
    ended = status in (0, 1)  # all pass, some fail
    save(results, ended)
    print(f"FLA {installed}, tests of {version}, {machine['device']}:\n{summary(results)}")
    if not ended:
        print(f"pytest ended with the status {status}, so that not all tests ran.")
    found = [result.result for result in results]
    return 0 if ended and PASSED in found and FAILED not in found else 1


def main() -> int:
    options = _options()
    try:
        with tempfile.TemporaryDirectory(prefix="lkda") as temporary:
            return _tested(options, Path(temporary))
    except (InputError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
