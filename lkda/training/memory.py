"""How the C library manages the memory of a training process on a CPU."""

from __future__ import annotations

import ctypes

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST = 2**30


def keep_freed_memory() -> bool:
    """Has the C library keep memory that is freed, for the next allocation, instead of returning it to the system.

    A training step allocates and frees the same tensors again and again. Memory that was returned comes back page by
    page, each filled with zeros: in small models that takes a sixth of a step. Only glibc has the setting. Returns
    whether it was set.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST) and mallopt(_TRIM_THRESHOLD, 2 * _LARGEST - 1))
