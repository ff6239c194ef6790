// The heads of q and k, turned by the angles of their tokens. Where there are weights, each head is first normalised:
// x / sqrt(mean of x^2 + eps) * weight. Nothing is rounded in between.
//
// Each of the `tokens` tokens has `q_heads` heads of q and `k_heads` of k, `q_stride` and `k_stride` elements from token to token. Token t
// has row t % table of the cosines and sines [table, HALF].
#include "rotary.cuh"

constexpr int ROWS = 2;  // of a thread

extern "C" __global__ void __launch_bounds__(THREADS)
    rotary_forward(const Element* q, const Element* k, const float* cosines, const float* sines, const float* q_weight,
                   const float* k_weight, Element* q_turned, Element* k_turned, int tokens, int q_heads, int k_heads,
                   int table, long long q_stride, long long k_stride, float eps) {
  const bool of_k = blockIdx.x % 2;
  const int heads = of_k ? k_heads : q_heads, rows = tokens * heads;
  const Element* from = of_k ? k : q;
  Element* to = of_k ? k_turned : q_turned;
  const float* weight = of_k ? k_weight : q_weight;
  const long long stride = of_k ? k_stride : q_stride;
  const int first = blockIdx.x / 2 * BLOCK_ROWS * ROWS + threadIdx.x / LANES;
  Halves x[ROWS];
#pragma unroll
  for (int j = 0; j < ROWS; ++j) {
    const int row = first + j * BLOCK_ROWS < rows ? first + j * BLOCK_ROWS : 0;
    x[j] = load_halves(from + row / heads * stride + row % heads * HEAD_DIM + channel_of());
  }
#pragma unroll
  for (int j = 0; j < ROWS; ++j) {
    const int row = first + j * BLOCK_ROWS;
    if (weight != nullptr) {
      const Halves w = load_weight(weight + channel_of());
      const float r = inverse_rms(x[j], eps);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        x[j].first.x[i] *= r * w.first.x[i];
        x[j].second.x[i] *= r * w.second.x[i];
      }
    }
    if (row >= rows) continue;
    const int angles = row / heads % table * HALF + channel_of();
    store_halves(to + static_cast<long long>(row) * HEAD_DIM + channel_of(), turned<false>(x[j], cosines + angles, sines + angles));
  }
}
