"""What is typed, and what is printed to be typed, arrives as it is."""

from __future__ import annotations

import glob
import random
import shlex
import sys
from functools import partial
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from lkda.commands.command_line.invocation import command
from lkda.commands.command_line.overrides import as_typed, override
from lkda.commands.compare import _find
from tests.commands.small import ROOT, composed

NASTY = [
    "runs/one",
    "two words",
    " and then",
    "trailing ",
    "1.10",
    "007",
    "1e3",
    "null",
    "true",
    "",
    "lr=1e-3",
    "=begins with one",
    "a,b",
    "[a]",
    "[unclosed",
    "{a: 1}",
    "(x)",
    "it's",
    'He said: "hi"',
    "'quoted'",
    "back\\slash\\",
    "\\'",
    "$HOME",
    "${mixer.name}",
    "\\${x}",
    "${unclosed",
    "`date`",
    "~user",
    "!bang",
    "#hash",
    "a;b&c|d",
    "*?[x]",
    "???",
    "été/日本語 🚀",
    "two\nlines\r\n\tand a tab",
    "-m",
    "choice(a,b)",
]


def read(word: str) -> str:
    """The value that a command's function sees of `key=value`."""
    config = OmegaConf.create({"key": None})
    config.key = OverridesParser.create().parse_override(word).value()
    assert OmegaConf.to_container(config, resolve=True) == {"key": config.key}
    return config.key


@pytest.mark.parametrize("value", NASTY)
def test_a_printed_override_is_read_back(value: str) -> None:
    """Through the shell, through what a command makes of its arguments, and through Hydra."""
    (*_, word) = shlex.split(command("generate", override("ckpt", value)))
    (again,) = as_typed([word])
    assert read(again.replace("ckpt=", "key=", 1)) == value


def test_any_text_is_read_back() -> None:
    draw = random.Random(0)
    for _ in range(300):
        value = "".join(draw.choice("\\'\"${}[]()ab=,:~ \n?1.é") for _ in range(draw.randint(0, 10)))
        assert read(override("key", value)) == value
        (of_path,) = as_typed([override("ckpt", value)])
        assert read(of_path.replace("ckpt=", "key=", 1)) == value


def test_plain_words_stay_plain() -> None:
    assert override("ckpt", "runs/one-2/last.ckpt") == "ckpt=runs/one-2/last.ckpt"
    assert override("ckpt", "multirun/seed=1_mixer=kda/last.ckpt") == "ckpt=multirun/seed=1_mixer=kda/last.ckpt"


@pytest.mark.parametrize("value", NASTY)
def test_a_prompt_is_what_was_typed(value: str) -> None:
    (word,) = as_typed([f"prompt={value}"], verbatim=("prompt",))
    assert composed("generate", "ckpt=x", word).prompt == value


def _is_hydras(value: str) -> bool:
    """What is left to Hydra of a path: quotes of its own, an interpolation, null, a sweep."""
    return "${" in value or value[:1] in ("'", '"') or value in ("null", "a,b", "choice(a,b)")


@pytest.mark.parametrize("value", [value for value in NASTY if not _is_hydras(value)])
def test_a_path_is_what_was_typed(value: str) -> None:
    (word,) = as_typed([f"ckpt={value}"])
    assert read(word.replace("ckpt=", "key=", 1)) == value


@pytest.mark.parametrize(
    "word", ["out=null", "ckpt='runs/a=b'", "runs=['a/*','b/*']", "hydra.run.dir=runs/${mixer.name}", "ckpt=a,b"]
)
def test_what_is_hydras_is_left_to_it(word: str) -> None:
    assert as_typed([word]) == [word]


def test_a_comma_in_a_name_is_no_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b").mkdir()
    assert read(as_typed(["ckpt=a,b"])[0].replace("ckpt=", "key=", 1)) == "a,b"


def test_other_settings_keep_hydras_grammar() -> None:
    words = ["trainer.max_steps=10", "mixer=kda,softmax", "data.paths=[a,b]", "+x={a: 1}", "-m", "--cfg", "job"]
    assert as_typed(words) == words


def test_a_title_may_have_commas() -> None:
    (word,) = as_typed(["title=Recall, by length"])
    assert read(word.replace("title=", "key=", 1)) == "Recall, by length"


def test_a_literal_path_comes_before_a_pattern(tmp_path: Path) -> None:
    found = partial(_find, option="runs", what="run directories")
    (tmp_path / "run[1]").mkdir()
    (tmp_path / "run1").mkdir()
    assert found(f"{tmp_path}/run[1]") == [tmp_path / "run[1]"]
    assert found(f"{tmp_path}/run*") == [tmp_path / "run1", tmp_path / "run[1]"]
    (tmp_path / "run[1]" / "inside").mkdir()
    assert found(f"{glob.escape(str(tmp_path / 'run[1]'))}/*") == [tmp_path / "run[1]" / "inside"]
    with pytest.raises(ValueError, match="matches nothing"):
        found(f"{tmp_path}/none*")


@pytest.mark.parametrize(
    ("started", "expected"),
    [
        ("/somewhere/bin/lkda", ["/somewhere/bin/lkda", "prepare-data"]),
        ("/somewhere/lkda/__main__.py", ["-m", "lkda", "prepare-data"]),
        ("scripts/train.py", ["scripts/prepare_data.py"]),
    ],
)
def test_printed_commands_take_the_door_that_was_used(
    started: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [started])
    words = shlex.split(command("prepare-data"))
    assert words[-len(expected) :] == expected
