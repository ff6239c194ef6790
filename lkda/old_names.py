"""Names that run directories and exported directories of earlier versions hold, and what they are called today."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# `_target_` of the data. Checkpoints hold no module's name.
DATA_MODULES = {
    "lkda.data.text.TextDataModule": "lkda.data.text.datamodule.TextDataModule",
    "lkda.data.hub.HubDataModule": "lkda.data.text.hub.HubDataModule",
    "lkda.data.needle.Needle": "lkda.data.text.needle.Needle",
    "lkda.data.mqar.MQAR": "lkda.data.synthetic.mqar.MQAR",
    "lkda.data.mqar_kimi.KimiMQAR": "lkda.data.synthetic.mqar_kimi.KimiMQAR",
    "lkda.data.palindrome.Palindrome": "lkda.data.synthetic.palindrome.Palindrome",
    "lkda.data.stack.Stack": "lkda.data.synthetic.stack.Stack",
}


def translated(config: Mapping[Any, Any]) -> dict[Any, Any]:
    """A recorded configuration as it would be written today: a copy, equal where it holds no old name."""
    found, data = dict(config), config.get("data")
    if isinstance(data, Mapping) and isinstance(target := data.get("_target_"), str):
        found["data"] = {**data, "_target_": DATA_MODULES.get(target, target)}
    return found
