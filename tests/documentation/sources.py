"""Every place that prints commands: a new page, example, configuration, script or module is found by itself."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.documentation.commands import ROOT, Snippet, comments, of_markdown, of_text


def names() -> list[str]:
    """Of all sources: pages, examples, configurations with commands in their comments, runnable modules, scripts."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    examples = [
        path for path in sorted((ROOT / "examples").rglob("*")) if path.suffix in (".md", ".py", ".sh", ".yaml")
    ]
    written = [*pages, *examples, *sorted((ROOT / "configs").rglob("*.yaml"))]
    found = [str(path.relative_to(ROOT)) for path in written if of_file(path)]
    found += [str(path.relative_to(ROOT)) for path in runnable_modules() if of_file(path)]
    return found + [f"scripts/{path.name} --help" for path in sorted((ROOT / "scripts").glob("*.py"))]


def runnable_modules() -> list[Path]:
    """The modules of lkda that `python -m` runs; their docstrings are their help texts."""
    files = sorted((ROOT / "lkda").rglob("*.py"))
    return [path for path in files if '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8")]


def snippets(name: str) -> list[Snippet]:
    """What a source prints, in its order and without repetitions."""
    found = of_help(name) if name.endswith(" --help") else of_file(ROOT / name)
    return list({(snippet.text, snippet.language): snippet for snippet in reversed(found)}.values())[::-1]


def of_file(path: Path) -> list[Snippet]:
    """Of a page, of the comments of a configuration, of a module's docstring, or of an example, which is itself run."""
    name, text = str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return of_markdown(name, text)
    lines = comments(text)
    if path.is_relative_to(ROOT / "configs"):
        return of_text(name, lines)
    if path.suffix == ".py":
        docstring = ast.get_docstring(ast.parse(text)) or ""
        lines = list(enumerate(docstring.splitlines(), 1))
    own = {".py": f"python {name}", ".sh": f"bash {name}"}.get(path.suffix)
    is_example = path.is_relative_to(ROOT / "examples")
    return of_text(name, lines) + ([Snippet(name, 1, own, "shell")] if is_example and own else [])


def help_of(name: str) -> list[str]:
    """The lines that a script prints when it is called so."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    asked = [sys.executable, *name.split()]
    return subprocess.run(
        asked, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()


def of_help(name: str) -> list[Snippet]:
    """Of what a script says of itself, and the command that makes it say so."""
    usage = Snippet(name, 0, f"python {name}", "shell")
    return [usage, *of_text(name, list(enumerate(help_of(name), 1)))]


def settings(lines: Sequence[str]) -> list[str]:
    """The overrides that lines of a help text explain, each of the values a|b|c by itself.

    Such a line holds overrides, three spaces or more, and an explanation.
    """
    found = []
    for line in lines:
        match = re.match(r"^\s+((?:[a-z][\w.]*=\S+(?: |(?=\s{3})|$))+)(?:\s{2,}\S|$)", line)
        for word in match[1].split() if match else ():
            name, _, values = word.partition("=")
            values = values.replace(",...", "").replace("...", "x")
            found += [f"{name}={value}" for value in values.split("|")]
    return found
