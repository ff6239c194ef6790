"""The precision of a run: the values of trainer.precision, and the data type of each."""

from __future__ import annotations

import torch

from lkda.checks import InputError

# The data type of the operators' inputs. Weights are float64 in 64-true and float32 in the others.
PRECISIONS = {
    "32-true": torch.float32,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
    "64-true": torch.float64,
}
# Those of Lightning's strategy for FSDP2.
FSDP_PRECISIONS = ("bf16-mixed", "32-true")
_SHORT = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed", "64": "64-true"}
_DEFAULT = {"cpu": "32-true", "cuda": "bf16-mixed"}
_HALF_WEIGHTS = "keeps the weights in half precision, where small updates round to nothing"
_REFUSED = {
    "16-true": f"{_HALF_WEIGHTS}, and no loss scale: use 16-mixed or bf16-mixed",
    "bf16-true": f"{_HALF_WEIGHTS}: use bf16-mixed",
    "transformer-engine": "needs layers that lkda's models do not have: use bf16-mixed",
    "transformer-engine-float16": "needs layers that lkda's models do not have: use 16-mixed",
}


def resolve_precision(word: object, device: torch.device) -> str:
    """The name in PRECISIONS that `word` means on `device`. `word` is `auto`, a name in PRECISIONS, or one of
    Lightning's short forms 16, bf16, 32 and 64.

    Raises: InputError for an unknown value, and for one that would train badly or run in another precision. The message
        says what to use.
    """
    given = str(word)
    if given == "auto":
        return _DEFAULT[device.type]
    if given in _REFUSED:
        raise InputError(f"trainer.precision={given} {_REFUSED[given]}.")
    precision = _SHORT.get(given, given)
    if precision not in PRECISIONS:
        raise InputError(f"trainer.precision must be one of auto, {', '.join(PRECISIONS)}, got {word!r}.")
    if precision == "16-mixed" and device.type == "cpu":
        raise InputError("trainer.precision=16-mixed needs a GPU: on a CPU use 32-true or bf16-mixed.")
    return precision
