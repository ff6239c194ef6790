// Simplified linear attention as one would first write it: one thread a channel, one token after another. It is the row the
// tuned kernel is compared with. Block = one head of one sequence, thread = channel.
#include "numeric.cuh"

using Element = ELEMENT;

__device__ float value(bfloat16 x) { return unpack(x, x.bits).x; }
__device__ float value(float16 x) { return unpack(x, x.bits).x; }
__device__ float value(float x) { return x; }

__device__ void store(float* at, float x) { *at = x; }
template <class Half>
__device__ void store(Half* at, float x) {
  at->bits = static_cast<unsigned short>(pack(Half{}, make_float2(x, 0.f)));
}

extern "C" __global__ void __launch_bounds__(HEAD_DIM)
    simplified_baseline(const Element* q, long long q_batch, long long q_token, long long q_head,
                        const Element* k, long long k_batch, long long k_token, long long k_head,
                        const Element* v, long long v_batch, long long v_token, long long v_head,
                        const float* decay, long long decay_batch, long long decay_token, long long decay_head,
                        const float* initial, const int* bounds, Element* o, float* final, int length, int heads) {
  const int n = blockIdx.x / heads, h = blockIdx.x % heads, d = threadIdx.x;
  const int batch = bounds == nullptr ? n : 0;
  const int begin = bounds == nullptr ? 0 : bounds[n], end = bounds == nullptr ? length : bounds[n + 1];
  const long long state = static_cast<long long>(blockIdx.x) * 2 * HEAD_DIM + d;
  float num = initial == nullptr ? 0.f : initial[state];
  float den = initial == nullptr ? 0.f : initial[state + HEAD_DIM];
  q += batch * q_batch + h * q_head + d;
  k += batch * k_batch + h * k_head + d;
  v += batch * v_batch + h * v_head + d;
  decay += batch * decay_batch + h * decay_head;
  for (int t = begin; t < end; ++t) {
    const float b = decay[t * decay_token];
    const float s = 1.f / (1.f + __expf(-value(k[t * k_token])));
    num = b * num + s * value(v[t * v_token]);
    den = b * den + s;
    store(o + ((static_cast<long long>(batch) * length + t) * heads + h) * HEAD_DIM + d,
          value(q[t * q_token]) * (num / (den + 1e-30f)));
  }
  final[state] = num;
  final[state + HEAD_DIM] = den;
}
