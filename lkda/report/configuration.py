"""Writes the reference of all settings from the comments in configs/: `python -m lkda.report.configuration` writes
docs/reference/configuration.md.

A setting is one key of a YAML file. Its meaning is the comment behind it, or the comment lines directly above it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from lkda.io import write_atomically
from lkda.report.draw.tables import markdown_table

CONFIGS, PAGE = Path("configs"), Path("docs/reference/configuration.md")
# Keys that are Hydra's own, and the section of the command itself, which --help prints.
_NOT_SETTINGS = ("defaults", "hydra", "_target_", "_partial_")
# Groups whose files set keys of the other groups: they are listed by what they are for.
_PRESETS = ("experiment", "debug")
_HEAD = """# All settings

Every setting of every command, its default and its meaning. `python -m lkda.report.configuration` writes this page from
the files in [configs/](../../configs); a test checks that it is current.

Write a setting as `key=value` behind a command. Write a choice of a group as `group=choice`, for example
`mixer=softmax`. `null` means that nothing is set. `???` means that you must give the setting. A value such as `${seed}`
is taken from the setting in the braces. `--cfg job` prints all settings of a command with their values instead of
running it.
"""
_SCRIPTS = ("train", "evaluate", "generate", "export", "compare", "benchmark", "prepare_data")


@dataclass(frozen=True)
class Setting:
    """One key: how it is written on the command line, its default as in the file, and what its comment says."""

    key: str
    default: str
    meaning: str


@dataclass(frozen=True)
class File:
    """A file of configs/: the comment at its head, the files that it starts from, and its settings."""

    name: str
    about: str
    starts_from: list[str]
    settings: list[Setting]


def read_config(path: Path, prefix: str = "") -> File:
    """A YAML file's settings.

    Args:
        prefix: stands before each key on the command line, "data." for the files of that group.
    """
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    node = yaml.compose(text)
    found: list[Setting] = []
    starts_from: list[str] = []
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if key.value == "defaults":
            starts_from = [item.value for item in value.value if isinstance(item, yaml.ScalarNode)]
        elif key.value not in _NOT_SETTINGS:
            found += _settings(prefix, key, value, text, lines)
    return File(path.stem, _about(lines), [name for name in starts_from if name != "_self_"], found)


def _settings(prefix: str, key: yaml.Node, value: yaml.Node, text: str, lines: list[str]) -> Iterator[Setting]:
    name = prefix + key.value
    if isinstance(value, yaml.MappingNode) and not value.flow_style:
        if meaning := _comment(lines, key.start_mark.line):
            yield Setting(name, "", meaning)
        for inner, deeper in value.value:
            if inner.value not in _NOT_SETTINGS:
                yield from _settings(f"{name}.", inner, deeper, text, lines)
        return
    default = text[value.start_mark.index : value.end_mark.index].strip()
    if isinstance(value, yaml.SequenceNode) and not value.flow_style:
        default = f"{len(value.value)} entries, see the file"
    yield Setting(name, default, _comment(lines, key.start_mark.line))


def _comment(lines: list[str], number: int) -> str:
    """The comment behind a key, or those directly above it that are not the head of the file."""
    behind = re.search(r"\s#\s?(.*)$", lines[number])
    if behind:
        return behind[1].strip()
    above: list[str] = []
    while number and lines[number - 1].strip().startswith("#"):
        number -= 1
        above.insert(0, lines[number].strip().lstrip("# "))
    return " ".join(above) if number else ""


def _about(lines: list[str]) -> str:
    """The comment at the head of a file, up to the commands that are set in from the margin."""
    found = []
    for line in lines:
        if not line.startswith("#") or re.match(r"#\s{2,}", line):
            break
        if "@package" not in line:
            found.append(line.lstrip("# "))
    return " ".join(found)


def _plain(text: str) -> str:
    """Text for a page: what Markdown would take for a sign of its own is escaped."""
    return re.sub(r"([|*<>])", r"\\\1", text)


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text else ""


def _section(file: File, title: str) -> str:
    parts = [f"### {title}", _plain(file.about)]
    if file.starts_from:
        names = ", ".join(f"`{name}`" for name in file.starts_from)
        parts.append(f"Starts from {names}, and sets:" if file.settings else f"Starts from {names}.")
    if file.settings:
        body = [[_code(each.key), _code(each.default), _plain(each.meaning)] for each in file.settings]
        parts.append(markdown_table(["setting", "default", "meaning"], body, names=3).rstrip())
    return "\n\n".join(part for part in parts if part)


def files(configs: Path = CONFIGS) -> Iterator[tuple[str, File]]:
    """Each file with its title: those of the scripts, then those of the groups."""
    for script in _SCRIPTS:
        yield f"scripts/{script}.py", read_config(configs / f"{script}.yaml")
    for group in sorted(path.name for path in configs.iterdir() if path.is_dir()):
        prefix = "" if group in _PRESETS else f"{group}."
        for path in sorted((configs / group).glob("*.yaml")):
            yield f"{group}={path.stem}", read_config(path, prefix)


def page(configs: Path = CONFIGS) -> str:
    """The whole page."""
    parts, group = [_HEAD.rstrip(), "## Commands"], ""
    for title, file in files(configs):
        head, _, choice = title.partition("=")
        if choice and head != group:
            group = head
            parts.append(f"## `{group}=`")
        if group in _PRESETS:
            parts.append(f"### {title}\n\n{_plain(file.about)}")
        else:
            parts.append(_section(file, title))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Writes the page of the working directory."""
    try:
        write_atomically(PAGE, page())
    except (OSError, yaml.YAMLError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
