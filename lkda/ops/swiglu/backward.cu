// The backward of y = SiLU(gate) * up, where a row of x holds the gate's half and then the other. It computes y again, for the gradient of
// the weights that y is multiplied with. With s = sigmoid(gate):
//
//     dgate = dy up s (1 + gate (1 - s))        dup = dy SiLU(gate)
//
// A thread has N neighbouring elements of one row.
#include "vector.cuh"

using Element = ELEMENT;

constexpr int N = 16 / sizeof(Element);

extern "C" __global__ void __launch_bounds__(THREADS)
    swiglu_backward(const Element* dy, const Element* x, Element* dx, Element* y, int groups, int hidden, int stride) {
  const int group = blockIdx.x * THREADS + threadIdx.x, of_a_row = hidden / N;
  if (group >= groups) return;
  const long long row = group / of_a_row;
  const int column = group % of_a_row * N;
  const Element* from = x + row * stride + column;
  const Numbers<N> gate = load_numbers<N>(from), up = load_numbers<N>(from + hidden);
  const Numbers<N> upper = load_numbers<N>(dy + row * hidden + column);
  Numbers<N> dgate, dup, product;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float s = sigmoid(gate.x[i]), silu = gate.x[i] * s;
    product.x[i] = silu * up.x[i];
    dup.x[i] = silu * upper.x[i];
    dgate.x[i] = upper.x[i] * up.x[i] * s * fmaf(gate.x[i], 1.f - s, 1.f);
  }
  Element* to = dx + row * 2 * hidden + column;
  store_numbers<N>(to, dgate);
  store_numbers<N>(to + hidden, dup);
  store_numbers<N>(y + row * hidden + column, product);
}
