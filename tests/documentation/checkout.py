"""A scratch copy of the checkout, in which the commands of one page run in order."""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lkda.ops.runtime import cubin_cache
from tests.documentation.commands import ROOT, Snippet, console_commands
from tests.documentation.sources import snippets

HERE = Path(__file__).parent
SECONDS = 300  # that a command may take
SERVER, LOG = "LKDA_DOCUMENTATION_SERVER", "LKDA_DOCUMENTATION_LOG"  # environment variables with paths
SHARED_CACHES = ("corpora", "sources")  # the parts of the cache that are found by what they were made of
# What a word in capitals stands for in a documented command.
PLACEHOLDERS = {
    "COMMAND": "train",
    "RUN": "runs/run",
    "RUNS": "runs",
    "PATH": "runs/path",
    "DIR": "exported_dir",
    "GLOB": "'runs/*'",
    "NAME": "name",
    "OPERATORS": "operators",
    "STEPS": "steps",
    "DECODING": "decoding",
    "OUT": "out",
    "NOVELS": "novels.jsonl.xz",
    "NOTES": "notes",
    "EVERYTHING": "everything",
}
SENTENCE = "the president reads a letter of every citizen who signs some law and carries the map to an old senate"
# Said once all else is checked: there is no GPU, or no lm-eval, which `make test-long` installs and CI does not.
NEEDS_MORE = re.compile(r"^error: .*(torch sees no CUDA device|needs lm-eval: pip install)", re.MULTILINE)


@dataclass
class Result:
    """What became of a snippet.

    Attributes:
        outcome: ran, composed (it needs a GPU), or failed.
        records: of the Python command lines that it called, as the server wrote them down.
    """

    snippet: Snippet
    outcome: str
    seconds: float
    output: str
    records: list[dict[str, Any]] = field(default_factory=list)

    def __str__(self) -> str:
        text = " ".join(self.snippet.text.replace("\\\n", " ").split())
        told = f"{self.outcome:8} {self.seconds:5.1f} s  {self.snippet.source}:{self.snippet.line}  {text}"
        notes = dict.fromkeys(note for record in self.records for note in record["notes"])
        return told + "".join(f"\n{'':19}{note}" for note in notes)


@dataclass(frozen=True)
class Session:
    """The server, and the folder that holds what pages share: the stock and the cache of tokenized text."""

    folder: Path
    environment: dict[str, str]


@contextmanager
def session() -> Iterator[Session]:
    """A server that has imported everything, and a stock for what commands read.

    The workers of pytest-xdist share one. A documented command that runs these tests uses the one that it runs in.
    """
    address, caches = os.environ.get(SERVER), os.environ.get("LKDA_TEST_CACHES")
    if address is not None:
        yield _session(Path(address).parent)
    elif caches is not None:
        with _shared(Path(caches) / "documentation") as made:
            yield made
    else:
        with tempfile.TemporaryDirectory(prefix="lkda") as folder, _served(Path(folder)) as made:
            yield made


@contextmanager
def _shared(folder: Path) -> Iterator[Session]:
    """Served by the first process that comes, until the last one has ended."""
    folder.mkdir(parents=True, exist_ok=True)
    served = folder / "served"
    with (folder / "begin").open("a") as begin, (folder / "use").open("a") as use, ExitStack() as stack:
        fcntl.flock(begin, fcntl.LOCK_EX)
        fcntl.flock(use, fcntl.LOCK_SH)
        if served.exists():
            made = _session(folder / "session")
        else:
            shutil.rmtree(folder / "session", ignore_errors=True)
            made = stack.enter_context(_served(folder / "session"))
            served.touch()
            stack.callback(served.unlink)
            stack.callback(fcntl.flock, use, fcntl.LOCK_EX)  # waits for the others
        fcntl.flock(begin, fcntl.LOCK_UN)
        yield made


def _session(folder: Path) -> Session:
    # A make that runs these tests would hand its variables, VENV among them, to a documented `make`.
    leaking = ("PYTEST", "COV", "MAKE", "MFLAGS", "VENV", "ARGS")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(leaking)}
    environment |= {
        "PATH": f"{folder}/bin:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        SERVER: str(folder / "socket"),
        "LKDA_DOCUMENTATION_BIN": str(folder / "bin"),
        "MYPY_CACHE_DIR": str(ROOT / ".mypy_cache"),
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "160",
    }
    return Session(folder, environment)


