"""Tokenize a text that is larger than the memory it may take, and measure that memory.

    python -m lkda.commands.studies.large_text --gigabytes 5 --out outputs/large_text

The text is the State of the Union addresses again and again, with a number in each sentence that is another every time.
It is tokenized by scripts/prepare_data.py in a process of its own, from JSON Lines and from a single text file. Needs
about three times as much disk space as there is text. Writes table.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

import lkda
from lkda.bench.files import write_json
from lkda.checks import InputError
from lkda.commands.command_line.errors import CommandError, readable_errors
from lkda.data.text.files import sotu_sources
from lkda.data.text.token_file import parts_of

KINDS = ("jsonl", "txt")
_NAMES = {"jsonl": "JSON Lines", "txt": "one text file"}
# What the process of its own runs. At its end it prints its largest memory in kB, without that of its parent, which
# getrusage would count too.
_MEASURED = """
import atexit, re, sys
from pathlib import Path
from lkda.commands.entry_point import run_script
atexit.register(lambda: print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]))
sys.argv[0] = "prepare_data.py"
run_script("prepare-data")
"""


def variations(size: float) -> Iterator[str]:
    """Texts of together `size` bytes, or up to one text more."""
    speeches = [path.read_text(encoding="utf-8") for path in sotu_sources().train]
    written = count = 0
    while True:
        for speech in speeches:
            text = ".".join(f"{sentence} {count * 7919 % 1_000_003}" for sentence in speech.split("."))
            count += 1
            written += len(text.encode())
            yield text
            if written >= size:
                return


def write_text(path: Path, size: float) -> int:
    """Write a text of about that many bytes, as JSON Lines or as one text by the path's suffix. Returns the number of
    its documents."""
    documents = 0
    with open(path, "w", encoding="utf-8") as file:
        for text in variations(size):
            file.write(json.dumps({"text": text}) + "\n" if path.suffix == ".jsonl" else text)
            documents += 1
    return documents if path.suffix == ".jsonl" else 1


def tokenize(path: Path, out: Path) -> dict[str, float]:
    """Tokenize a file into the directory `out`. Returns memory_gb, the largest memory of the process, and seconds.

    Raises: CommandError if it fails.
    """
    source = str(Path(lkda.__file__).parents[1])  # the child must import this package, not an installed one
    search = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-c", _MEASURED, f"paths=[{path}]", f"out={out}"]
    begun = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": search})
    if done.returncode:
        raise CommandError(f"{path} was not tokenized: {done.stderr.strip().splitlines()[-1:]}")
    return {"memory_gb": int(done.stdout.split()[-1]) * 1024 / 1e9, "seconds": time.perf_counter() - begun}


def measure(kind: str, size: float, folder: Path) -> dict[str, str]:
    """Write and tokenize a text of that kind. Returns a row of the table."""
    path, out = folder / f"large.{kind}", folder / "tokens"
    documents = write_text(path, size)
    found = tokenize(path, out)
    arrays = [np.load(out / f"{name}.npy", mmap_mode="r") for name in ("train", "validation", "test")]
    tokens = sum(len(part) for array in arrays for part in parts_of(array))
    row = {
        "text": _NAMES[kind],
        "GB": f"{path.stat().st_size / 1e9:.2f}",
        "documents": f"{documents:,}",
        "tokens": f"{tokens:,}",
        "largest memory in GB": f"{found['memory_gb']:.2f}",
        "minutes": f"{found['seconds'] / 60:.1f}",
    }
    shutil.rmtree(out)
    path.unlink()
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=5.0, help="size of each text in GB")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="what is tokenized; default: all")
    parser.add_argument(
        "--folder", type=Path, help="folder for the text and its tokens; default: the temporary folder of the system"
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the results")
    given = parser.parse_args(arguments)
    with readable_errors():
        if not 0 < given.gigabytes < float("inf"):
            raise InputError(f"--gigabytes must be a finite number above 0, got {given.gigabytes:g}.")
        if given.folder is not None:
            given.folder.mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, Any]] = []
        for kind in given.kinds:
            with tempfile.TemporaryDirectory(dir=given.folder) as folder:
                rows.append(measure(kind, given.gigabytes * 1e9, Path(folder)))
            print(*rows[-1].values(), sep=", ")
            write_json(given.out / "table.json", {"kind": "table", "rows": rows, "note": _note()})


def _note() -> str:
    threads = int(os.environ.get("RAYON_NUM_THREADS") or os.cpu_count() or 1)
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    processor = f"{threads} thread{'s' * (threads != 1)} of a CPU"
    return f"{processor}, tokenizers {tokenizers.__version__}, a vocabulary of 16,384; {date}."


if __name__ == "__main__":
    main()
