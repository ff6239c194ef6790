// Gradients of x, y and the weight from those of s = x + y and n = s r w. With h = dn w and m = s r:
//
//     dx = dy = ds + r (h - m mean(h m))        dw = sum over rows of dn m
//
// s is computed again from x and y; a null y means that s is x, and that dy has no memory of its own. A null ds is zero.
// A block takes every gridDim-th group of rows and sums dw in a fixed order, unless `partials` is null. column_sums.cu adds the
// blocks' partials [blocks, WIDTH].
#include "residual_row.cuh"

using Stream = STREAM;  // of x, s and their gradients
using Added = ADDED;    // of y and its gradient
using Result = RESULT;  // of the gradient of n

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    residual_norm_backward(const Stream* ds, const Result* dn, const Stream* x, const Added* y, const float* weight,
                           const float* inverse, Stream* dx, Added* dy, float* partials, int rows) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  float* shared = reinterpret_cast<float*>(shared_memory);  // a number per warp; after the loop [ROWS][WIDTH]
  const bool add = y != nullptr;
  Numbers<N> dw[OWN];
#pragma unroll
  for (int j = 0; j < OWN; ++j)
#pragma unroll
    for (int i = 0; i < N; ++i) dw[j].x[i] = 0.f;

  for (int first = blockIdx.x * ROWS; first < rows; first += gridDim.x * ROWS) {
    const int row = first + threadIdx.x / LANES;
    const bool mine = row < rows;
    const long long start = static_cast<long long>(mine ? row : 0) * WIDTH;
    Raw<N * sizeof(Stream)> stream[OWN], through[OWN];
    Raw<N * sizeof(Added)> added[OWN];
    Raw<N * sizeof(Result)> upper[OWN];
#pragma unroll
    for (int j = 0; j < OWN; ++j) {
      if (column_of(j) >= WIDTH) continue;
      fetch(upper[j], dn + start + column_of(j));
      fetch(stream[j], x + start + column_of(j));
      if (add) fetch(added[j], y + start + column_of(j));
    }
#pragma unroll
    for (int j = 0; j < OWN; ++j)
      if (ds != nullptr && column_of(j) < WIDTH) fetch(through[j], ds + start + column_of(j));
    const float r = inverse[mine ? row : 0];
    Numbers<N> m[OWN], h[OWN];
    float along = 0.f;
#pragma unroll
    for (int j = 0; j < OWN; ++j) {
      if (column_of(j) >= WIDTH) continue;
      m[j] = stream_of<Stream, Added>(stream[j], added[j], add);
      h[j] = numbers<N>(Result{}, upper[j]);
      const Numbers<N> w = load_floats<N>(weight + column_of(j));
#pragma unroll
      for (int i = 0; i < N; ++i) {
        m[j].x[i] *= r;
        if (mine) dw[j].x[i] = fmaf(h[j].x[i], m[j].x[i], dw[j].x[i]);
        h[j].x[i] *= w.x[i];
        along = fmaf(h[j].x[i], m[j].x[i], along);
      }
    }
    along = sum_over_row(along, shared) * (1.f / WIDTH);
#pragma unroll
    for (int j = 0; j < OWN; ++j) {
      if (!mine || column_of(j) >= WIDTH) continue;
#pragma unroll
      for (int i = 0; i < N; ++i) h[j].x[i] = r * fmaf(-along, m[j].x[i], h[j].x[i]);
      if (ds != nullptr) {
        const Numbers<N> from_s = numbers<N>(Stream{}, through[j]);
#pragma unroll
        for (int i = 0; i < N; ++i) h[j].x[i] += from_s.x[i];
      }
      store_numbers<N>(dx + start + column_of(j), h[j]);
      if (add) store_numbers<N>(dy + start + column_of(j), h[j]);
    }
  }

  if (partials == nullptr) return;
  __syncthreads();
#pragma unroll
  for (int j = 0; j < OWN; ++j)
    if (column_of(j) < WIDTH) store_floats<N>(shared + threadIdx.x / LANES * WIDTH + column_of(j), dw[j]);
  __syncthreads();
  for (int column = threadIdx.x; column < WIDTH; column += THREADS) {
    float sum = 0.f;
#pragma unroll
    for (int other = 0; other < ROWS; ++other) sum += shared[other * WIDTH + column];
    partials[static_cast<long long>(blockIdx.x) * WIDTH + column] = sum;
  }
}
