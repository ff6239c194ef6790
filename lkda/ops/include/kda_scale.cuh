// Units. Tensor cores multiply halves in float16, whose eleven digits are three more than bfloat16's and whose exponents are
// few. So what is linear in v (R, N and the state) is computed in multiples of one power of two a head of a sequence, and what
// is linear in dO in multiples of another: the head's amax numbers lie where float16 has digits for all that count beside
// them. q and k, of scale norm in KDA, are taken as they are; float32 inputs need no units, theirs are 1.
#pragma once
#include "kda_chunk.cuh"
#include "vector.cuh"

// The greater of x and |y|; x where y is no finite number, of which the others' scale shall not depend.
__device__ __forceinline__ float max_finite(float x, float y) {
  y = fabsf(y);
  return y <= 3.4028234e38f ? fmaxf(x, y) : x;
}

// Of a chunk's rows of `values` [rows, H, D], the part of one of `threads` threads.
__device__ __forceinline__ float amax_of(const Element* values, const Span& span, int heads, int head, int thread, int threads) {
  constexpr int PIECE = 16 / sizeof(Element), PIECES = D / PIECE;
  float x = 0.f;
#pragma unroll 8
  for (int n = thread; n < C * PIECES; n += threads) {
    const long long row = span.start + min(n / PIECES, span.tokens - 1);
    const Numbers<PIECE> piece = load_numbers<PIECE>(values + (row * heads + head) * D + n % PIECES * PIECE);
#pragma unroll
    for (int i = 0; i < PIECE; ++i) x = max_finite(x, piece.x[i]);
  }
  return x;
}

// x, not negative, of all lanes.
__device__ __forceinline__ float amax_in_warp(float x) { return __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(x))); }

// The power of two that brings `amax` into [2^LOW, 2^(LOW + STEP)), itself a power of 2^STEP.
template <int LOW, int STEP>
__device__ __forceinline__ float scale_for(float amax) {
  const int exponent = min(max(static_cast<int>(__float_as_uint(amax) >> 23) - 127, -96), 96);
  const int steps = (exponent - LOW + 128 * STEP) / STEP - 128;
  return __uint_as_float(static_cast<unsigned>(127 - steps * STEP) << 23);
}

// Of v and the state. Steps are wide: what comes late in a sequence is not to show in how its beginning was rounded.
__device__ __forceinline__ float value_scale(float amax) { return scale_for<-6, 12>(amax); }
// Of dO and the state's gradient, which may grow with every token: room above.
__device__ __forceinline__ float gradient_scale(float amax) { return scale_for<-1, 1>(amax); }

// 1 / scale.
__device__ __forceinline__ float inverse_of(float scale) { return __uint_as_float(0x7f000000u - __float_as_uint(scale)); }

// The amax number of a head of a sequence: of what kda_amax or kda_intra_chunk_fwd found in its chunks, [chunks, H], and of the
// state at its end, [K, V] or null. A warp.
__device__ __forceinline__ float amax_of_sequence(const float* of_chunks, const Sequence& sequence, int heads, int head, const float* state) {
  float x = 0.f;
  const int chunks = (sequence.length + C - 1) / C;
#pragma unroll 4
  for (int m = lane_id(); m < chunks; m += 32) x = fmaxf(x, of_chunks[static_cast<long long>(sequence.first_chunk + m) * heads + head]);
  if (state != nullptr) {
#pragma unroll 4
    for (int i = lane_id(); i < D * D; i += 32) x = max_finite(x, state[i]);
  }
  return amax_in_warp(x);
}
