// v~ from the residual r, and what a chunk's own tokens add to its output, for the 16 columns of V of a warp.
#pragma once
#include "kda_warp_state.cuh"

// Computes -v~^T = -r^T + (-r^T B) T~^T from -r^T, in place. x: the C / 16 blocks of [16 of V, C].
__device__ __forceinline__ void solve(Sum (&x)[BLOCKS], const char* pairs, const float* beta) {
  Block<Operand> weighted[BLOCKS];
#pragma unroll
  for (int j = 0; j < BLOCKS; ++j) {
    Sum y = x[j];
    scale_columns(y, beta + j * 16);
    weighted[j] = round_to<Operand>(y);
  }
#pragma unroll
  for (int j = 0; j < BLOCKS; ++j)
#pragma unroll
    for (int i = j; i < BLOCKS; ++i) {
      Right<Operand> t = Square::load_right_transposed(pairs, j * 16, i * 16);
      if (i == j) keep<Triangle::lower, false>(t);
      product(x[i], weighted[j], t);
    }
}

// out^T += v_new^T Aqk^T. out: the C / 16 blocks of [16 of V, C]; written: those of v_new^T.
__device__ __forceinline__ void add_within_chunk(Sum (&out)[BLOCKS], const Block<Operand> (&written)[BLOCKS], const char* pairs) {
#pragma unroll
  for (int t = 0; t < BLOCKS; ++t)
#pragma unroll
    for (int j = 0; j <= t; ++j) {
      Right<Operand> p = Square::load_right(pairs, t * 16, j * 16);
      if (j == t) keep<Triangle::lower, true>(p);
      product(out[t], written[j], p);
    }
}
