// Units. Tensor cores multiply halves in float16, whose eleven digits are three more than bfloat16's and whose exponents are
// few. So what is linear in v (R, N and the state) is computed in multiples of one power of two a head of a sequence, and what
// is linear in dO in multiples of another: the head's largest numbers lie where float16 has digits for all that count beside
// them. q and k, of unit norm in KDA, are taken as they are; float32 inputs need no units, theirs are 1.
#pragma once
#include "kda_chunk.cuh"
#include "vector.cuh"

// The greater of x and |y|; x where y is no finite number, of which the others' unit shall not depend.
__device__ __forceinline__ float larger(float x, float y) {
  y = fabsf(y);
  return y <= 3.4028234e38f ? fmaxf(x, y) : x;
}

// Of a chunk's rows of `values` [rows, H, D], the part of one of `threads` threads.
__device__ __forceinline__ float largest_of(const Element* values, const Span& span, int heads, int head, int thread, int threads) {
  constexpr int PIECE = 16 / sizeof(Element), PIECES = D / PIECE;
  float x = 0.f;
#pragma unroll 8
  for (int n = thread; n < C * PIECES; n += threads) {
    const long long row = span.start + min(n / PIECES, span.tokens - 1);
    const Numbers<PIECE> piece = load_numbers<PIECE>(values + (row * heads + head) * D + n % PIECES * PIECE);
#pragma unroll
    for (int i = 0; i < PIECE; ++i) x = larger(x, piece.x[i]);
  }
  return x;
}

// x, not negative, of all lanes.
__device__ __forceinline__ float largest_in_warp(float x) { return __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(x))); }

// The power of two that brings `largest` into [2^LOW, 2^(LOW + STEP)), itself a power of 2^STEP.
template <int LOW, int STEP>
__device__ __forceinline__ float unit_for(float largest) {
  const int exponent = min(max(static_cast<int>(__float_as_uint(largest) >> 23) - 127, -96), 96);
  const int steps = (exponent - LOW + 128 * STEP) / STEP - 128;
  return __uint_as_float(static_cast<unsigned>(127 - steps * STEP) << 23);
}

// Of v and the state. Steps are wide: what comes late in a sequence is not to show in how its beginning was rounded.
__device__ __forceinline__ float unit_of_values(float largest) { return unit_for<-6, 12>(largest); }
// Of dO and the state's gradient, which may grow with every token: room above.
__device__ __forceinline__ float unit_of_gradients(float largest) { return unit_for<-1, 1>(largest); }

// 1 / unit.
__device__ __forceinline__ float inverse_of(float unit) { return __uint_as_float(0x7f000000u - __float_as_uint(unit)); }

// The largest number of a head of a sequence: of what kda_largest or kda_prepare found in its chunks, [chunks, H], and of the
// state at its end, [K, V] or null. A warp.
__device__ __forceinline__ float largest_of_sequence(const float* of_chunks, const Sequence& sequence, int heads, int head, const float* state) {
  float x = 0.f;
  const int chunks = (sequence.length + C - 1) / C;
#pragma unroll 4
  for (int m = lane_id(); m < chunks; m += 32) x = fmaxf(x, of_chunks[static_cast<long long>(sequence.first_chunk + m) * heads + head]);
  if (state != nullptr) {
#pragma unroll 4
    for (int i = lane_id(); i < D * D; i += 32) x = larger(x, state[i]);
  }
  return largest_in_warp(x);
}
