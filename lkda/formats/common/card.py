"""The model card: README.md of an exported directory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lkda.checks import InputError
from lkda.formats.common.layers import layer_names
from lkda.models.lm import LanguageModel
from lkda.records import check_yaml, read_record

_CONFIGURATION = "## Configuration"


def model_card(name: str, model: LanguageModel, *, usage: str, dtype: str, run: Mapping[str, Any]) -> str:
    """The Markdown of the card: the model, how to load it, how it was trained, and what was measured.

    Args:
        name: the name of the directory.
        usage: Python code that loads the model.
        dtype: of the weights as written.
        run: {"training": {name: value}, "results": {name: value}, "config": dict}, each optional.
    """
    parts = [
        "---\npipeline_tag: text-generation\ntags:\n- lkda\n---",
        f"# {name}",
        "A language model trained with lkda, a framework that compares sequence mixers in otherwise equal models.",
        "## Model",
        _table(_model_metadata(model, dtype)),
        "## How to load it",
        f"```python\n{usage}\n```",
        "## Training",
        _table(run["training"]) if run.get("training") else "Nothing is recorded about the run.",
        "## Results",
        _table(run["results"]) if run.get("results") else "Nothing was measured.",
        _CONFIGURATION,
        _yaml(run.get("config") or {"model": {k: v for k, v in model.config.items() if k != "backend"}}),
    ]
    return "\n\n".join(parts) + "\n"


def recorded_config(directory: str | Path) -> dict[str, Any]:
    """The configuration in the model card of an exported directory; {} where there is no card that lkda wrote.

    It is the configuration of the run, as far as that was known.
    Raises: ValueError where the configuration in the card cannot be read.
    """
    path = Path(directory) / "README.md"
    try:
        text = read_record(path)
    except (OSError, UnicodeDecodeError):
        return {}
    match = re.search(rf"^{_CONFIGURATION}\n\n```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    try:
        if match:
            check_yaml(match[1], source=path)
        config = yaml.safe_load(match[1]) if match else {}
    except (yaml.YAMLError, RecursionError) as error:
        where = " ".join(str(error).split())
        raise InputError(f"the configuration in {path} is not YAML ({where}): correct it, or export again.") from error
    return config if isinstance(config, dict) else {}


def _model_metadata(model: LanguageModel, dtype: str) -> dict[str, Any]:
    config = model.config
    metadata = {
        "layers": " ".join(layer_names(config)),
        "width": config["d_model"],
        "heads": f"{config['mixer']['num_heads']} of {config['d_model'] // config['mixer']['num_heads']}",
        "vocabulary": config["vocab_size"],
        "parameters": model.num_parameters(),
        "parameters without the embedding": model.num_parameters(embedding=False),
        "weights": dtype,
    }
    if config["context"]:
        metadata["context"] = config["context"]
        metadata["bytes of state at that length"] = model.state_bytes(config["context"])
    return metadata


def _table(entries: Mapping[str, Any]) -> str:
    rows = [f"| {key} | {_shown(value)} |" for key, value in entries.items() if value is not None]
    return "\n".join(["| | |", "| --- | --- |", *rows])


def _shown(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def _yaml(config: Mapping[str, Any]) -> str:
    return f"```yaml\n{yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)}```"
