"""Finds the command lines and Python snippets of a page, of comments, and of help texts."""

from __future__ import annotations

import ast
import re
import shutil
import textwrap
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHELLS = ("bash", "sh", "shell")
SESSIONS = ("console", "shell-session")  # `$ ` marks what is typed, the other lines are output
PYTHONS = ("python", "py", "python3")
# Programs that need not be on this machine to be known as such.
PROGRAMS = frozenset(
    {"python", "python3", "pip", "pip3", "pipx", "uv", "conda", "mamba", "pytest", "ruff", "mypy", "make", "git"}
    | {"bash", "sh", "export", "source", ".", "for", "while", "if", "cd", "mkdir", "cp", "mv", "rm", "cat", "echo"}
    | {"apt", "apt-get", "sudo", "brew", "docker", "curl", "wget", "wandb", "hf", "huggingface-cli"}
    | {"nvidia-smi", "nvcc", "torchrun", "llama-cli", "vllm", "mlx_lm.generate"}
)


@dataclass(frozen=True)
class Snippet:
    """Something printed that a reader would run.

    Attributes:
        source: the page.
        line: of it, from 1.
        text: as printed, with its continuation lines.
        language: shell or python; unknown for a line among commands that is neither.
    """

    source: str
    line: int
    text: str
    language: str


def console_commands() -> dict[str, str]:
    """The commands that an installed lkda brings, with the functions that they call (module:function)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return dict(project.get("scripts", {}))


def subcommands() -> list[str]:
    """What the console command can be asked for, in text that also speaks of lkda: the names of the scripts."""
    return sorted(path.stem.replace("_", "-") for path in (ROOT / "scripts").glob("*.py"))


def make_targets() -> set[str]:
    """What `make` can be asked for."""
    return set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def is_command(line: str, *, strict: bool = False) -> bool:
    """Whether a line begins with a program, after `NAME=value` in front.

    Args:
        strict: only those of PROGRAMS, where prose or formulas may begin with the name of any program.
    """
    words = re.sub(r"^\$ ", "", line.strip()).split()
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    if not words or (len(words) > 1 and words[1].startswith(("=", ":"))):
        return False
    first = words[0]
    known = first in PROGRAMS or first in console_commands() or re.fullmatch(r"\.venv/bin/\S+|\./\S+\.(sh|py)", first)
    return bool(known) or (not strict and re.fullmatch(r"[\w.+-]+", first) is not None and bool(shutil.which(first)))


def of_markdown(source: str, text: str) -> list[Snippet]:
    """Of code blocks, indented or fenced, and of `code spans` that are commands."""
    found: list[Snippet] = []
    for first, language, lines in _blocks(text.splitlines()):
        if language is None:
            found += _of_prose(source, first, lines)
        else:
            found += _of_block(source, first, language, lines)
    return found


def _blocks(lines: Sequence[str]) -> Iterator[tuple[int, str | None, list[str]]]:
    """(number of the first line, language of a code block or None for prose, the lines)."""
    at = 0
    while at < len(lines):
        start = at
        fence = re.match(r"^(\s*)(```+|~~~+)\s*(\w[\w-]*)?", lines[at])
        if fence:
            at += 1
            while at < len(lines) and not lines[at].strip().startswith(fence[2]):
                at += 1
            yield start + 2, fence[3] or "", textwrap.dedent("\n".join(lines[start + 1 : at])).splitlines()
            at += 1
        elif _is_indented(lines, at):
            while at < len(lines) and (lines[at].startswith("    ") or not lines[at].strip()):
                at += 1
            yield start + 1, "", textwrap.dedent("\n".join(lines[start:at])).splitlines()
        else:
            at += 1
            while at < len(lines) and not _is_indented(lines, at) and not re.match(r"^\s*(```|~~~)", lines[at]):
                at += 1
            yield start + 1, None, list(lines[start:at])


def _is_indented(lines: Sequence[str], at: int) -> bool:
    before = lines[at - 1] if at else ""
    return lines[at].startswith("    ") and (not before.strip() or before.startswith("#"))


def _of_block(source: str, first: int, language: str, lines: Sequence[str]) -> list[Snippet]:
    """The commands and Python lines of a code block; none where it is a formula, a table or settings."""
    if language in PYTHONS:
        return [Snippet(source, first, "\n".join(lines), "python")]
    if language in SESSIONS:
        typed = [(number, line[2:]) for number, line in _logical(first, lines) if line.startswith("$ ")]
        return [Snippet(source, number, line, "shell") for number, line in typed]
    if language not in ("", *SHELLS):
        return []
    logical = [(n, re.sub(r"^\$ ", "", line)) for n, line in _logical(first, lines)]
    logical = [(number, line) for number, line in logical if line.strip() and not line.lstrip().startswith("#")]
    commands = {number for number, line in logical if language in SHELLS or is_command(line)}
    if not commands:
        whole = "\n".join(lines)
        return [Snippet(source, first, whole, "python")] if _is_python(whole, imports=True) else []
    found = []
    for among, group in groupby(logical, key=lambda item: item[0] in commands):
        members = list(group)
        if among:
            for number, line in members:
                found.append(Snippet(source, number, line, "shell"))
                found += of_text(source, [(number, comment) for _, comment in comments(line)])
        else:
            rest = "\n".join(line for _, line in members)
            found.append(Snippet(source, members[0][0], rest, "python" if _is_python(rest) else "unknown"))
    return found


def _logical(first: int, lines: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Lines joined where a backslash or an open loop continues them."""
    at = 0
    while at < len(lines):
        start, text = at, lines[at]
        while at + 1 < len(lines) and _is_open(text):
            at += 1
            text += "\n" + lines[at]
        at += 1
        yield first + start, text


