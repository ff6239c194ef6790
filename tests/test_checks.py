"""Values are held against the types that a function declares, before it is called."""

import ast
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

import lkda.checks
from lkda.checks import MOST, InputError, check_types, check_values

DECLARED = {
    "count": int,
    "rate": float,
    "switch": bool,
    "word": str,
    "file": Path,
    "perhaps": int | None,
    "words": Sequence[str],
    "parts": Sequence[Mapping[str, int]],
}


@pytest.mark.parametrize(
    "given",
    [
        {"count": 3, "rate": 3, "switch": False, "word": "", "file": "a", "perhaps": None, "words": [], "parts": []},
        {"rate": -0.5, "perhaps": 7, "words": ["a"], "parts": [{"length": 4}], "of another": object()},
    ],
)
def test_values_of_the_declared_types(given: dict[str, object]) -> None:
    check_values(given, DECLARED)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("count", 1.0, r"count must be a whole number \(at most 2147483647\), got 1.0\."),
        ("count", True, "count must be a whole number"),
        ("count", MOST + 1, "count must be a whole number"),
        ("rate", math.nan, "rate must be a finite number, got nan"),
        ("rate", "1e-3", "rate must be a finite number, got '1e-3'"),
        ("switch", 1, "switch must be true or false, got 1"),
        ("word", None, "word must be text, got None"),
        ("file", "", "file must be a path"),
        ("file", 2012, "file must be a path .quote it if it is a number., got 2012"),
        ("perhaps", "x", r"perhaps must be a whole number .* or null, got 'x'"),
        ("words", "a", r"words must be a list, each entry text, got 'a': put it into brackets, words='\[a\]'\.$"),
        ("words", "", r"words must be a list, each entry text, got ''\.$"),
        ("words", ["a", 1], "words must be a list"),
        ("parts", [{"length": "x"}], "parts must be a list"),
    ],
)
def test_another_type_is_named(name: str, value: object, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        check_values({name: value}, DECLARED)


def test_of_a_class_the_arguments_count() -> None:
    class Made:
        def __init__(self, *, size: int) -> None: ...

    check_types(Made, {"size": 4}, prefix="made.")
    with pytest.raises(InputError, match=r"made\.size must be a whole number"):
        check_types(Made, {"size": "4"}, prefix="made.")


def test_it_imports_nothing_of_lkda() -> None:
    """Every part of the package may import it."""
    tree = ast.parse(Path(lkda.checks.__file__).read_text(encoding="utf-8"))
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert not [name for name in modules if name is None or name.startswith(("lkda", "torch"))]
