// s = x + y, n = s r w, r = 1 / sqrt(mean of s^2 over the row + eps). A null y means that s
// is x. A null s is not written.
#include "residual_row.cuh"

using Stream = STREAM;  // of x and s
using Added = ADDED;    // of y
using Result = RESULT;  // of n

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    residual_norm_forward(const Stream* x, const Added* y, const float* weight, Stream* s, Result* n, float* inverse, int rows,
                          float eps) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const int row = blockIdx.x * ROWS + threadIdx.x / LANES;
  const bool mine = row < rows, add = y != nullptr;
  const long long start = static_cast<long long>(mine ? row : 0) * WIDTH;
  Raw<N * sizeof(Stream)> stream[OWN];
  Raw<N * sizeof(Added)> added[OWN];
#pragma unroll
  for (int j = 0; j < OWN; ++j) {
    if (column_of(j) >= WIDTH) continue;
    fetch(stream[j], x + start + column_of(j));
    if (add) fetch(added[j], y + start + column_of(j));
  }
  Numbers<N> value[OWN];
  float squares = 0.f;
#pragma unroll
  for (int j = 0; j < OWN; ++j) {
    if (column_of(j) >= WIDTH) continue;
    value[j] = stream_of<Stream, Added>(stream[j], added[j], add);
    if (s != nullptr && mine) store_numbers<N>(s + start + column_of(j), value[j]);
#pragma unroll
    for (int i = 0; i < N; ++i) squares = fmaf(value[j].x[i], value[j].x[i], squares);
  }
  const float r = rsqrtf(sum_over_row(squares, reinterpret_cast<float*>(shared_memory)) * (1.f / WIDTH) + eps);
  if (!mine) return;
  if (threadIdx.x % LANES == 0) inverse[row] = r;
#pragma unroll
  for (int j = 0; j < OWN; ++j) {
    if (column_of(j) >= WIDTH) continue;
    const Numbers<N> w = load_floats<N>(weight + column_of(j));
#pragma unroll
    for (int i = 0; i < N; ++i) value[j].x[i] *= r * w.x[i];
    store_numbers<N>(n + start + column_of(j), value[j]);
  }
}
