"""A Python that has imported everything once and runs each command in a fork of itself: `server.py SOCKET STOCK`.

The `python` of the scratch checkout (client.py) sends its command line, working directory, environment and open files,
and gets the exit status. What was run is written to the file that the environment names, a line of JSON each.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import glob
import hashlib
import importlib
import importlib.util
import json
import multiprocessing
import os
import pkgutil
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
import traceback
import types
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import tiny

from lkda.io import write_atomically

HERE = Path(__file__).parent
SMALL_SOURCE = "configs/debug/fast.yaml"  # with which the documentation's own command is tried
WARM = (
    *("torch", "lightning", "hydra", "datasets", "tokenizers", "safetensors", "matplotlib.figure", "rich.console"),
    *("lkda.commands.train", "lkda.commands.evaluate", "lkda.commands.generate", "lkda.commands.export"),
    *("lkda.commands.compare", "lkda.commands.benchmark", "lkda.data.text.hub", "lkda.data.text.needle"),
)


class Command:
    """One command line of python, run in this process, which is a fork made for it."""

    def __init__(self, request: dict[str, Any], stock: Path) -> None:
        self.arguments: list[str] = request["arguments"]
        self.stock = stock
        self.record: dict[str, Any] = {"arguments": self.arguments, "added": [], "notes": []}
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["environment"])

    def run(self) -> None:
        """Exits as the command does."""
        _wait_for_a_new_name()
        code, begin = 1, time.perf_counter()
        try:
            code = self._run()
        except SystemExit as ending:
            code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
            if isinstance(ending.code, str):
                print(ending.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        self.record |= {"code": code, "seconds": time.perf_counter() - begin, "cpu_seconds": sum(os.times()[:4])}
        with open(os.environ["LKDA_DOCUMENTATION_LOG"], "a", encoding="utf-8") as file:
            file.write(json.dumps(self.record) + "\n")
        _end(code)

    def _run(self) -> int:
        first, *rest = self.arguments
        if first == "-m" and rest[0] == "venv":
            return self._venv(Path(rest[-1]))
        if first == "-m" and rest[0] == "pip":
            return self._once(lambda: self._pip(rest[1:]))
        if first == "-m" and rest[0] == "pytest":
            rest = [*rest, "-p", "tests.documentation.first_test", "-p", "no:cacheprovider", "-n", "0"]
            self.record["notes"].append("the first of its tests")
            return self._once(lambda: self._module(rest))
        if rest == ["tests.documentation"]:
            rest = [*rest, SMALL_SOURCE]
            self.record["notes"].append(f"for {SMALL_SOURCE} alone")
        if rest[:1] == ["lkda.report.redraw"] and len(rest) > 1:
            rest = [rest[0], *tiny.one_of_each_kind(rest[1:])]
            self.record["notes"].append(f"for {len(rest) - 1} directories, one of each kind")
        if first == "--console":
            target, program, name, *words = [*rest, ""] if len(rest) < 3 else rest
            words += self._cut(name, words)
            return self._main(pkgutil.resolve_name(target), list(filter(None, [program, name, *words])))
        if rest[:1] == ["lkda"] and len(rest) > 1:
            rest += self._cut(rest[1], rest[2:])
        if first == "-m":
            return self._module(rest)
        if first == "-c":
            sys.path[0] = ""
            return self._main(lambda: exec(rest[0], {"__name__": "__main__"}), ["-c", *rest[1:]])
        sys.path[0] = str(Path(first).resolve().parent)
        if Path(first).parent.name == "scripts":
            return self._script(Path(first), rest)
        return self._main(lambda: runpy.run_path(first, run_name="__main__"), [first, *rest])

    def _module(self, argv: list[str]) -> int:
        sys.path[0] = os.getcwd()
        if argv[0].startswith("lkda."):
            self._shorten_argparse()
        return self._main(lambda: _run_module(argv[0]), argv)

    def _script(self, path: Path, rest: list[str]) -> int:
        if tiny.needs_a_cluster(rest):
            tiny.check_settings(path.stem, rest, Path("configs").resolve())
            self.record["notes"].append("a cluster: only the settings are checked here")
            return 0
        added = self._cut(path.stem, rest)

        def run() -> int:
            return self._main(lambda: runpy.run_path(str(path), run_name="__main__"), [str(path), *rest, *added])

        of_prose = path.stem == "prepare_data" and not any(word.startswith(("mix=", "paths=")) for word in rest)
        return self._prepare(run) if of_prose and added else run()

    def _cut(self, name: str, words: list[str]) -> list[str]:
        """What is added to the words of the command `name`, with a note of it."""
        tokenizer = self.stock / "export" / "tokenizer.json"
        added, reasons = tiny.overrides(name.replace("-", "_"), words, Path("configs").resolve(), tokenizer)
        self.record["added"] += added
        self.record["notes"] += reasons
        return added

    def _prepare(self, run: Callable[[], int]) -> int:
        """The prose that an earlier command of the session has prepared in the same way is not fetched again."""
        prose, kept = Path(os.environ["LKDA_CACHE"], "prose"), self.stock / f"prose_{self._key()}"
        shutil.rmtree(prose, ignore_errors=True)
        if kept.exists():
            self.record["notes"].append("fetched once for all pages")
            shutil.copytree(kept, prose)
            return 0
        code = run()
        if code == 0:
            made = kept.with_name(f"{kept.name}_{os.getpid()}")
            shutil.copytree(prose, made)
            with suppress(OSError):  # another page has kept it
                made.rename(kept)
        return code

    def _main(self, main: Callable[[], Any], argv: list[str]) -> int:
        import datasets
        import vl_convert

        from lkda.bench import decode
        from lkda.commands.benchmarks import whole_set
        from lkda.report.draw import chart, style

        decode.SECONDS, decode.FORWARD = 0.01, (1, 64)
        chart.PNG_SCALE, style.MOST_PIXELS = 0.25, (400, 250)  # compressing all pixels takes seconds
        vl_convert.javascript_bundle = self._kept(vl_convert.javascript_bundle)
        whole_set.ON_CPU = tuple(tiny.small_parts(whole_set.ON_CPU))
        # Rows that `row_process.run_fork` measures are forks of this process, which has imported everything already.
        contexts = multiprocessing.context._concrete_contexts  # type: ignore[attr-defined]
        contexts["forkserver"] = contexts["fork"]
        datasets.load_dataset = tiny.stand_in_for_the_hub(
            datasets.load_dataset, self.stock, self.record["notes"].append
        )
        self.record["notes"] += [f"laid there: {what}" for what in tiny.provide(argv[1:], self.stock)]
        sys.argv = argv
        try:
            main()
        except SystemExit as ending:
            if isinstance(ending.code, str):
                print(ending.code, file=sys.stderr)
            return ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        return 0

    def _shorten_argparse(self) -> None:
        parse, record = argparse.ArgumentParser.parse_args, self.record

        def parse_args(parser: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
            if args is None:
                added = tiny.arguments_of(list(parser._option_string_actions), sys.argv)
                record["added"] += added
                args = [*sys.argv[1:], *added]
            return parse(parser, args, namespace)

        mixed = argparse.ArgumentParser.parse_intermixed_args

        def parse_intermixed_args(parser: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
            if args is None or [*args] == sys.argv[1:]:
                added = tiny.arguments_of(list(parser._option_string_actions), sys.argv)
                record["added"] += added
                args = [*sys.argv[1:], *added]
            return mixed(parser, args, namespace)

        argparse.ArgumentParser.parse_args = parse_args  # type: ignore[method-assign,assignment]
        argparse.ArgumentParser.parse_intermixed_args = parse_intermixed_args  # type: ignore[method-assign,assignment]

    def _venv(self, directory: Path) -> int:
        """An environment whose programs are those of the scratch checkout."""
        shutil.copytree(Path(os.environ["LKDA_DOCUMENTATION_BIN"]), directory / "bin", dirs_exist_ok=True)
        (directory / "bin" / "activate").write_text(f'PATH="{directory.resolve()}/bin:$PATH"\n')
        self.record["notes"].append("links to this environment")
        return 0

    def _pip(self, rest: list[str]) -> int:
        """Resolved against the index and this environment, and nothing is changed in it.

        Of an extra of the project only the name is checked: `make test` installs those that tests need.
        """
        words = [match[1] for word in rest if (match := re.fullmatch(r"(?:\.|lkda)\[([\w,]+)\]", word))]
        if words:
            project = tomllib.loads((HERE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            self.record["notes"].append("only the name of the extra is checked here")
            missing = {name for word in words for name in word.split(",")} - {*project["optional-dependencies"]}
            if missing:
                print(f"error: there is no such extra: {', '.join(missing)}", file=sys.stderr)
            return int(bool(missing))
        dry = ["--dry-run"] if rest[0] == "install" else []
        done = subprocess.run([sys.executable, "-m", "pip", *rest, *dry], capture_output=True, text=True)
        print(done.stdout, done.stderr)
        self.record["added"] = dry
        return done.returncode

    def _once(self, run: Callable[[], int]) -> int:
        """What has ended well in this session does so again."""
        done = self.stock / f"done_{self._key()}"
        if done.exists():
            self.record["notes"].append("as before")
            return 0
        code = run()
        if code == 0:
            done.touch()
        return code

    def _kept(self, bundle: Callable[[str], str]) -> Callable[[str], str]:
        """The JavaScript of a page, which takes a second to make, is made once in this session."""

        def kept(snippet: str) -> str:
            path = self.stock / f"javascript_{hashlib.sha256(snippet.encode()).hexdigest()[:16]}"
            if not path.exists():
                write_atomically(path, bundle(snippet))
            return path.read_text(encoding="utf-8")

        return kept

    def _key(self) -> str:
        return hashlib.sha256(repr([*self.arguments, *self.record["added"]]).encode()).hexdigest()[:16]


def _wait_for_a_new_name() -> None:
    """What commands write is named by the second, and they follow one another faster here than anyone types them."""
    written = "outputs", "outputs/*", "multirun"
    while any(glob.glob(f"{folder}/{time.strftime('%Y-%m-%d_%H-%M-%S')}*") for folder in written):
        time.sleep(0.02)


def _end(code: int) -> NoReturn:
    """Ends as the interpreter does, but does not take the imported modules apart, which takes more than a second."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code % 256)


def _run_module(name: str) -> None:
    """As `python -m` does; processes that it spawns find what it defines in its `__main__`, and not in the server's."""
    main = types.ModuleType("__main__")
    sys.modules |= {"__main__": main, "__mp_main__": main}
    runpy._run_module_as_main(name)  # type: ignore[attr-defined]


def serve(address: str, stock: Path) -> None:
    """Until the test ends this process."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path[0] = ""  # the place of what a command line puts first; it was this file's folder
    for name in WARM:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a fork that collects garbage would otherwise copy the memory of all modules

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    while True:
        connection, _ = listener.accept()
        message, files, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        if message.startswith(b"{") and b"tasks=" in message and importlib.util.find_spec("lm_eval"):
            importlib.import_module("lm_eval")
        if os.fork() == 0:
            listener.close()
            _answer(connection, json.loads(message), files, stock)
        connection.close()
        for file in files:
            os.close(file)


def _answer(connection: socket.socket, request: dict[str, Any], files: list[int], stock: Path) -> None:
    """In a fork: the command in a fork of this one, and its exit status to the client."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child == 0:
        connection.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        Command(request, stock).run()
    for file in files:
        os.close(file)
    _, status = os.waitpid(child, 0)
    connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]))