def _is_open(text: str) -> bool:
    """Whether a command goes on in the next line."""
    loops = len(re.findall(r"(?:^|[;\s])(?:for \w+ in|while) ", text)) - len(re.findall(r"\bdone\b", text))
    return text.rstrip().endswith("\\") or (loops > 0 and is_command(text, strict=True))


def _is_python(text: str, *, imports: bool = False) -> bool:
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except SyntaxError:
        return False
    wanted: tuple[type[ast.AST], ...] = (
        (ast.Import, ast.ImportFrom) if imports else (ast.Call, ast.Import, ast.ImportFrom)
    )
    return any(isinstance(node, wanted) for node in nodes)


def _of_prose(source: str, first: int, lines: Sequence[str]) -> list[Snippet]:
    """Of code spans, which may go over the end of a line."""
    text = "\n".join(lines)
    found = []
    for match in re.finditer(r"(?<!`)`([^`]+)`(?!`)", text):
        span = " ".join(match[1].split())
        if " " in span and is_command(span, strict=True):
            found.append(Snippet(source, first + text[: match.start()].count("\n"), span, "shell"))
    return found


# Where a command begins in a comment or a help text, after the words that introduce it.
_BEGIN = re.compile(
    r"(?:(?<=^)|(?<=[\s:(`]))((?:[A-Z_]+=\S+ )?(?:python3? (?:-m |-c |scripts/|examples/)|for \w+ in |"
    r"pip3? install |make (?:" + "|".join(sorted(make_targets())) + r")\b"
    r"|bash \S+/|pytest -|\.venv/bin/|apt(?:-get)? install |echo \S.*\| ?python"
    + "".join(rf"|{name} (?:{'|'.join(subcommands())}|--)" for name in sorted(console_commands()))
    + "))"
)


def of_text(source: str, lines: Sequence[tuple[int, str]]) -> list[Snippet]:
    """Of comments and help texts, given as numbered lines: commands stand among words, explained after three spaces.

    What may be left out in a usage line, [like this], is left out.
    """
    found, at = [], 0
    while at < len(lines):
        number, line = lines[at]
        at += 1
        starts = [match.start(1) for match in _BEGIN.finditer(line)]
        starts = [start for n, start in enumerate(starts) if not n or line[start - 3 : start] == "   "]
        for start, end in zip(starts, [*starts[1:], len(line)]):
            text = _cut(line[start:end], in_prose=bool(line[:start].strip()))
            while end == len(line) and at < len(lines) and _is_open(text):
                text += "\n" + _cut(lines[at][1].strip(), in_prose=False)
                at += 1
            found.append(Snippet(source, number, _without_options(text), "shell"))
    return found


def _cut(text: str, *, in_prose: bool) -> str:
    """Without the explanation behind it, a closing quote or parenthesis, or the end of the sentence."""
    text = re.split(r"\s{3,}(?=\S)|`", text)[0].rstrip()
    return text.rstrip(".,;:)") if in_prose else text


def _without_options(text: str) -> str:
    """A usage line without its optional parts: a bracket after a blank, and `...`."""
    kept, depth = "", 0
    for at, letter in enumerate(text):
        if letter == "[" and (depth or text[at - 1] == " "):
            depth += 1
        if not depth:
            kept += letter
        if letter == "]" and depth:
            depth -= 1
    return re.sub(r"(?<=\s)\.\.\.(?=\s|$)", "", kept).rstrip()


def comments(text: str) -> list[tuple[int, str]]:
    """The numbered comments of YAML, Python or shell."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        match = re.search(r"(?:^|\s)# ?(.*)$", line)
        if match:
            found.append((number, match[1]))
    return found
