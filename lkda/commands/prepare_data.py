"""Download and tokenize a mix of public texts (data=prose, data=english, data=code), or tokenize your own files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from tokenizers import Tokenizer

from lkda.checks import InputError, check_values
from lkda.commands.command_line.invocation import command
from lkda.commands.command_line.overrides import override
from lkda.commands.settings.config import resolve
from lkda.commands.settings.unused_options import PREPARE_DATA, check_unused
from lkda.data.prose.prepare import OF_BEFORE, is_without_test, prepare_mix
from lkda.data.prose.sources import MIXES, SOURCES, Source
from lkda.data.text.cache import expanded
from lkda.data.text.files import file_sources
from lkda.data.text.tokenize import tokenize_into
from lkda.data.text.tokenizer import check_vocab_size, load_tokenizer, vocabulary_rows
from lkda.io import default_cache_dir

OPTIONS = {
    "mix": str | None,
    "paths": Sequence[str] | None,
    "text_column": str,
    "val_fraction": float,
    "test_fraction": float,
    "out": Path | None,
    "vocab_size": int,
    "sources": Sequence[str] | None,
    "path": Path | None,
    "tokenizer_path": Path | None,
}


def prepare_data(config: DictConfig) -> None:
    """Prepare a mix of public texts, the corpus of `data=prose`, `data=english` or `data=code`, or tokenize own files.

    Args:
        config: composed from configs/prepare_data.yaml.
    Raises: InputError for an unknown mix or source, a source that cannot be downloaded, or a directory that exists
        already.
    """
    check_values(resolve(config), OPTIONS)
    terminal = Console(highlight=False, markup=False, emoji=False)
    console = terminal if terminal.is_terminal else Console(width=140, highlight=False, markup=False, emoji=False)
    tokenizer_path = None if config.tokenizer_path is None else expanded(config.tokenizer_path)
    if config.paths is not None:
        _prepare_files(config, tokenizer_path, console)
    else:
        check_unused(PREPARE_DATA, resolve(config))
        _prepare_mix(config, tokenizer_path, console)


def _prepare_files(config: DictConfig, tokenizer_path: Path | None, console: Console) -> None:
    """Tokenize the user's own files into `out`."""
    given = [name for name in ("mix", "sources", "path") if config[name] is not None]
    if given:
        raise InputError(f"{given[0]} has no effect beside paths, which are tokenized instead of a mix: leave it out.")
    if config.out is None:
        raise InputError(
            "out is missing: with paths=..., give the directory to write the tokens to, for example out=tokens/mine."
        )
    check_vocab_size(config.vocab_size, option="vocab_size")
    sources = file_sources(
        list(config.paths),
        val_paths=(),
        val_fraction=config.val_fraction,
        test_fraction=config.test_fraction,
        text_column=config.text_column,
    )
    out = expanded(config.out)
    corpus = tokenize_into(out, sources, vocab_size=config.vocab_size, tokenizer_path=tokenizer_path)
    held_out = {"validation": corpus.validation, **({} if corpus.test is None else {"test": corpus.test})}
    sizes = ", ".join(f"{len(tokens):,} for {name}" for name, tokens in held_out.items())
    quoted = override("out", str(out)).partition("=")[2]
    console.print(
        f"{len(corpus.train):,} tokens for training, {sizes}, and tokenizer.json are in {out}; train on them with\n"
        f"  {command('train', 'data=tokens', f'data.paths=[{quoted}]', _rows(corpus.tokenizer))}",
        soft_wrap=True,
    )


def _rows(tokenizer: Tokenizer) -> str:
    """The override of scripts/train.py for a model with a row for each token. The default model has fewer."""
    return f"model.vocab_size={vocabulary_rows(tokenizer)}"


def _prepare_mix(config: DictConfig, tokenizer_path: Path | None, console: Console) -> None:
    """Prepare a mix, and print its sizes."""
    mix = config.mix or "prose"
    if mix not in MIXES:
        raise InputError(f"mix must be one of {', '.join(MIXES)}, got {mix!r}.")
    path = None if config.path is None else expanded(config.path)
    sources = _sources(mix, config.sources, path)
    default = default_cache_dir() / mix
    out = expanded(config.out) if config.out else default
    if is_without_test(out):
        console.print(
            f"{out} was made by an earlier version and has no test split: it is made again, and the old directory is "
            f"renamed to {out}{OF_BEFORE}",
            soft_wrap=True,
        )
    if path is None and config.sources is None:
        for source in (SOURCES[name] for name in MIXES[mix].sources if SOURCES[name].is_local):
            console.print(f"without {source.name}, which needs path=FILE ({source.how})", soft_wrap=True)
    manifest = prepare_mix(
        out,
        sources=sources,
        vocab_size=config.vocab_size,
        cache_dir=default_cache_dir(),
        paths={} if path is None else {source.name: path for source in sources if source.is_local},
        tokenizer_path=tokenizer_path,
    )
    _print(manifest, console)
    elsewhere = [] if out == default else [override("data.directory", str(out))]
    console.print(
        f"the token files, the tokenizer, licences and manifest.json are in {out}; train on them with\n"
        f"  {command('train', f'data={mix}', *elsewhere, _rows(load_tokenizer(out / 'tokenizer.json')))}",
        soft_wrap=True,
    )


def _sources(mix: str, wanted: Sequence[str] | None, path: Path | None) -> dict[Source, int | None]:
    """The chosen sources of a mix, in its order, with their largest sizes. A local file is left out without a path."""
    known = MIXES[mix].sources
    if wanted is not None and not wanted:
        raise InputError(f"sources is empty; give some of {', '.join(known)}.")
    for name in wanted or ():
        if name not in known:
            raise InputError(f"there is no source {name!r} in mix={mix}; the sources are {', '.join(known)}.")
        if SOURCES[name].is_local and path is None:
            raise InputError(f"the source {name} needs path=FILE ({SOURCES[name].how}).")
    chosen = [name for name in wanted or known if path is not None or not SOURCES[name].is_local]
    if path is not None and not any(SOURCES[name].is_local for name in chosen):
        raise InputError(f"path={path} has no effect: no chosen source of mix={mix} is a local file; leave it out.")
    if path is not None and not path.is_file():
        raise InputError(f"path={path} does not exist: give a file of JSON lines, as docs/guides/data.md explains.")
    return {SOURCES[name]: known[name] for name in chosen}


def _print(manifest: dict[str, Any], console: Console) -> None:
    """Print the sizes of the sources, and what was removed."""
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
    tokens = max((source["tokens"]["train"][1] for source in manifest["sources"]), default=0)
    console.print(
        f"{decontamination['dropped_bytes'] / 1e6:.2f} MB were dropped from the training text, "
        f"{decontamination['train_bytes'] / 1e6:.2f} MB ({tokens / 1e6:.2f}M tokens) are left"
    )
