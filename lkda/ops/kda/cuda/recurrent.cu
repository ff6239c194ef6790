// The recurrence one token after another, to measure what Kimi Delta Attention costs without chunks.
//
//   S' = Diag(exp g) S     S = S' + k (beta (v - S'^T k))^T     o = scale S^T q
//
// One block per head of a sequence, two neighbouring threads per column of V; each has half the column of S in registers.
#include "numeric.cuh"

constexpr int D = HEAD_DIM;
constexpr int HALF = D / 2;
using Element = ELEMENT;

__device__ __forceinline__ float load_one(const float* at) { return *at; }
template <class Half>
__device__ __forceinline__ float load_one(const Half* at) {
  return unpack(Half{}, at->bits).x;
}
__device__ __forceinline__ void store_one(float* at, float x) { *at = x; }
template <class Half>
__device__ __forceinline__ void store_one(Half* at, float x) {
  at->bits = static_cast<unsigned short>(pack(Half{}, make_float2(x, 0.f)));
}

// q, k, v, o: [rows, H, D]. g: [rows, H, D], beta: [rows, H] float32. initial_state (may be null), final_state: [N, H, K, V].
// cu_seqlens: [N + 1], or null where each sequence has `length` tokens. Grid: N x H.
extern "C" __global__ void __launch_bounds__(2 * D, 1) kda_recurrent(
    const Element* q, const Element* k, const Element* v, const float* g, const float* beta, const float* initial_state, Element* o,
    float* final_state, const int* cu_seqlens, int length, int heads, float scale) {
  __shared__ float qs[D], ks[D], decay[D];
  const int n = blockIdx.x / heads, head = blockIdx.x % heads, column = threadIdx.x / 2, first = threadIdx.x % 2 * HALF;
  const long long begin = cu_seqlens != nullptr ? cu_seqlens[n] : static_cast<long long>(n) * length;
  const long long end = cu_seqlens != nullptr ? cu_seqlens[n + 1] : begin + length;
  const long long state_at = static_cast<long long>(blockIdx.x) * D * D + first * D + column;
  float state[HALF];
#pragma unroll
  for (int d = 0; d < HALF; ++d) state[d] = initial_state != nullptr ? initial_state[state_at + d * D] : 0.f;
  for (long long t = begin; t < end; ++t) {
    const long long row = (t * heads + head) * D;
    __syncthreads();  // all threads are done with the token before
    if (threadIdx.x < D) {
      qs[threadIdx.x] = scale * load_one(q + row + threadIdx.x);
      ks[threadIdx.x] = load_one(k + row + threadIdx.x);
      decay[threadIdx.x] = exp2_fast(1.4426950408889634f * g[row + threadIdx.x]);
    }
    __syncthreads();
    float seen = 0.f;
#pragma unroll
    for (int d = 0; d < HALF; ++d) {
      state[d] *= decay[first + d];
      seen += state[d] * ks[first + d];
    }
    seen += __shfl_xor_sync(0xffffffffu, seen, 1);
    const float correction = beta[t * heads + head] * (load_one(v + row + column) - seen);
    float out = 0.f;
#pragma unroll
    for (int d = 0; d < HALF; ++d) {
      state[d] += ks[first + d] * correction;
      out += state[d] * qs[first + d];
    }
    out += __shfl_xor_sync(0xffffffffu, out, 1);
    if (first == 0) store_one(o + row + column, out);
  }
#pragma unroll
  for (int d = 0; d < HALF; ++d) final_state[state_at + d * D] = state[d];
}
