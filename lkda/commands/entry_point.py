"""Where every command begins: the scripts of a checkout, and the console command `lkda`."""

from __future__ import annotations

import difflib
import importlib
import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

import lkda
from lkda.checks import InputError
from lkda.commands.command_line import BAD_INPUT, output_that_may_end, readable_errors
from lkda.commands.config import check_keys
from lkda.commands.invocation import by_this_door
from lkda.commands.overrides import as_typed
from lkda.commands.shipped import CONFIGS

COMMANDS = {
    "train": "train a language model",
    "evaluate": "measure a trained model",
    "generate": "continue a text with a trained model",
    "export": "write a trained model into a directory that other programs load",
    "compare": "compare runs: a table, plots and a page",
    "benchmark": "measure the operators",
    "prepare-data": "prepare the mix of public texts",
}
# Settings whose value is taken as it stands, whatever Hydra's grammar would make of it.
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
    """The command `name`, with the arguments of this process."""
    _run(name, sys.argv[1:])


def _run(name: str, arguments: Sequence[str]) -> None:
    """Compose the configuration of the command `name`, and call its function."""
    module = name.replace("-", "_")

    def task(config: DictConfig) -> None:
        with readable_errors():  # here too, where it speaks before Hydra adds a line of its own
            check_keys(config, module)
            # Imported here, so that --help need not wait for torch.
            function = getattr(importlib.import_module(f"lkda.commands.{module}"), module)
            if name == "train":
                if not HydraConfig.get().run.dir:
                    raise InputError("hydra.run.dir is empty: give a directory, or leave it out.")
                with output_that_may_end():
                    function(config, HydraConfig.get().runtime.output_dir)
            else:
                function(config)

    with readable_errors():
        if name == "generate":
            _check_words(arguments)
        if name == "evaluate":
            _check_data_options(arguments)
        sys.argv[1:] = as_typed(arguments, verbatim=_VERBATIM.get(name, ()))
        # Hydra exits by itself after some of its flags; and a reader that has left the pipe shows when what is printed
        # is flushed, which must not wait for the interpreter's end.
        try:
            with _help_by_this_door(arguments):
                hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=module)(task)()
        finally:
            sys.stdout.flush()


@contextmanager
def _help_by_this_door(arguments: Sequence[str]) -> Iterator[None]:
    """Where help is asked for, it names the commands as this process was started."""
    if not {"-h", "--help"} & set(arguments):
        yield
        return
    text = io.StringIO()
    try:
        with redirect_stdout(text):
            yield
    finally:
        print(by_this_door(text.getvalue()), end="")


def _check_words(arguments: Sequence[str]) -> None:
    """Raises ValueError for a prompt that the shell has cut into words."""
    for before, word in zip(["", *arguments], arguments, strict=False):
        value_of_a_flag = before.startswith("-") and "=" not in before
        if "=" not in word and not word.startswith(("-", "~")) and not value_of_a_flag:
            raise InputError(
                f"{word!r} is not key=value. A prompt of several words stands in quotes, as in "
                "prompt='Fellow citizens'; or give prompt_file=PATH, or pipe the text in."
            )


def _check_data_options(arguments: Sequence[str]) -> None:
    """Raises ValueError for options of data where no data are chosen: there is nothing yet that could have them."""
    keys = [word.lstrip("+~").partition("=")[0] for word in arguments]
    options = [key for key in keys if key.startswith("data.")]
    if options and "data" not in keys:
        raise InputError(
            f"{options[0]} needs data=CHOICE beside it, as data=files: without one, the data of the run are measured "
            "with the options that they had."
        )