@contextmanager
def _served(folder: Path) -> Iterator[Session]:
    made, stock, cache = _session(folder), folder / "stock", folder / "cache"
    for path in (stock, folder / "bin", folder / "pages", *(cache / name for name in SHARED_CACHES)):
        path.mkdir(parents=True)
    kernels = cubin_cache.directory()
    kernels.mkdir(parents=True, exist_ok=True)
    (cache / "kernels").symlink_to(kernels)  # those that are compiled need not be again
    _write_programs(folder / "bin")
    served = [sys.executable, str(HERE / "server.py"), made.environment[SERVER], str(stock)]
    server = subprocess.Popen(served, env=made.environment, stdin=subprocess.DEVNULL)
    try:
        _wait_for(folder / "socket", server)
        _fill(stock, made)
        yield made
    finally:
        server.terminate()
        server.wait()


def _write_programs(folder: Path) -> None:
    """python and what is installed beside it: all of them hand over to the server, but ruff and mypy."""
    ask = f'exec "{sys.executable}" -IS "{HERE / "client.py"}"'
    programs = {"python": "", "python3": "", "pip": "-m pip", "pip3": "-m pip", "pytest": "-m pytest"}
    written = {name: f'{ask} {module} "$@"' for name, module in programs.items()}
    for name, function in console_commands().items():
        written[name] = f'{ask} --console {function} {name} "$@"'
    written |= {name: f'exec "{sys.executable}" -m {name} "$@"' for name in ("ruff", "mypy")}
    # A clone of a public repository is a copy of the stand-in in the stock.
    written["git"] = f'[ "$1" = clone ] && exec cp -r "{folder.parent}/stock/$(basename "$2")" .; exit 1'
    for name, line in written.items():
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)


