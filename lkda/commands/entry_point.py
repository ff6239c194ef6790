"""The entry point of every command: of the scripts in a checkout, and of the console command `lkda`."""

from __future__ import annotations

import difflib
import gc
import importlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from types import ModuleType

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

import lkda
from lkda.checks import InputError
from lkda.commands.command_line.errors import BAD_INPUT, output_that_may_end, readable_errors, recorded_failure
from lkda.commands.command_line.invocation import has_new_directory, with_started_command
from lkda.commands.command_line.overrides import as_typed
from lkda.commands.command_line.warning_lines import plain_warnings
from lkda.commands.settings.config import check_keys
from lkda.commands.sweeps.sweep_gpus import check_counts, claim_gpus, defaults_of_plugins, register
from lkda.shipped import CONFIGS

COMMANDS = {
    "train": "train a language model",
    "evaluate": "measure a trained model",
    "generate": "continue a text with a trained model",
    "export": "write a trained model into a directory that other programs load",
    "compare": "compare runs: a table, plots and a page",
    "benchmark": "measure operators, training steps and decoding",
    "prepare-data": "download and tokenize a mix of public texts, or tokenize your own files",
}
# For a word without "=": what was probably meant.
_A_SETTING = "Give each setting with its name, as in seed=1."
_WITHOUT_A_KEY = {
    "generate": "A prompt of several words must be in quotes, as in prompt='Fellow citizens'; or give "
    "prompt_file=PATH, or pipe the text in.",
    "compare": "Give the runs as runs='outputs/*' or runs='[runs/one,runs/two]', in quotes.",
    "evaluate": "Give a run as ckpt=runs/one.",
    "export": "Give a run as ckpt=runs/one.",
}
# Settings whose value is taken literally and is not parsed by Hydra's grammar.
_VERBATIM = {"generate": ("prompt",)}


def main() -> None:
    """The console command: `lkda COMMAND [key=value ...]`."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {command:{width}}  {what}" for command, what in COMMANDS.items()]
        usage = ["lkda COMMAND [key=value ...]", "", "Commands (`lkda COMMAND --help` explains each one)"]
        print("\n".join([*usage, *lines]))
    elif name == "--version":
        print(f"lkda {lkda.__version__}")
    elif name in COMMANDS:
        _run(name, arguments)
    else:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        print(f"error: lkda has no command {name!r}.{hint} It has {', '.join(COMMANDS)}.", file=sys.stderr)
        raise SystemExit(BAD_INPUT)


def run_script(name: str) -> None:
    """Run the command `name` with the arguments of this process."""
    _run(name, sys.argv[1:])


def _run(name: str, arguments: Sequence[str]) -> None:
    """Compose the configuration of the command `name`, and call its function."""
    module = name.replace("-", "_")

    def task(config: DictConfig) -> float | None:
        # Errors are made readable here too, before Hydra adds a line of its own.
        with recorded_failure(), readable_errors(of_job=True):
            check_keys(config, module)
            if name == "train":
                claim_gpus(config)
            # Imported here, so that --help does not wait for torch.
            function = getattr(_imported(f"lkda.commands.{module}"), module)
            if name == "train":
                if not HydraConfig.get().run.dir:
                    raise InputError("hydra.run.dir is empty: give a directory, or leave it out.")
                _check_resume(config)
                with output_that_may_end():
                    summary = function(config, HydraConfig.get().runtime.output_dir)
                return summary.get("val/loss")  # what hydra/sweeper=optuna makes small
            function(config)
            return None

    _replace_what_cannot_be_printed()
    with readable_errors(), plain_warnings():
        _check_words(arguments, command=name)
        if name == "evaluate":
            _check_data_options(arguments)
        register()
        if name == "train":
            check_counts(arguments)
        words = _flags_first(as_typed(arguments, verbatim=_VERBATIM.get(name, ())))
        sys.argv[1:] = [*words, *defaults_of_plugins(words)]
        # The output is flushed here, not when the interpreter exits, because a closed pipe shows only at a flush.
        # `finally` is needed because Hydra itself exits after some of its flags.
        try:
            with _help_as_started(arguments):
                hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=module)(task)()
        finally:
            sys.stdout.flush()


def _imported(name: str) -> ModuleType:
    """The module. The garbage collector does not search through what it imports, which takes seconds: not during the
    import, and not later, because all of it stays until the process ends."""
    if name in sys.modules:  # a sweep runs its jobs in one process: what they leave behind must be found
        return sys.modules[name]
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


def _replace_what_cannot_be_printed() -> None:
    """Print `?` for a character that the encoding of the output lacks, instead of failing in the middle of a text."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")


@contextmanager
def _help_as_started(arguments: Sequence[str]) -> Iterator[None]:
    """If help is requested, print it with commands that start as this process was started (`lkda` or a script)."""
    if not {"-h", "--help"} & set(arguments):
        yield
        return
    text = io.StringIO()
    try:
        with redirect_stdout(text):
            yield
    finally:
        print(with_started_command(text.getvalue()), end="")


def _check_resume(config: DictConfig) -> None:
    """Raises InputError for resume=true with a run directory that is a new one at each start. In processes that another
    one has started, the directory is decided elsewhere."""
    started_by_another = os.environ.get("LOCAL_RANK", "0") != "0"
    if config.resume is True and has_new_directory() and not started_by_another:
        raise InputError(
            "resume=true needs the directory of the run to continue: give hydra.run.dir=DIRECTORY, for example "
            "hydra.run.dir=runs/one. Without it, each run has a new directory."
        )


def _check_words(arguments: Sequence[str], *, command: str) -> None:
    """Raises InputError for a word that is neither key=value nor a flag of Hydra's, such as one word of a prompt that
    the shell has split, or an option with dashes."""
    flags = [option for action in get_args_parser()._actions for option in action.option_strings]
    for before, word, after in zip(["", *arguments], arguments, [*arguments[1:], ""], strict=False):
        value_of_a_flag = before.startswith("-") and "=" not in before
        if word.startswith("--") and not any(flag.startswith(word.partition("=")[0]) for flag in flags):
            key, _, value = word.lstrip("-").partition("=")
            meant = f"{key.replace('-', '_')}={value or after or 'VALUE'}"
            raise InputError(
                f"{word} is not an option: a setting has no dashes, as in {meant}. "
                f"python scripts/{command.replace('-', '_')}.py --help lists what there is."
            )
        if "=" not in word and not word.startswith(("-", "~")) and not value_of_a_flag:
            raise InputError(f"{word!r} is not key=value. {_WITHOUT_A_KEY.get(command, _A_SETTING)}")


def _flags_first(words: Sequence[str]) -> list[str]:
    """The words with the settings behind the flags: argparse does not read settings on both sides of a flag."""
    is_setting = [word.startswith("~") or ("=" in word and not word.startswith("-")) for word in words]
    flags = [word for word, setting in zip(words, is_setting, strict=True) if not setting]
    return flags + [word for word, setting in zip(words, is_setting, strict=True) if setting]


def _check_data_options(arguments: Sequence[str]) -> None:
    """Raises InputError for options of data without a choice of data, because the options that exist depend on it."""
    keys = [word.lstrip("+~").partition("=")[0] for word in arguments]
    options = [key for key in keys if key.startswith("data.")]
    if options and "data" not in keys:
        raise InputError(
            f"{options[0]} needs data=CHOICE beside it, for example data=files. Without it, the data of the run are "
            "used with their recorded options."
        )
