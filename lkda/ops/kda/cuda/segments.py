"""Segments: where there are too few heads to fill a GPU, runs of a sequence's chunks go side by side, exactly.

What a segment does to a state is S -> A S + Z. A first pass of the scan finds A and Z of every segment at once; in
order, and in float32, they tell the state that enters each; a second pass writes the outputs. Backwards, the state's
gradient goes dS -> A^T dS + Z', with the same A.
"""

from __future__ import annotations

# Multiprocessors to fill. A constant, not the device's number: results must not depend on the device.
BLOCKS = 132
FEWEST_CHUNKS = 4  # of a segment
FEWEST = 4  # segments: the first pass does up to three times the work of a scan without segments


def segment_count(sequences: int, heads: int, chunks: int) -> int:
    """Segments of each sequence of about `chunks` chunks. A matter of shapes alone: results depend on it bitwise."""
    count = min(BLOCKS // (sequences * heads), chunks // FEWEST_CHUNKS)
    return count if count >= FEWEST else 1
