// One token of simplified linear attention, for decoding. A thread has two neighbouring channels of one head.
#include "numeric.cuh"

using Element = ELEMENT;

constexpr int LANES = HEAD_DIM / 2;

extern "C" __global__ void __launch_bounds__(128)
    simplified_step(const Element* q, long long q_batch, long long q_head, const Element* k, long long k_batch,
                    long long k_head, const Element* v, long long v_batch, long long v_head, const float* decay,
                    long long decay_batch, long long decay_head, const float* state, Element* o, float* new_state, int rows,
                    int heads) {
  const int thread = blockIdx.x * 128 + threadIdx.x;
  const int row = thread / LANES, lane = thread % LANES;
  if (row >= rows) return;
  const long long n = row / heads, h = row % heads;
  const float b = decay[n * decay_batch + h * decay_head];
  const float2 x = load_pair(k + n * k_batch + h * k_head + 2 * lane);
  const float2 y = load_pair(v + n * v_batch + h * v_head + 2 * lane);
  const float2 r = load_pair(q + n * q_batch + h * q_head + 2 * lane);
  const long long at = static_cast<long long>(row) * 2 * HEAD_DIM + 2 * lane;
  float2 num = load_pair(state + at), den = load_pair(state + at + HEAD_DIM);
  const float2 s = make_float2(sigmoid(x.x), sigmoid(x.y));
  num = make_float2(fmaf(b, num.x, s.x * y.x), fmaf(b, num.y, s.y * y.y));
  den = make_float2(fmaf(b, den.x, s.x), fmaf(b, den.y, s.y));
  store_pair(new_state + at, num);
  store_pair(new_state + at + HEAD_DIM, den);
  store_pair(o + static_cast<long long>(row) * HEAD_DIM + 2 * lane,
             make_float2(r.x * (num.x * reciprocal(den.x + 1e-30f)), r.y * (num.y * reciprocal(den.y + 1e-30f))));
}
