"""What the tests remember of Hydra's compositions is what Hydra itself composes."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from tests.commands import compositions
from tests.commands.small import ROOT

CASES = [
    ("train", ["debug=fast", "mixer=kda", "seed=3"]),
    ("train", ["debug=fast", "mixer=kda", "model.d_model=64", "+model.extra=1", "~callbacks"]),
    ("train", ["experiment=lm_by_mixer", "mixer=kda_mla_3to1", "optimizer=muon", "data.context=128"]),
    ("evaluate", ["ckpt=here", "data=files"]),
    ("benchmark", ["task=op", "ops=[kda]"]),
]


def composed(name: str, overrides: list[str]) -> str:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return OmegaConf.to_yaml(compose(name, overrides=overrides))


@pytest.mark.parametrize(("name", "overrides"), CASES)
def test_it_is_what_hydra_composes(name: str, overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    remembered = [composed(name, overrides) for _ in range(2)]
    monkeypatch.setattr(config_loader_impl, "create_defaults_list", compositions._create)
    monkeypatch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", compositions._merge)
    monkeypatch.setattr(OverridesParser, "parse_rule", compositions._parse)
    assert remembered == [composed(name, overrides)] * 2


def test_one_composition_does_not_change_another() -> None:
    first, other = (composed("train", ["debug=fast", f"model.d_model={width}"]) for width in (64, 32))
    assert first != other
    assert composed("train", ["debug=fast", "model.d_model=64"]) == first
