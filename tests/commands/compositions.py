"""Hydra's part of a command's start, once for each choice of configuration files instead of once for each start.

Hydra reads the chosen YAML files and merges them. Then it sets what the command line gives besides, most of all the
paths, which differ from test to test. The first half takes most of the time of a short run, and depends on nothing but
the files and the choice. So it is remembered here, for the files of the checkout alone. Errors are not.
"""

from __future__ import annotations

import copy
from typing import Any

from hydra._internal import config_loader_impl, defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.defaults_list import DefaultsList, Overrides
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

_create = defaults_list.create_defaults_list
_merge = ConfigLoaderImpl._compose_config_from_defaults_list
_parse = OverridesParser.parse_rule
_chosen: dict[tuple[Any, ...], DefaultsList] = {}
_merged: dict[int, DictConfig] = {}  # by the id of its list in `_chosen`
_parsed: dict[tuple[str, str], Any] = {}


def _of_the_checkout(repo: IConfigRepository, files: str) -> bool:
    places = {(source.scheme(), source.path) for source in repo.get_sources()}
    return places <= {("file", files), ("pkg", "hydra.conf"), ("structured", "")}


def remember(files: str) -> None:
    """From now on in this process, for compositions of the YAML files of that directory."""

    def create(
        repo: IConfigRepository, config_name: str | None, overrides_list: list[Override], **options: bool
    ) -> DefaultsList:
        if not _of_the_checkout(repo, files):
            return _create(repo, config_name, overrides_list, **options)
        others = Overrides(repo=repo, overrides_list=overrides_list).config_overrides
        choices = tuple(one.input_line for one in overrides_list if all(one is not other for other in others))
        key = (config_name, choices, *sorted(options.items()))
        known = _chosen.get(key)
        if known is None or id(known.defaults) not in _merged:
            _chosen[key] = known = _create(repo, config_name, overrides_list, **options)
        return DefaultsList(known.defaults, known.defaults_tree, others, known.overrides)

    def merge(self: ConfigLoaderImpl, defaults: list[Any], repo: IConfigRepository) -> DictConfig:
        if id(defaults) not in _merged:
            merged = _merge(self, defaults, repo)
            if not any(defaults is known.defaults for known in _chosen.values()):
                return merged
            _merged[id(defaults)] = merged
        return copy.deepcopy(_merged[id(defaults)])

    def parse(self: OverridesParser, s: str, rule_name: str) -> Any:
        key = (s, rule_name)
        if key not in _parsed:
            _parsed[key] = _parse(self, s, rule_name)
        return copy.deepcopy(_parsed[key])

    config_loader_impl.create_defaults_list = create
    ConfigLoaderImpl._compose_config_from_defaults_list = merge  # type: ignore[method-assign]
    OverridesParser.parse_rule = parse  # type: ignore[method-assign]
