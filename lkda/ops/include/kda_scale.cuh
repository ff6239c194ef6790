// Power-of-two scales. For half-precision inputs the tensor cores multiply in float16, which has 11 significand bits (bfloat16
// has 8) but a small range. v and what is linear in v (r, v_new and the state) may have any size, and so may do. So for each head
// of each sequence they are multiplied by a power of two, one for v and one for do, that brings the largest number into a range
// where float16 has digits for everything that counts beside it. q and k have unit norm in KDA and are not scaled. float32
// inputs need no scale; theirs is 1.
#pragma once
#include "kda_chunk.cuh"
#include "vector.cuh"

// max(x, |y|), or x where y is infinite or NaN: the scale of all other numbers must not depend on it.
__device__ __forceinline__ float max_finite(float x, float y) {
  y = fabsf(y);
  return y <= 3.4028234e38f ? fmaxf(x, y) : x;
}

// The largest |x| of a chunk's rows of `values` [rows, H, D], as far as thread number `thread` of `threads` reads them.
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

// Bits that make a float16 or bfloat16 that is infinite or NaN negative if they are added to its absolute value, and no other number.
__device__ __forceinline__ constexpr unsigned above_finite(float16) { return 0x04000400u; }
__device__ __forceinline__ constexpr unsigned above_finite(bfloat16) { return 0x00800080u; }

// As amax_of, for elements of 16 bits, with a fifth of the instructions: the bits of absolute values are compared, two at a time.
template <int THREADS, class Half>
__device__ __forceinline__ float packed_amax_of(const Half* values, const Span& span, int heads, int head, int thread) {
  constexpr int PIECES = D / 8, ROWS = THREADS / PIECES;
  static_assert(THREADS % PIECES == 0 && C % ROWS == 0, "each thread reads one piece of every ROWS-th row");
  const Half* at = values + (static_cast<long long>(span.start) * heads + head) * D + thread % PIECES * 8;
  unsigned largest = above_finite(Half{});
#pragma unroll 8
  for (int first = 0; first < C; first += ROWS) {
    Raw<16> piece;
    fetch(piece, at + static_cast<long long>(min(first + thread / PIECES, span.tokens - 1)) * heads * D);
#pragma unroll
    for (int i = 0; i < 4; ++i) largest = max_of_pairs(largest, (piece.word[i] & 0x7fff7fffu) + above_finite(Half{}));
  }
  const float2 both = unpack(Half{}, largest - above_finite(Half{}));
  return fmaxf(both.x, both.y);
}

// The maximum of x >= 0 over the lanes of a warp.
__device__ __forceinline__ float amax_in_warp(float x) { return __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(x))); }

// The power of 2^STEP that brings `amax` into [2^LOW, 2^(LOW + STEP)).
template <int LOW, int STEP>
__device__ __forceinline__ float scale_for(float amax) {
  const int exponent = min(max(static_cast<int>(__float_as_uint(amax) >> 23) - 127, -96), 96);
  const int steps = (exponent - LOW + 128 * STEP) / STEP - 128;
  return __uint_as_float(static_cast<unsigned>(127 - steps * STEP) << 23);
}

// The scale of v and the state. The steps are wide, so that a later token rarely changes how an earlier one was rounded.
__device__ __forceinline__ float value_scale(float amax) { return scale_for<-6, 12>(amax); }
// The scale of do and the state's gradient, which may grow with every token and so gets room above.
__device__ __forceinline__ float gradient_scale(float amax) { return scale_for<-1, 1>(amax); }

// 1 / scale.
__device__ __forceinline__ float inverse_of(float scale) { return __uint_as_float(0x7f000000u - __float_as_uint(scale)); }

// The largest number of a head of a sequence, computed by one warp: the maximum of its chunks' amax [chunks, H], as kda_amax
// writes them, and of a state [K, V] at one end of the sequence (null for none).
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
