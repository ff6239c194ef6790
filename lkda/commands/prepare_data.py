"""Download and tokenize the mix of public texts (data=prose)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from lkda.checks import InputError, check_values
from lkda.commands.config import resolve
from lkda.commands.invocation import command
from lkda.commands.overrides import override
from lkda.data.prose.sources import OF_BEFORE, SOURCES, is_without_test, prepare_prose
from lkda.data.text.cache import default_cache_dir, expanded


def prepare_data(config: DictConfig) -> None:
    """Prepare the mix of public texts, the corpus of `data=prose`.

    Args:
        config: composed from configs/prepare_data.yaml.
    Raises: InputError for an unknown source, a source that cannot be downloaded, or a directory that exists already.
    """
    check_values(resolve(config), {"out": Path | None, "vocab_size": int, "sources": Sequence[str] | None})
    known = {source.name: source for source in SOURCES}
    wanted = list(known) if config.sources is None else list(config.sources)
    if not wanted:
        raise InputError(f"sources is empty; give some of {', '.join(known)}.")
    for name in wanted:
        if name not in known:
            raise InputError(f"there is no source {name!r}; the sources are {', '.join(known)}.")
    default = default_cache_dir() / "prose"
    out = expanded(config.out) if config.out else default
    terminal = Console(highlight=False, markup=False, emoji=False)
    console = terminal if terminal.is_terminal else Console(width=140, highlight=False, markup=False, emoji=False)
    if is_without_test(out):
        console.print(
            f"{out} was made by an earlier version and has no test split: it is made again, and the old directory is "
            f"renamed to {out}{OF_BEFORE}",
            soft_wrap=True,
        )
    manifest = prepare_prose(out, vocab_size=config.vocab_size, sources=[known[name] for name in wanted])
    for source in manifest["sources"]:
        sizes = f"{source['train_bytes'] / 1e6:8.2f} MB train {source['validation_bytes'] / 1e6:6.2f} MB validation"
        sizes += f" {source['test_bytes'] / 1e6:6.2f} MB test"
        console.print(f"{source['name']:24}{source['documents']:6} documents{sizes}  {source['licence']}")
    decontamination = manifest["decontamination"]
    for name in decontamination["before"]:
        console.print(
            f"of the {decontamination['window_tokens']}-token windows of the {name} text, "
            f"{decontamination['before'][name]:.3%} occurred in the training text before decontamination, "
            f"{decontamination['after'][name]:.3%} after it"
        )
    console.print(
        f"{decontamination['dropped_bytes'] / 1e6:.2f} MB were dropped from the training text, "
        f"{decontamination['train_bytes'] / 1e6:.2f} MB are left"
    )
    elsewhere = [] if out == default else [override("data.directory", str(out))]
    console.print(
        f"the token files, the tokenizer, licences and manifest.json are in {out}; train on them with\n"
        f"  {command('train', 'data=prose', *elsewhere)}",
        soft_wrap=True,
    )
