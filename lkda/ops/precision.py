"""The precision of norms, gates and states, which does not depend on that of the linear layers around them."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Converts half precision to float32. float32 and float64 stay as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
