"""Cutting a sequence into segments that run in parallel, exactly, where there are too few heads to fill a GPU.

A segment is a run of consecutive chunks. It maps the state that enters it to the state that leaves it by S -> A S + Z.
A first pass finds A and Z of all segments in parallel. Then segments.cu goes through them in order, in float32, and
computes the state that enters each. A second pass computes the outputs of all segments in parallel. In the backward the
gradient of the state takes the same way, dS -> A^T dS + Z', with the same A.

Where a chunk of the segment forgets the state that enters it (kda_forgetting.cuh), A is 0 and Z needs this chunk and
the later ones alone. So with such gates the first pass costs a chunk per segment. Segments that are worth it only then
are optional: the first pass finds out, and where no chunk forgets, the second does not cut the sequence.
"""

from __future__ import annotations

# Multiprocessors to fill. This is a constant and not the number of the device, since results must not depend on it.
BLOCKS = 132
MIN_CHUNKS = 4  # of a segment
MIN_SEGMENTS = 4  # with fewer, the first pass costs more than running in parallel gains: up to 3 times the work
MIN_OPTIONAL_CHUNKS = 8  # of an optional segment: the first pass takes about as long as two or three chunks
MAX_OPTIONAL_HEAD = 64  # a wider head has two blocks, so that it rarely leaves a multiprocessor without one


def segment_count(sequences: int, heads: int, chunks: int) -> int:
    """How many segments to cut each sequence of about `chunks` chunks into; 1 means that it is not cut.

    The count depends on shapes alone, because the bits of the results depend on it.
    """
    count = min(BLOCKS // (sequences * heads), chunks // MIN_CHUNKS)
    return count if count >= MIN_SEGMENTS else 1


def optional_segment_count(sequences: int, heads: int, chunks: int, D: int) -> int:
    """How many optional segments to cut each sequence into that `segment_count` does not cut; 1 for none.

    It depends on shapes alone, because the host does not know the gates. No bit of the results depends on it.
    """
    if D > MAX_OPTIONAL_HEAD:
        return 1
    return max(1, min(BLOCKS // (sequences * heads), chunks // MIN_OPTIONAL_CHUNKS))
