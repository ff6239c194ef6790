// As lkda/ops/include/numeric.cuh, for a host compiler.
#pragma once
#include "cuda.h"

inline int opaque(int x) { return x; }

struct bfloat16 {
  unsigned short bits;
};
struct float16 {
  unsigned short bits;
};

inline unsigned rounded(bfloat16, float x) {
  const unsigned bits = __float_as_uint(x);
  return std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline unsigned rounded(float16, float x) {
  const _Float16 half = x;
  unsigned short bits;
  memcpy(&bits, &half, 2);
  return bits;
}
inline float widened(bfloat16, unsigned bits) { return __uint_as_float(bits << 16); }
inline float widened(float16, unsigned bits) {
  const unsigned short low = bits;
  _Float16 half;
  memcpy(&half, &low, 2);
  return half;
}
template <class Half>
float2 unpack(Half, unsigned pair) {
  return {widened(Half{}, pair & 0xffff), widened(Half{}, pair >> 16)};
}
template <class Half>
unsigned pack(Half, float2 x) {
  return rounded(Half{}, x.x) | rounded(Half{}, x.y) << 16;
}
inline unsigned product_of_pairs(float16, unsigned a, unsigned b) {
  const float2 x = unpack(float16{}, a), y = unpack(float16{}, b);
  return pack(float16{}, {x.x * y.x, x.y * y.y});
}
inline unsigned max_of_pairs(unsigned a, unsigned b) {
  const short low = max(static_cast<short>(a), static_cast<short>(b)), high = max(static_cast<short>(a >> 16), static_cast<short>(b >> 16));
  return static_cast<unsigned short>(low) | static_cast<unsigned>(static_cast<unsigned short>(high)) << 16;
}
template <class Half>
float2 load_pair(const Half* at) {
  return unpack(Half{}, *reinterpret_cast<const unsigned*>(at));
}
inline float2 load_pair(const float* at) { return *reinterpret_cast<const float2*>(at); }
template <class Half>
void store_pair(Half* at, float2 x) {
  *reinterpret_cast<unsigned*>(at) = pack(Half{}, x);
}
inline void store_pair(float* at, float2 x) { *reinterpret_cast<float2*>(at) = x; }
inline float exp2_fast(float x) { return exp2f(x); }
inline float reciprocal(float x) { return 1.f / x; }
inline float sigmoid(float x) { return reciprocal(1.f + exp2_fast(-1.4426950408889634f * x)); }

template <class Element>
void stream_pair_if(bool wanted, Element* at, float2 x) {
  if (wanted) store_pair(at, x);
}
inline void store_16(void* at, const unsigned (&word)[4]) {
  if (reinterpret_cast<size_t>(at) % 16 != 0) abort();
  memcpy(at, word, 16);
}
inline float max_or_nan(float x, float y) { return x != x || y != y ? x + y : fmaxf(x, y); }
