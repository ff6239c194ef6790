// A straightforward kernel for simplified linear attention, to compare the tuned kernels with. One block per head of a sequence, one
// thread per channel, one token after another.
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

// A tensor [B, T, H, ...]: address and strides in elements.
template <class T>
struct Tensor {
  const T* data;
  long long batch, head;
  int token;

  __device__ const T* at(int n, int h) const { return data + n * batch + h * head; }
};

extern "C" __global__ void __launch_bounds__(HEAD_DIM)
    simplified_baseline(Tensor<Element> q, Tensor<Element> k, Tensor<Element> v, Tensor<float> decay, const float* initial,
                        const int* bounds, Element* o, float* final, int length, int heads) {
  const int n = blockIdx.x / heads, h = blockIdx.x % heads, d = threadIdx.x;
  const int batch = bounds == nullptr ? n : 0;
  const int begin = bounds == nullptr ? 0 : bounds[n], end = bounds == nullptr ? length : bounds[n + 1];
  const long long state = static_cast<long long>(blockIdx.x) * 2 * HEAD_DIM + d;
  float num = initial == nullptr ? 0.f : initial[state];
  float den = initial == nullptr ? 0.f : initial[state + HEAD_DIM];
  const Element *query = q.at(batch, h) + d, *key = k.at(batch, h) + d, *content = v.at(batch, h) + d;
  const float* remember = decay.at(batch, h);
  for (int t = begin; t < end; ++t) {
    const long long at = t;
    const float b = remember[at * decay.token];
    const float s = 1.f / (1.f + __expf(-value(key[at * k.token])));
    num = b * num + s * value(content[at * v.token]);
    den = b * den + s;
    store(o + ((static_cast<long long>(batch) * length + t) * heads + h) * HEAD_DIM + d,
          value(query[at * q.token]) * (num / (den + 1e-30f)));
  }
  final[state] = num;
  final[state + HEAD_DIM] = den;
}
