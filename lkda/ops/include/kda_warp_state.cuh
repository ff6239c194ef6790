// A warp's part of a state: 16 columns of V and all of K, transposed: S^T [16 of V, K], float32 in registers.
#pragma once
#include "kda_scale.cuh"
#if WARPGROUPS
#include "warpgroup.cuh"
#endif

constexpr int STEPS = D / 16;  // 16-channel blocks of K

#if WARPGROUPS
// x[V, tokens] += left rows^T, summed over all channels. rows: Rows in shared memory. left: [16 of V, channels].
__device__ __forceinline__ void products_over_channels(Sum (&x)[BLOCKS], const Block<Operand> (&left)[STEPS], const char* rows) {
  static_assert(BLOCKS == 4 && STEPS % 4 == 0, "64 tokens, panels of 64 channels");
#pragma unroll
  for (int i = 0; i < STEPS; ++i) product_of_four<false>(x, left[i], Rows::at(rows, 0, i * 16));
}
// x[V, channels] += left rows, summed over all tokens. left: [16 of V, tokens].
__device__ __forceinline__ void products_over_tokens(Sum (&x)[STEPS], const Block<Operand> (&left)[BLOCKS], const char* rows) {
#pragma unroll
  for (int t = 0; t < BLOCKS; ++t)
#pragma unroll
    for (int i = 0; i < STEPS; i += 4) product_of_four<true>(x + i, left[t], Rows::at(rows, t * 16, i * 16));
}
#endif

// For 32-bit operands, no load may be moved up past this point: they take so many registers that the kernel would spill.
__device__ __forceinline__ void pace() {
  if constexpr (sizeof(Operand) == 4) __syncwarp();
}

// A 16x16 block of the identity.
__device__ __forceinline__ void unit_diagonal(Sum& sum) {
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const int right = quadrant_column(q) - quadrant_row(q);
    sum.pair[q] = make_float2(right == 0 ? 1.f : 0.f, right == -1 ? 1.f : 0.f);
  }
}

// Reads S^T from S times `factor`, or writes it back. S is [K, V] float32; `at` is &S[0][first column of the warp].
__device__ __forceinline__ void read_state(Sum (&state)[STEPS], const float* at, float factor) {
#pragma unroll
  for (int n = 0; n < STEPS; ++n)
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const float* x = at + (n * 16 + quadrant_column(q)) * D + quadrant_row(q);
      state[n].pair[q] = make_float2(factor * x[0], factor * x[D]);
    }
}
__device__ __forceinline__ void write_state(const Sum (&state)[STEPS], float* at, float factor) {
#pragma unroll
  for (int n = 0; n < STEPS; ++n)
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      float* x = at + (n * 16 + quadrant_column(q)) * D + quadrant_row(q);
      x[0] = factor * state[n].pair[q].x;
      x[D] = factor * state[n].pair[q].y;
    }
}

// Writes S^T to a matrix [V, K]; `at` is &matrix[first row of the warp][0].
__device__ __forceinline__ void write_transposed(const Sum (&state)[STEPS], float* at) {
#pragma unroll
  for (int n = 0; n < STEPS; ++n)
#pragma unroll
    for (int q = 0; q < 4; ++q)
      *reinterpret_cast<float2*>(at + quadrant_row(q) * D + n * 16 + quadrant_column(q)) = state[n].pair[q];
}

// Writes a block of a matrix that lies in global memory as the image of a tile.
template <class Image, class T>
__device__ __forceinline__ void write_block(char* image, int row, int column, const Block<T>& block) {
#pragma unroll
  for (int q = 0; q < 4; ++q) store_quadrant(Image::at(image, row + quadrant_row(q), column + quadrant_column(q)), block, q);
}

// Saves the warp's 16 rows of a state in float16, scaled so that the largest number lies in [2^14, 2^15).
__device__ __forceinline__ void save_state(char* saved, int row, const Sum (&state)[STEPS]) {
  float amax = 0.f;
#pragma unroll
  for (int i = 0; i < STEPS; ++i)
#pragma unroll
    for (int q = 0; q < 4; ++q) amax = fmaxf(amax, fmaxf(fabsf(state[i].pair[q].x), fabsf(state[i].pair[q].y)));
  const unsigned exponent = max(__reduce_max_sync(0xffffffffu, __float_as_uint(amax)) >> 23, 15u);
  const float scale = __uint_as_float((268u - exponent) << 23);
#pragma unroll
  for (int i = 0; i < STEPS; ++i) {
    Sum scaled;
#pragma unroll
    for (int q = 0; q < 4; ++q) scaled.pair[q] = make_float2(scale * state[i].pair[q].x, scale * state[i].pair[q].y);
    write_block<State>(saved, WARPGROUPS ? row : opaque(row), i * 16, round_to<Operand>(scaled));
  }
  if (lane_id() < SavedState::REPEATS) reinterpret_cast<float*>(saved + SavedState::scales)[row / 16 * SavedState::REPEATS + lane_id()] = __uint_as_float((exponent - 14u) << 23);
}

// x[.][t] *= factor[t], one factor for each column of a block.
__device__ __forceinline__ void scale_columns(Sum& x, const float* factor) {
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const float2 f = *reinterpret_cast<const float2*>(factor + quadrant_column(q));
    x.pair[q] = make_float2(x.pair[q].x * f.x, x.pair[q].y * f.y);
  }
}

__device__ __forceinline__ void scale_all(Sum& x, float factor) {
#pragma unroll
  for (int q = 0; q < 4; ++q) x.pair[q] = make_float2(factor * x.pair[q].x, factor * x.pair[q].y);
}
