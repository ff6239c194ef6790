// The decays of simplified linear attention, y = sigmoid(x + bias), of logits x [tokens, heads], and the gradients:
//
//     dx = dy y (1 - y)        dbias = sum over tokens of dx
//
// In the backward the threads of a block have the heads of TOKENS tokens at a time, and add the sums of a head in a fixed order.
// column_sums.cu adds the partial sums of the blocks [blocks, heads].
#include "vector.cuh"

using Element = ELEMENT;

constexpr int THREADS = 256, TIMES = 4;

// `stride` elements from token to token. The sigmoid has no fast approximation: a decay is close to 1.
extern "C" __global__ void __launch_bounds__(THREADS)
    simplified_decay(const Element* x, const float* bias, float* y, int tokens, int heads, long long stride) {
  const long long at = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
  const long long token = at / heads;
  const int head = at % heads;
  if (token < tokens) y[at] = 1.f / (1.f + expf(-(load_number(x + token * stride + head) + bias[head])));
}

extern "C" __global__ void __launch_bounds__(THREADS)
    simplified_decay_backward(const float* dy, const float* y, Element* dx, float* partials, int tokens, int heads) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  float* sums = reinterpret_cast<float*>(shared_memory);  // [THREADS]
  const int at_once = THREADS / heads, thread = threadIdx.x, head = thread % heads, own = thread / heads;
  float sum = 0.f;
  if (own < at_once) {
#pragma unroll
    for (int i = 0; i < TIMES; ++i) {
      const long long token = (static_cast<long long>(blockIdx.x) * TIMES + i) * at_once + own;
      if (token >= tokens) continue;
      const long long at = token * heads + head;
      const float slope = dy[at] * (1.f - y[at]) * y[at];
      store_number(dx + at, slope);
      sum += slope;
    }
  }
  sums[thread] = sum;
  __syncthreads();
  if (thread >= heads) return;
  for (int other = 1; other < at_once; ++other) sum += sums[other * heads + thread];
  partials[static_cast<long long>(blockIdx.x) * heads + thread] = sum;
}
