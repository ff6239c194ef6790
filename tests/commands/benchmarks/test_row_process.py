"""Rows of a benchmark are processes of their own, which end with it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lkda

CODE = """
import sys
from pathlib import Path
from lkda.commands.benchmarks.row_process import run_child, run_fork
if __name__ == "__main__":
    run = {"run_child": run_child, "run_fork": run_fork}[sys.argv[1]]
    run("long_row", {}, 60.0, Path("log.txt"))
"""
ROW = """
import os, time
from pathlib import Path
from lkda.commands.benchmarks.row_process import end_with_parent
def main(arguments):
    Path("pid.txt.part").write_text(str(os.getpid()))
    os.rename("pid.txt.part", "pid.txt")
    time.sleep(60)
if __name__ == "__main__":
    end_with_parent()
    main([])
"""


@pytest.mark.slow
@pytest.mark.parametrize("run", ["run_child", "run_fork"])
def test_a_row_ends_with_a_benchmark_that_is_killed(run, tmp_path):
    """It would take the device from the next benchmark, and make its first rows slow."""
    (tmp_path / "parent.py").write_text(CODE)
    (tmp_path / "long_row.py").write_text(ROW)
    source = os.pathsep.join([str(Path(lkda.__file__).parents[1]), str(tmp_path)])
    parent = subprocess.Popen([sys.executable, "parent.py", run], cwd=tmp_path, env=os.environ | {"PYTHONPATH": source})
    pid = _within(60, lambda: int((tmp_path / "pid.txt").read_text()) if (tmp_path / "pid.txt").exists() else None)
    assert Path(f"/proc/{pid}").exists()
    parent.kill()
    parent.wait()
    assert _within(10, lambda: not _runs(pid))


def _runs(pid: int) -> bool:
    """Whether the process exists and has not ended; one that has may wait for its parent to ask."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def _within(seconds, found):
    deadline = time.monotonic() + seconds
    while not (value := found()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return value
