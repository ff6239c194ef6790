// Gradients of q, k and the weights of their norms, from those of the turned heads. The gradient dm of a normalised head is that of the
// turned one, turned back. With h = dm w and m = x r, r = 1 / sqrt(mean of x^2 + eps):
//
//     dx = r (h - m mean(h m))        dw = sum over rows of dm m
//
// Without weights, dx is dm, and q and k are not read. The gradients are contiguous; otherwise the arguments are those of the forward.
// A block takes every (gridDim / 2)-th group of the rows of q or k and sums dw in a fixed order. column_sums.cu adds the partial sums
// [gridDim / 2, 2, HEAD_DIM].
#include "rotary.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
    rotary_backward(const Element* dq_turned, const Element* dk_turned, const Element* q, const Element* k, const float* cosines,
                    const float* sines, const float* q_weight, const float* k_weight, Element* dq, Element* dk, float* partials,
                    int tokens, int q_heads, int k_heads, int table, long long q_stride, long long k_stride, float eps) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const bool of_k = blockIdx.x % 2;
  const int heads = of_k ? k_heads : q_heads, rows = tokens * heads;
  const Element *upper = of_k ? dk_turned : dq_turned, *inputs = of_k ? k : q;
  Element* to = of_k ? dk : dq;
  const float* weight = of_k ? k_weight : q_weight;
  const long long stride = of_k ? k_stride : q_stride;
  const int group = blockIdx.x / 2, groups = gridDim.x / 2;
  Halves dw;
#pragma unroll
  for (int i = 0; i < N; ++i) dw.first.x[i] = dw.second.x[i] = 0.f;

  for (int first = group * BLOCK_ROWS; first < rows; first += groups * BLOCK_ROWS) {
    const int row = first + threadIdx.x / LANES, safe = row < rows ? row : 0;
    const int angles = safe / heads % table * HALF + channel_of();
    const long long at = static_cast<long long>(safe) * HEAD_DIM + channel_of();
    Halves dx = load_halves(upper + at);
    if (weight == nullptr) {
      if (row < rows) store_halves(to + at, turned<true>(dx, cosines + angles, sines + angles));
      continue;
    }
    Halves m = load_halves(inputs + safe / heads * stride + safe % heads * HEAD_DIM + channel_of());
    dx = turned<true>(dx, cosines + angles, sines + angles);
    const Halves w = load_weight(weight + channel_of());
    const float r = inverse_rms(m, eps);
    float along = 0.f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      m.first.x[i] *= r;
      m.second.x[i] *= r;
      if (row < rows) {
        dw.first.x[i] = fmaf(dx.first.x[i], m.first.x[i], dw.first.x[i]);
        dw.second.x[i] = fmaf(dx.second.x[i], m.second.x[i], dw.second.x[i]);
      }
      dx.first.x[i] *= w.first.x[i];
      dx.second.x[i] *= w.second.x[i];
      along = fmaf(dx.first.x[i], m.first.x[i], fmaf(dx.second.x[i], m.second.x[i], along));
    }
    along = sum_over_lanes<LANES>(along) * (1.f / HEAD_DIM);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      dx.first.x[i] = r * fmaf(-along, m.first.x[i], dx.first.x[i]);
      dx.second.x[i] = r * fmaf(-along, m.second.x[i], dx.second.x[i]);
    }
    if (row < rows) store_halves(to + at, dx);
  }

  if (weight == nullptr) return;
  float* shared = reinterpret_cast<float*>(shared_memory);  // [BLOCK_ROWS][HEAD_DIM]
  float* mine = shared + threadIdx.x / LANES * HEAD_DIM + channel_of();
  store_floats<N>(mine, dw.first);
  store_floats<N>(mine + HALF, dw.second);
  __syncthreads();
  if (threadIdx.x >= HEAD_DIM) return;
  float sum = 0.f;
#pragma unroll 8
  for (int other = 0; other < BLOCK_ROWS; ++other) sum += shared[other * HEAD_DIM + threadIdx.x];
  partials[(group * 2 + of_k) * HEAD_DIM + threadIdx.x] = sum;
}
