// As lkda/ops/include/warpgroup.cuh, for a host compiler: products are done at once, and a warp needs no other's.
#pragma once
#include "tile.cuh"

inline void show_to_products() {}
template <int N>
void settle(Sum (&)[N]) {}
inline void open_products() {}
inline void close_products() {}
template <int NEWEST>
void wait_products() {}

template <bool TRANSPOSED>
void product_of_four(Sum* x, const Block<float16>& a, const void* corner) {
  const int lane = threadIdx.x % 32;
  const size_t start = reinterpret_cast<size_t>(corner);
  auto& word = exchange().word;
  for (int i = 0; i < 4; ++i) word[lane][i] = a.word[i];
  warp_barrier();
  auto left = [&](int row, int k) {
    const float2 pair = unpack(float16{}, word[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2]);
    return k % 2 ? pair.y : pair.x;
  };
  auto right = [&](int k, int n) {  // 128-byte swizzle: bits 4-6 of an address are xored with bits 7-9
    const size_t at = start + (TRANSPOSED ? k / 8 * 1024 + k % 8 * 128 + n * 2 : n / 8 * 1024 + n % 8 * 128 + k * 2);
    unsigned short bits;
    memcpy(&bits, reinterpret_cast<const void*>(at ^ (at >> 3 & 0x70)), 2);
    return widened(float16{}, bits);
  };
  for (int t = 0; t < 4; ++t)
    for (int q = 0; q < 4; ++q) {
      float* out[2] = {&x[t].pair[q].x, &x[t].pair[q].y};
      for (int o = 0; o < 2; ++o) {
        double sum = 0;
        for (int k = 0; k < 16; ++k) sum += static_cast<double>(left(quadrant_row(q), k)) * right(k, t * 16 + quadrant_column(q) + o);
        *out[o] += static_cast<float>(sum);
      }
    }
  warp_barrier();
}

inline unsigned transpose(unsigned word) {
  const int lane = threadIdx.x % 32;
  exchange().word[lane][0] = word;
  warp_barrier();
  unsigned other = 0;
  for (int i = 0; i < 2; ++i) {
    const int source_row = lane % 4 * 2 + i, source_column = lane / 4;
    other |= (exchange().word[source_row * 4 + source_column / 2][0] >> source_column % 2 * 16 & 0xffff) << 16 * i;
  }
  warp_barrier();
  return other;
}
