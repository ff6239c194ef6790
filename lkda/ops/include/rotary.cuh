// How threads share the heads of q and k for their rotation, which turns the pairs (x_i, x_{i + HALF}) of a head.
//
// A row is one head of one token. LANES neighbouring lanes share a row. A thread has N neighbouring channels of each half of it.
// Every second block has rows of k, the others of q.
#pragma once
#include "vector.cuh"

using Element = ELEMENT;

constexpr int N = 16 / sizeof(Element), HALF = HEAD_DIM / 2;
constexpr int LANES = HALF / N;
constexpr int THREADS = 256, BLOCK_ROWS = THREADS / LANES;

struct Halves {
  Numbers<N> first, second;
};

__device__ __forceinline__ int channel_of() { return static_cast<int>(threadIdx.x) % LANES * N; }

template <class Number>
__device__ __forceinline__ Halves load_halves(const Number* at) {
  return {load_numbers<N>(at), load_numbers<N>(at + HALF)};
}
__device__ __forceinline__ Halves load_weight(const float* at) { return {load_floats<N>(at), load_floats<N>(at + HALF)}; }

__device__ __forceinline__ void store_halves(Element* at, const Halves& x) {
  store_numbers<N>(at, x.first);
  store_numbers<N>(at + HALF, x.second);
}

// x turned by the angles of one token, or back by them.
template <bool BACK>
__device__ __forceinline__ Halves turned(const Halves& x, const float* cosines, const float* sines) {
  const Numbers<N> c = load_floats<N>(cosines), s = load_floats<N>(sines);
  Halves y;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float a = x.first.x[i], b = BACK ? -x.second.x[i] : x.second.x[i];
    y.first.x[i] = a * c.x[i] - b * s.x[i];
    y.second.x[i] = b * c.x[i] + a * s.x[i];
    if (BACK) y.second.x[i] = -y.second.x[i];
  }
  return y;
}

// 1 / sqrt(mean of x^2 over the row + eps)
__device__ __forceinline__ float inverse_rms(const Halves& x, float eps) {
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < N; ++i) squares = fmaf(x.first.x[i], x.first.x[i], fmaf(x.second.x[i], x.second.x[i], squares));
  return rsqrtf(sum_over_lanes<LANES>(squares) * (1.f / HEAD_DIM) + eps);
}
