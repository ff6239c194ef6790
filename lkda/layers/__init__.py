"""The linear-attention layers for models of your own: lkda's mixers, with padding masks."""

from lkda.layers.masked import KimiDeltaAttention, SimplifiedAttention

__all__ = ["KimiDeltaAttention", "SimplifiedAttention"]
