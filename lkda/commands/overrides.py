"""Text on Hydra's command line: a value that must arrive exactly as it is, whatever characters it has."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

# Settings whose value is one text or path: of these Hydra's grammar shall make no number, list or dictionary.
_TEXTS = {
    *("ckpt", "out", "prompt_file", "init_from", "tasks_path", "bench", "title", "runs"),
    *("sample.prompt", "data.tokenizer_path", "data.directory", "hydra.run.dir", "hydra.sweep.dir"),
    *("model.name", "mixer.name", "logger.wandb.project", "logger.wandb.name", "logger.wandb.group"),
}
# Of these, the one that also takes a list.
_MAY_BE_A_LIST = ("runs",)
# OmegaConf takes this word for a value that is still to be given.
_MISSING = "???"


def override(key: str, value: str) -> str:
    """`key=value` from which Hydra reads exactly the text `value`; quoted only where it must be.

    It is not quoted for the shell: that is `shlex.join`'s part.
    """
    bare = f"{key}={value}"
    parsed = None if _special(value) else _parsed(bare)
    if parsed is not None and not parsed.is_sweep_override() and parsed.value() == value:
        return bare
    return f"{key}={_quoted(value)}"


def as_typed(arguments: Sequence[str], *, verbatim: Sequence[str] = ()) -> list[str]:
    """A command's arguments, so quoted that Hydra reads what was typed.

    The values of settings that hold a text or a path (`ckpt`, `out`, `hydra.run.dir`, ...) are taken as they stand: no
    number is made of `1.10`, and `runs/lr=1e-3` needs no quotes. What is left to Hydra is a value in quotes of its own,
    `null`, an interpolation `${...}`, and a sweep over several values.

    Args:
        arguments: as in sys.argv, without the program.
        verbatim: settings whose value is all that follows the first `=`, with nothing left to Hydra.
    """
    return [_read_as_typed(argument, verbatim) for argument in arguments]


def _read_as_typed(argument: str, verbatim: Sequence[str]) -> str:
    key, equals, value = argument.partition("=")
    if equals and key in verbatim:
        return f"{key}={_quoted(value)}"
    if not equals or key not in _TEXTS or "${" in value:
        return argument
    parsed = _parsed(argument)
    return argument if parsed is not None and _is_hydras(parsed, value) else f"{key}={_quoted(value)}"


def _is_hydras(parsed: Override, value: str) -> bool:
    """Whether Hydra's reading of a text's `value` is the wanted one."""
    if parsed.is_sweep_override():
        return not Path(value).exists()
    read = parsed.value()
    return read is None or value[:1] in ("'", '"') or (isinstance(read, list) and parsed.key_or_group in _MAY_BE_A_LIST)


def _parsed(argument: str) -> Override | None:
    """None for what is not in Hydra's grammar."""
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None


def _special(value: str) -> bool:
    return "${" in value or value == _MISSING


def _quoted(value: str) -> str:
    """A quoted value of Hydra's grammar whose interpolations OmegaConf leaves alone."""
    if value == _MISSING:
        text = f"${{oc.decode:\"'{_MISSING}'\"}}"
    else:
        # `\${` is no interpolation; backslashes that stand before it are doubled, or they would escape the escape.
        text = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)
    return QuotedString(text, Quote.single).with_quotes()
