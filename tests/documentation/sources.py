"""Every place that prints commands: a new page, example, configuration, script or module is found by itself."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

from tests.documentation.commands import ROOT, Snippet, comments, of_markdown, of_text


def names() -> list[str]:
    """Of all sources: pages, examples, configurations whose comments hold commands, modules that can be run, scripts."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    examples = [path for path in sorted((ROOT / "examples").rglob("*")) if path.suffix in (".md", ".py", ".sh", ".yaml")]
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
    """Of a page, of the comments of a configuration or an example (which is itself run), or of a module's docstring."""
    name, text = str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return of_markdown(name, text)
    if path.is_relative_to(ROOT / "lkda"):
        docstring = ast.get_docstring(ast.parse(text)) or ""
        return of_text(name, list(enumerate(docstring.splitlines(), 1)))
    lines = comments(text)
    if path.is_relative_to(ROOT / "configs"):
        return of_text(name, lines)
    own = {".py": f"python {name}", ".sh": f"bash {name}"}.get(path.suffix)
    return of_text(name, lines) + ([Snippet(name, 1, own, "shell")] if own else [])


def of_help(name: str) -> list[Snippet]:
    """Of what a script says of itself, and the command that makes it say so."""
    asked = [sys.executable, *name.split()]
    told = subprocess.run(asked, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True).stdout
    usage = Snippet(name, 0, f"python {name}", "shell")
    return [usage, *of_text(name, list(enumerate(told.splitlines(), 1)))]


