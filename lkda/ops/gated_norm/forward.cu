// y = x / sqrt(mean over the head of x^2 + eps) * w * sigmoid(gate). A null gate means no gate.
//
// A row is one head of one token. LANES neighbouring lanes share a row, 16 bytes each, and a thread has parts of ROWS rows.
#include "vector.cuh"

using Element = ELEMENT;

constexpr int N = 16 / sizeof(Element);  // channels per thread
constexpr int LANES = HEAD_DIM / N;
constexpr int THREADS = 256, BLOCK_ROWS = THREADS / LANES, ROWS = 4;

extern "C" __global__ void __launch_bounds__(THREADS)
    gated_norm_forward(const Element* x, const Element* gate, const float* weight, Element* y, int rows, float eps) {
  const int channel = threadIdx.x % LANES * N, first = blockIdx.x * BLOCK_ROWS * ROWS + threadIdx.x / LANES;
  Raw<16> values[ROWS], gates[ROWS];
#pragma unroll
  for (int j = 0; j < ROWS; ++j) {
    const int row = first + j * BLOCK_ROWS;
    const long long at = static_cast<long long>(row < rows ? row : 0) * HEAD_DIM + channel;
    fetch(values[j], x + at);
    if (gate != nullptr) fetch(gates[j], gate + at);
  }
  const Numbers<N> w = load_floats<N>(weight + channel);
#pragma unroll
  for (int j = 0; j < ROWS; ++j) {
    Numbers<N> value = numbers<N>(Element{}, values[j]);
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < N; ++i) squares = fmaf(value.x[i], value.x[i], squares);
    const float r = rsqrtf(sum_over_lanes<LANES>(squares) * (1.f / HEAD_DIM) + eps);
#pragma unroll
    for (int i = 0; i < N; ++i) value.x[i] *= r * w.x[i];
    if (gate != nullptr) {
      const Numbers<N> open = numbers<N>(Element{}, gates[j]);
#pragma unroll
      for (int i = 0; i < N; ++i) value.x[i] *= sigmoid(open.x[i]);
    }
    const int row = first + j * BLOCK_ROWS;
    if (row < rows) store_numbers<N>(y + static_cast<long long>(row) * HEAD_DIM + channel, value);
  }
}
