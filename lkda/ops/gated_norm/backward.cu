// Gradients of x, gate and weight. With n = x r, r = 1 / sqrt(mean x^2 + eps), s = sigmoid(gate), h = dy s:
//
//     dw = sum over rows of h n        dx = r (h w - n mean(h w n))        dgate = dy n w s (1 - s)
//
// A block takes every gridDim-th group of rows and sums dw in a fixed order. column_sums.cu adds the blocks' partials
// [blocks, HEAD_DIM].
#include "vector.cuh"

using Element = ELEMENT;

constexpr int N = 16 / sizeof(Element);  // channels per thread
constexpr int LANES = HEAD_DIM / N;
constexpr int THREADS = 256, BLOCK_ROWS = THREADS / LANES, ROWS = 2;

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    gated_norm_backward(const Element* dy, const Element* x, const Element* gate, const float* weight, Element* dx,
                        Element* dgate, float* partials, int rows, float eps) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const int lane = threadIdx.x % LANES, channel = lane * N;
  const Numbers<N> w = load_floats<N>(weight + channel);
  Numbers<N> dw;
#pragma unroll
  for (int i = 0; i < N; ++i) dw.x[i] = 0.f;

  for (int first = blockIdx.x * BLOCK_ROWS * ROWS; first < rows; first += gridDim.x * BLOCK_ROWS * ROWS) {
    Raw<16> upper[ROWS], values[ROWS], gates[ROWS];
#pragma unroll
    for (int j = 0; j < ROWS; ++j) {
      const int row = first + j * BLOCK_ROWS + threadIdx.x / LANES;
      const long long at = static_cast<long long>(row < rows ? row : 0) * HEAD_DIM + channel;
      fetch(upper[j], dy + at);
      fetch(values[j], x + at);
      if (gate != nullptr) fetch(gates[j], gate + at);
    }
#pragma unroll
    for (int j = 0; j < ROWS; ++j) {
      const int row = first + j * BLOCK_ROWS + threadIdx.x / LANES;
      const bool mine = row < rows;
      const long long at = static_cast<long long>(row) * HEAD_DIM + channel;
      Numbers<N> value = numbers<N>(Element{}, values[j]), h = numbers<N>(Element{}, upper[j]);
      float squares = 0.f;
#pragma unroll
      for (int i = 0; i < N; ++i) squares = fmaf(value.x[i], value.x[i], squares);
      const float r = rsqrtf(sum_over_lanes<LANES>(squares) * (1.f / HEAD_DIM) + eps);
#pragma unroll
      for (int i = 0; i < N; ++i) value.x[i] *= r;
      if (gate != nullptr) {
        Numbers<N> open = numbers<N>(Element{}, gates[j]);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const float s = sigmoid(open.x[i]);
          h.x[i] *= s;
          open.x[i] = h.x[i] * value.x[i] * w.x[i] * (1.f - s);
        }
        if (mine) store_numbers<N>(dgate + at, open);
      }
      float along = 0.f;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (mine) dw.x[i] = fmaf(h.x[i], value.x[i], dw.x[i]);
        h.x[i] *= w.x[i];
        along = fmaf(h.x[i], value.x[i], along);
      }
      along = sum_over_lanes<LANES>(along) * (1.f / HEAD_DIM);
#pragma unroll
      for (int i = 0; i < N; ++i) h.x[i] = r * fmaf(-along, value.x[i], h.x[i]);
      if (mine) store_numbers<N>(dx + at, h);
    }
  }

  float* shared = reinterpret_cast<float*>(shared_memory);  // [BLOCK_ROWS][HEAD_DIM]
  store_floats<N>(shared + threadIdx.x / LANES * HEAD_DIM + channel, dw);
  __syncthreads();
  if (threadIdx.x >= HEAD_DIM) return;
  float sum = 0.f;
#pragma unroll 8
  for (int other = 0; other < BLOCK_ROWS; ++other) sum += shared[other * HEAD_DIM + threadIdx.x];
  partials[blockIdx.x * HEAD_DIM + threadIdx.x] = sum;
}
