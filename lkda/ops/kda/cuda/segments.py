"""Cutting a sequence into segments that run in parallel, exactly, where there are too few heads to fill a GPU.

A segment is a run of consecutive chunks. It maps the state that enters it to the state that leaves it by S -> A S + Z.
A first pass finds A and Z of all segments in parallel. Then segments.cu goes through them in order, in float32, and
computes the state that enters each. A second pass computes the outputs of all segments in parallel. In the backward the
gradient of the state takes the same way, dS -> A^T dS + Z', with the same A.
"""

from __future__ import annotations

# Multiprocessors to fill. This is a constant and not the number of the device, since results must not depend on it.
BLOCKS = 132
MIN_CHUNKS = 4  # of a segment
MIN_SEGMENTS = 4  # with fewer, the first pass costs more than running in parallel gains: up to 3 times the work


def segment_count(sequences: int, heads: int, chunks: int) -> int:
    """How many segments to cut each sequence of about `chunks` chunks into; 1 means that it is not cut.

    The count depends on shapes alone, because the bits of the results depend on it.
    """
    count = min(BLOCKS // (sequences * heads), chunks // MIN_CHUNKS)
    return count if count >= MIN_SEGMENTS else 1