def _wait_for(address: Path, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + SECONDS
    while not address.exists():
        if server.poll() is not None or time.monotonic() > end:
            raise RuntimeError("the server of the documentation's commands did not start")
        time.sleep(0.05)


def _fill(stock: Path, made: Session) -> None:
    """A text, documents for the hub's stand-in, a file of novels, a run, its export and an evaluation of it."""
    draw = random.Random(0)
    sentences = [" ".join(draw.choices(SENTENCE.split(), k=6)) + "." for _ in range(600)]
    (stock / "text").write_text(" ".join(sentences), encoding="utf-8")
    rows = (json.dumps({"text": " ".join(sentences[n : n + 20])}) for n in range(0, 600, 5))
    (stock / "hub.jsonl").write_text("\n".join([*rows] * 10) + "\n", encoding="utf-8")
    pairs = (json.dumps({"prompt": text[:40], "completion": text[40:60]}) for text in sentences if len(text) > 40)
    (stock / "pairs").write_text("\n".join(pairs) + "\n", encoding="utf-8")
    (corpus := stock / "100_english_novels" / "corpus").mkdir(parents=True)
    for n in range(40):
        (corpus / f"Author{n:02}_Title_1900.txt").write_text("\n\n".join(sentences[n : n + 30]), encoding="utf-8")
    (level := stock / "ELTeC-eng" / "level1").mkdir(parents=True)
    body = "".join(f"<p>{sentence}</p>" for sentence in sentences[:30])
    header = "<titleStmt><title>A Tale : ELTeC edition</title><author>Other, A. (1800-1850)</author></titleStmt>"
    tei = f'<TEI xmlns="http://www.tei-c.org/ns/1.0">{header}<text><body>{body}</body></text></TEI>'
    (level / "ENG18480_Other.xml").write_text(tei, encoding="utf-8")
    page = Page("stock", made)
    for command in (
        "git clone there/100_english_novels && git clone there/ELTeC-eng",
        "python -m lkda.data.prose.novels 100_english_novels ELTeC-eng novels.jsonl.xz",
        "python scripts/train.py hydra.run.dir=run",
        "python scripts/export.py ckpt=run out=export",
        "python scripts/evaluate.py ckpt=run stepwise=true out=evaluation",
    ):
        result = page.run(Snippet("stock", 0, command, "shell"))
        assert result.outcome == "ran", result.output
    for name in ("run", "export", "evaluation"):
        shutil.move(page.folder / name, stock / name)
    shutil.move(page.folder / "novels.jsonl.xz", stock / "novels")
    # As that of a corpus with sources, of which each page would otherwise prepare one.
    evaluation = json.loads((stock / "evaluation").read_text(encoding="utf-8"))
    evaluation["result"]["by_source"] = {"tales": {"bits_per_byte": evaluation["result"]["bits_per_byte"]}}
    (stock / "evaluation").write_text(json.dumps(evaluation), encoding="utf-8")


class Page:
    """A scratch checkout with an environment in .venv, as `make` leaves it, and a cache without prepared prose."""

    def __init__(self, name: str, session: Session) -> None:
        made = tempfile.mkdtemp(prefix=re.sub(r"\W+", "_", name) + "_", dir=session.folder / "pages")
        self.folder, cache, self.log = Path(made, "checkout"), Path(made, "cache"), Path(made, "log.jsonl")
        ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
        patterns = [line.strip("/").rpartition("/")[2] for line in ignored if line and not line.startswith("#")]
        shutil.copytree(ROOT, self.folder, ignore=shutil.ignore_patterns(".git", *patterns))
        shutil.copytree(session.folder / "bin", self.folder / ".venv" / "bin")
        (self.folder / ".venv" / "bin" / "activate").write_text(f'PATH="{self.folder}/.venv/bin:$PATH"\n')
        for stamp in ("installed", "installed-dev", "installed-long"):
            (self.folder / ".venv" / stamp).touch()
        cache.mkdir()
        for part in (session.folder / "cache").iterdir():
            (cache / part.name).symlink_to(part)
        self.environment = session.environment | {"LKDA_CACHE": str(cache), LOG: str(self.log)}

    def run(self, snippet: Snippet) -> Result:
        """Run as bash would, or as a file of Python."""
        if snippet.language == "unknown":
            return Result(snippet, "failed", 0.0, "this line among commands is neither a command nor Python")
        command = snippet.text
        if snippet.language == "python":
            (self.folder / ".snippet.py").write_text(snippet.text + "\n", encoding="utf-8")
            command = "python .snippet.py"
        command, unknown = with_placeholders(command)
        if unknown:
            return Result(snippet, "failed", 0.0, f"what do {', '.join(unknown)} stand for? checkout.PLACEHOLDERS says")
        begin, told = time.perf_counter(), self._told()
        try:
            done = subprocess.run(
                ["bash", "-e", "-o", "pipefail", "-c", command],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=SECONDS,
            )
            code, output = done.returncode, done.stdout.decode(errors="replace")
        except subprocess.TimeoutExpired as error:
            code, output = 1, f"{(error.stdout or b'').decode(errors='replace')}\nnot done after {SECONDS} s"
        outcome = "ran" if code == 0 else "composed" if NEEDS_MORE.search(output) else "failed"
        records = [json.loads(line) for line in self._told()[len(told) :]]
        return Result(snippet, outcome, time.perf_counter() - begin, output, records)

    def remove(self) -> None:
        """Away with it."""
        shutil.rmtree(self.folder.parent, ignore_errors=True)

    def _told(self) -> list[str]:
        return self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []


def with_placeholders(command: str) -> tuple[str, list[str]]:
    """The command with what its words in capitals stand for, and those of which that is not known."""
    words = re.compile(r"(?<![\w$.-])([A-Z]{2,})(?![\w=:-])(?! in\b)")
    unknown = [word for word in words.findall(re.sub(r"#.*", "", command)) if word not in PLACEHOLDERS]
    return words.sub(lambda match: PLACEHOLDERS.get(match[1], match[1]), command), unknown


def run_source(name: str, session: Session) -> Iterator[Result]:
    """Every snippet of a source, in one scratch checkout that is removed at the end."""
    page = Page(name, session)
    try:
        for snippet in snippets(name):
            yield page.run(snippet)
    finally:
        page.remove()
