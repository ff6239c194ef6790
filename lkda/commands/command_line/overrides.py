"""Quotes text for Hydra's command line, so that a value with any characters arrives unchanged."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

# Settings whose value is a text or a path. Hydra's grammar must not turn it into a number, a list or a dictionary.
_TEXTS = {
    *("ckpt", "out", "prompt_file", "init_from", "tasks_path", "bench", "title", "runs", "check", "wandb"),
    *("path", "tokenizer_path"),
    *("sample.prompt", "data.tokenizer_path", "data.directory", "hydra.run.dir", "hydra.sweep.dir"),
    *("model.name", "mixer.name", "logger.wandb.project", "logger.wandb.name", "logger.wandb.group"),
    "logger.wandb.job_type",
}
# Those of the settings above that also take a list.
_MAY_BE_A_LIST = ("runs", "bench")
# A setting of a command that has no sweeps, and whose text may have commas.
_NO_SWEEP = ("title",)
# A list of settings of another command, as in overrides=[trainer.precision=32-true]. Hydra's grammar has no `=` there.
_SETTINGS = "overrides"
# OmegaConf reads this word as a value that is required and missing.
_MISSING = "???"


def override(key: str, value: str) -> str:
    """`key=value`, which a command of lkda reads as exactly the text `value`. The value is quoted only if this is
    necessary.

    The result is not quoted for the shell: use `shlex.join` for that.
    """
    bare = f"{key}={value}"
    parsed = None if _special(value) else _parsed(_read_as_typed(bare, ()))
    if parsed is not None and not parsed.is_sweep_override() and parsed.value() == value:
        return bare
    return f"{key}={_quoted(value)}"


def as_typed(arguments: Sequence[str], *, verbatim: Sequence[str] = ()) -> list[str]:
    """The arguments of a command, quoted so that Hydra reads them as they were typed.

    The value of a setting that holds a text or a path (`ckpt`, `out`, `hydra.run.dir`, ...) is taken literally: `1.10`
    does not become a number, and `runs/lr=1e-3` needs no quotes. Hydra still parses a value that is itself in quotes,
    `null`, an interpolation `${...}`, and a sweep over several values.

    Args:
        arguments: as in sys.argv, without the name of the program.
        verbatim: settings whose value is always the literal text after the first `=`.
    """
    return [_read_as_typed(argument, verbatim) for argument in arguments]


def _read_as_typed(argument: str, verbatim: Sequence[str]) -> str:
    key, equals, value = argument.partition("=")
    if equals and key in verbatim:
        return f"{key}={_quoted(value)}"
    if key == _SETTINGS and value[:1] == "[" and value[-1:] == "]" and _parsed(argument) is None:
        return f"{key}=[{','.join(_quoted(word) for word in _outer_words(value[1:-1]))}]"
    if not equals or key not in _TEXTS or "${" in value:
        return argument
    parsed = _parsed(argument)
    return argument if parsed is not None and _is_hydras(parsed, value) else f"{key}={_quoted(value)}"


def _outer_words(text: str) -> list[str]:
    """The words between commas that are not inside brackets or braces."""
    words, depth = [""], 0
    for letter in text:
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0:
            words.append("")
        else:
            words[-1] += letter
    return [word.strip() for word in words]


def _is_hydras(parsed: Override, value: str) -> bool:
    """Whether Hydra should parse the `value` of a text setting itself."""
    if parsed.is_sweep_override():
        return parsed.key_or_group not in _NO_SWEEP and not Path(value).exists()
    read = parsed.value()
    return read is None or value[:1] in ("'", '"') or (isinstance(read, list) and parsed.key_or_group in _MAY_BE_A_LIST)


def _parsed(argument: str) -> Override | None:
    """The override that Hydra parses from the argument; None if it does not follow Hydra's grammar."""
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None


def _special(value: str) -> bool:
    return "${" in value or value == _MISSING


def _quoted(value: str) -> str:
    """`value` quoted for Hydra's grammar, with `${` escaped for OmegaConf."""
    if value == _MISSING:
        text = f"${{oc.decode:\"'{_MISSING}'\"}}"
    else:
        # `\${` is not an interpolation. Backslashes directly before it are doubled, or they would escape the backslash.
        text = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)
    return QuotedString(text, Quote.single).with_quotes()
