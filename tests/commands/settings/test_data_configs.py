"""Every data configuration names a class that takes each of its options."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
from hydra.utils import get_class

from lkda.commands.settings.config import resolve
from lkda.commands.settings.data_options import build_data, check_data_options
from tests.commands.small import ROOT, composed

NAMES = sorted(path.stem for path in (ROOT / "configs" / "data").glob("*.yaml"))


@pytest.fixture
def required(tmp_path: Path) -> dict[str, list[str]]:
    """What a user must give, by configuration."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text(json.dumps({"text": "some words"}) + "\n")
    paths = [f"data.paths=[{tmp_path}/set]"]
    return {"hub": [f"data.name={tmp_path}/set"]} | dict.fromkeys(("files", "tokens", "completions"), paths)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_of_a_configuration_is_taken_by_its_class(name, required):
    data = resolve(composed("train", f"data={name}", *required.get(name, [])))["data"]
    check_data_options(data)
    made = build_data(data)
    assert made.batch_size >= 1
    assert made.context >= 1


@pytest.mark.parametrize("name", NAMES)
def test_a_class_names_its_options_and_a_configuration_lists_them(name):
    """No option is hidden where the check of the command line does not see it."""
    data = composed("train", f"data={name}").data
    parameters = inspect.signature(get_class(data._target_)).parameters.values()
    assert {parameter.kind for parameter in parameters} == {inspect.Parameter.KEYWORD_ONLY}
    listed = {str(key) for key in data} - {"_target_"}
    assert listed <= {parameter.name for parameter in parameters}
    assert {parameter.name for parameter in parameters if parameter.default is parameter.empty} <= listed


def test_an_option_that_there_is_not_is_refused():
    data = resolve(composed("train", "data=hub", "+data.contxt=3", "data.name=a/b"))["data"]
    with pytest.raises(ValueError, match=r"data\.contxt is not an option of HubDataModule, which takes name, context"):
        check_data_options(data)


def test_an_option_that_is_missing_is_named():
    data = {"_target_": "lkda.data.text.hub.HubDataModule", "context": 8, "batch_size": 2}
    with pytest.raises(ValueError, match=r"data\.name is missing, which HubDataModule needs: choose the data= that"):
        check_data_options(data)
