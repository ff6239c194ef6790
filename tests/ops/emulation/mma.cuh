// As lkda/ops/include/mma.cuh, for a host compiler: each lane computes its own part from what the others show.
#pragma once
#include "async_copy.cuh"
#include "numeric.cuh"

struct tf32 {
  float value;
};

inline void load_matrices_either(unsigned (&word)[4], const void* row, bool transposed) {
  const int lane = threadIdx.x % 32, r = lane / 4, c = 2 * (lane % 4);
  exchange().address[lane] = row;
  warp_barrier();
  for (int matrix = 0; matrix < 4; ++matrix) {
    unsigned short pair[2];
    for (int i = 0; i < 2; ++i) {
      const int source = transposed ? c + i : r, element = transposed ? r : c + i;
      pair[i] = static_cast<const unsigned short*>(exchange().address[matrix * 8 + source])[element];
    }
    memcpy(&word[matrix], pair, 4);
  }
  warp_barrier();
}
inline void load_matrices(unsigned (&word)[4], const void* row) { load_matrices_either(word, row, false); }
inline void load_matrices_transposed(unsigned (&word)[4], const void* row) { load_matrices_either(word, row, true); }

template <class Half>
void multiply(Half, float2& top, float2& bottom, const unsigned (&a)[4], unsigned b0, unsigned b1) {
  const int lane = threadIdx.x % 32;
  auto& word = exchange().word;
  for (int i = 0; i < 4; ++i) word[lane][i] = a[i];
  word[lane][4] = b0;
  word[lane][5] = b1;
  warp_barrier();
  float* out[4] = {&top.x, &top.y, &bottom.x, &bottom.y};
  for (int o = 0; o < 4; ++o) {
    const int row = lane / 4 * 4, column = (2 * (lane % 4) + o % 2) * 4;
    double sum = 0;
    for (int half = 0; half < 2; ++half)
      for (int pair = 0; pair < 4; ++pair) {
        const float2 x = unpack(Half{}, word[row + pair][o / 2 + 2 * half]), y = unpack(Half{}, word[column + pair][4 + half]);
        sum += static_cast<double>(x.x) * y.x + static_cast<double>(x.y) * y.y;
      }
    *out[o] += static_cast<float>(sum);
  }
  warp_barrier();
}

inline void multiply(tf32, float2& top, float2& bottom, float2 a_top, float2 a_bottom, float2 b) {
  const int lane = threadIdx.x % 32;
  auto& word = exchange().word;
  const float mine[6] = {a_top.x, a_top.y, a_bottom.x, a_bottom.y, b.x, b.y};
  memcpy(word[lane], mine, sizeof(mine));
  warp_barrier();
  float* out[4] = {&top.x, &top.y, &bottom.x, &bottom.y};
  for (int o = 0; o < 4; ++o) {
    const int row = lane / 4 * 4, column = (2 * (lane % 4) + o % 2) * 4;
    double sum = 0;
    for (int pair = 0; pair < 4; ++pair)
      for (int i = 0; i < 2; ++i)
        sum += static_cast<double>(__uint_as_float(word[row + pair][o / 2 * 2 + i])) * __uint_as_float(word[column + pair][4 + i]);
    *out[o] += static_cast<float>(sum);
  }
  warp_barrier();
}

inline float round_to_tf32(float x) { return std::isfinite(x) ? __uint_as_float((__float_as_uint(x) + 0x1000) & ~0x1fffu) : x; }
