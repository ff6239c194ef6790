"""The command that a report gives for a run composes the configuration of that run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lkda.commands.run.train_again import train_again
from lkda.old_names import translated
from tests.commands.small import ROOT, composed

RECORDED = ROOT / "docs" / "results" / "small_by_mixer_h200" / "results.json"


def composed_again(command: str) -> dict[str, Any]:
    words = shlex.split(command, comments=True)
    assert words[:2] == ["python", "scripts/train.py"]
    found = OmegaConf.to_container(composed("train", *words[2:]), resolve=True)
    assert isinstance(found, dict)
    return found


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "overrides",
    [
        ("mixer=kda_mla_3to1", "model=small", "model.vocab_size=16384", "data=prose", "optimizer.lr=0.003", "seed=7"),
        ("mixer=softmax", "model=recall", "data=mqar", "data.train=[{length: 64, pairs: 4, examples: 20}]"),
        ("model=tiny", "mixer.pattern=[kda,softmax]", "mixer.name='a name'", "scheduler=cosine", "compile=false"),
    ],
)
def test_the_command_composes_the_same_configuration(overrides: tuple[str, ...]) -> None:
    config = OmegaConf.to_container(composed("train", *overrides), resolve=True)
    assert isinstance(config, dict)
    command = train_again(config)
    assert composed_again(command) == config
    assert "#" not in command


def test_a_recorded_run_is_repeated_with_its_settings() -> None:
    """MLA alone had no positions when it was recorded, and has some by default."""
    configs = {run["config"]["mixer"]["name"]: run["config"] for run in json.loads(Path(RECORDED).read_text())["runs"]}
    assert "rope_base" not in configs["mla"]["mixer"]["mla"]
    for name in ("mla", "kda_mla_3to1"):
        command = train_again(configs[name])
        again, config = composed_again(command), translated(configs[name])
        assert ("mixer.mla.rope_base=null" in command) == (name == "mla")
        assert again["mixer"]["mla"]["rope_base"] is None
        assert again["model"]["vocab_size"] == config["model"]["vocab_size"]
        for section in ("mixer", "scheduler", "optimizer"):
            assert again[section].items() >= config[section].items()


def test_settings_that_there_are_no_more_are_named() -> None:
    config = OmegaConf.to_container(composed("train"), resolve=True)
    assert isinstance(config, dict)
    assert train_again({**config, "model": {**config["model"], "depth": 3}}).endswith(
        "  # settings of another version: model.depth=3"
    )
    two_lines = {**config["model"], "note": "a\nrm b"}  # of which a shell would run the second one
    assert train_again({**config, "model": two_lines}).endswith("  # settings of another version: model.note=a rm b")
