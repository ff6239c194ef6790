// The recurrence one token after another, to measure what Kimi Delta Attention costs without chunks.
//
//   S' = Diag(exp g) S     S = S' + k (beta (v - S'^T k))^T     o = scale S^T q
//
// One block per head of a sequence, COLUMN_THREADS neighbouring threads per column of V. Each has its share of the column of S in
// registers: groups of four channels, so that neighbours read neighbouring 16 bytes of k, q and the decay from shared memory.
#include "vector.cuh"

constexpr int D = HEAD_DIM;
constexpr int N = D / COLUMN_THREADS;
using Element = ELEMENT;

// The channel of entry d of this thread's share.
__device__ __forceinline__ int channel(int d) {
  return d / 4 * 4 * COLUMN_THREADS + threadIdx.x % COLUMN_THREADS * 4 + d % 4;
}

// q, k, v, o: [rows, H, D]. g: [rows, H, D], beta: [rows, H] float32. initial_state (may be null), final_state: [N, H, K, V].
// cu_seqlens: [N + 1], or null where each sequence has `length` tokens. Grid: N x H.
extern "C" __global__ void __launch_bounds__(COLUMN_THREADS * D, BLOCKS) kda_recurrent(
    const Element* q, const Element* k, const Element* v, const float* g, const float* beta, const float* initial_state, Element* o,
    float* final_state, const int* cu_seqlens, int length, int heads, float scale) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  float* const qs = reinterpret_cast<float*>(shared_memory);
  float *const ks = qs + D, *const decay = ks + D;
  const int n = blockIdx.x / heads, head = blockIdx.x % heads;
  const int column = threadIdx.x / COLUMN_THREADS;
  const long long begin = cu_seqlens != nullptr ? cu_seqlens[n] : static_cast<long long>(n) * length;
  const long long end = cu_seqlens != nullptr ? cu_seqlens[n + 1] : begin + length;
  const long long state_at = static_cast<long long>(blockIdx.x) * D * D + column;
  float state[N];
#pragma unroll
  for (int d = 0; d < N; ++d) state[d] = initial_state != nullptr ? initial_state[state_at + channel(d) * D] : 0.f;
  for (long long t = begin; t < end; ++t) {
    const long long row = (t * heads + head) * D;
    __syncthreads();  // all threads are done with the token before
    if (threadIdx.x < D) {
      qs[threadIdx.x] = scale * load_number(q + row + threadIdx.x);
      ks[threadIdx.x] = load_number(k + row + threadIdx.x);
      decay[threadIdx.x] = exp2_fast(1.4426950408889634f * g[row + threadIdx.x]);
    }
    __syncthreads();
    float seen = 0.f;
#pragma unroll
    for (int d = 0; d < N; ++d) {
      state[d] *= decay[channel(d)];
      seen += state[d] * ks[channel(d)];
    }
    seen = sum_over_lanes<COLUMN_THREADS>(seen);
    const float correction = beta[t * heads + head] * (load_number(v + row + column) - seen);
    float out = 0.f;
#pragma unroll
    for (int d = 0; d < N; ++d) {
      state[d] += ks[channel(d)] * correction;
      out += state[d] * qs[channel(d)];
    }
    out = sum_over_lanes<COLUMN_THREADS>(out);
    if (threadIdx.x % COLUMN_THREADS == 0) store_number(o + row + column, out);
  }
#pragma unroll
  for (int d = 0; d < N; ++d) final_state[state_at + channel(d) * D] = state[d];
}
