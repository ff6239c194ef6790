// y = SiLU(gate) * up, where a row of x holds the gate's half and then the other. A thread has N neighbouring elements of one row.
#include "overlap.cuh"
#include "vector.cuh"

using Element = ELEMENT;

constexpr int N = 16 / sizeof(Element);

extern "C" __global__ void __launch_bounds__(THREADS) swiglu(const Element* x, Element* y, int hidden, int stride) {
  wait_for_the_launch_before();
  let_the_next_launch_begin();
  const int blocks = (hidden / N + THREADS - 1) / THREADS;  // of a row
  const int column = (blockIdx.x % blocks * THREADS + threadIdx.x) * N;
  const long long row = blockIdx.x / blocks;
  if (column >= hidden) return;
  const Numbers<N> gate = read_numbers<N>(x + row * stride + column), up = read_numbers<N>(x + row * stride + hidden + column);
  Numbers<N> result;
#pragma unroll
  for (int i = 0; i < N; ++i) result.x[i] = gate.x[i] * sigmoid(gate.x[i]) * up.x[i];
  store_numbers<N>(y + row * hidden + column, result);
}
