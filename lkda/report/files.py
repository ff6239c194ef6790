"""Writing results: whole, or not at all."""

from lkda.io import write_atomically

__all__ = ["write_atomically"]
