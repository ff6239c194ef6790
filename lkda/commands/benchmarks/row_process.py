"""A benchmark whose rows are each measured in a process of its own, so that its memory and compiled code are its own.

The parent calls `measure_rows` and `run_child`. The child calls `answer`.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

import lkda
from lkda.bench.files import write_json
from lkda.checks import InputError

Row = dict[str, Any]


class Case(Protocol):
    """A row before it is measured. `name` is for messages and for the name of the log."""

    @property
    def name(self) -> str: ...


C = TypeVar("C", bound=Case)


def measure_rows(
    cases: Sequence[C],
    measure: Callable[[C], Row],
    found: dict[str, Any],
    path: Path,
    console: Console,
    *,
    said: Callable[[Row], str],
) -> None:
    """Measure the cases one after another and append their rows to found["rows"], each with its row_seconds.

    Args:
        found: the content of the results file, which is written to `path` after each row.
        said: what is printed of a measured row.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=case.name)
            begun = time.perf_counter()
            row = measure(case)
            found["rows"].append(row | {"row_seconds": round(time.perf_counter() - begun, 1)})
            write_json(path, found)
            what = row["reason"] if "reason" in row else said(row)
            console.print(f"{case.name}: {what} ({found['rows'][-1]['row_seconds']:.0f} s)", soft_wrap=True)
            progress.advance(task)


def run_child(
    module: str, request: Mapping[str, Any], limit: float, log: Path, *, caches: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What a process of its own measures; {"reason"} if it fails or does not end within `limit` seconds.

    Args:
        module: of lkda.commands; it calls `answer`.
        request: what it measures; the time at which the process was started is added.
        limit: seconds after which the process is stopped.
        log: where its output goes. It is kept if the process fails.
        caches: environment variables that name directories of compiled code.
    """
    source = str(Path(lkda.__file__).parents[1])  # the child must import this package, not an installed one
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH", "")]))
    with tempfile.TemporaryDirectory() as folder, open(log, "wb") as output:
        question, result = Path(folder, "request.json"), Path(folder, "result.json")
        question.write_text(json.dumps({**request, "started": time.time()}))
        child = subprocess.Popen(
            [sys.executable, "-m", module, str(question), str(result)],
            env={**os.environ, **(caches or {}), "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that the processes that compile for it end with it
        )
        try:
            status = child.wait(limit)
        except subprocess.TimeoutExpired:
            return {"reason": f"not measured within time_limit={limit:g} seconds; the log is {log}"}
        finally:
            _end(child)
        return _result_of(result, log, status)


def run_fork(module: str, request: Mapping[str, Any], limit: float, log: Path) -> dict[str, Any]:
    """As `run_child`, in a process that is forked from one that has already imported `module`, which saves seconds.

    That one is started at the first call. It imports and does nothing else, so its children share no device with it.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([module])
    with tempfile.TemporaryDirectory() as folder:
        question, result = Path(folder, "request.json"), Path(folder, "result.json")
        question.write_text(json.dumps(request))
        child = server.Process(target=_answer_forked, args=(module, str(log), [str(question), str(result)]))
        child.start()
        try:
            child.join(limit)
            if child.is_alive():
                return {"reason": f"not measured within time_limit={limit:g} seconds; the log is {log}"}
        finally:
            assert child.pid is not None
            with suppress(ProcessLookupError):  # all of its session has ended
                os.killpg(child.pid, signal.SIGKILL)
            child.join()
        return _result_of(result, log, child.exitcode)


def _answer_forked(module: str, log: str, arguments: Sequence[str]) -> None:
    os.setsid()  # so that the processes that compile for it end with it
    with open(log, "wb") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    end_with_parent()
    importlib.import_module(module).main(arguments)


def _result_of(result: Path, log: Path, status: int | None) -> dict[str, Any]:
    if result.exists():
        measured: dict[str, Any] = json.loads(result.read_text())
        if "reason" not in measured:
            log.unlink()
        return measured
    return {"reason": f"the process ended with {status} and without a result; the log is {log}"}


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the child's whole session: after a time limit or an interruption it is still running."""
    with suppress(ProcessLookupError):  # all of it has ended
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def answer(measure: Callable[[dict[str, Any]], Row], arguments: Sequence[str]) -> None:
    """The work of a child: measure what the request asks for and write the row, or the reason why there is none.

    Args:
        arguments: two files: the request, and the result, which is written when it is complete.
    """
    request, result = map(Path, arguments)
    try:
        write_json(result, measure(json.loads(request.read_text())))
    except Exception as error:  # of any package: the caller records the reason, the log has the traceback
        name = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        write_json(result, {"reason": f"{name}{' '.join(str(error).split())[:400]}"})
        raise


def end_with_parent() -> None:
    """End this process, and those that compile for it, when its parent has ended, even if it was killed."""
    threading.Thread(target=_end_with, args=[os.getppid()], daemon=True).start()


def _end_with(parent: int) -> None:
    started_by = multiprocessing.parent_process()
    if started_by is not None:  # a fork's own parent is the server, which lives as long as its children
        started_by.join()
    while os.getppid() == parent and started_by is None:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)
