// Causal softmax attention without tensor cores and without shared memory, to measure what the quadratic form costs when a kernel takes
// one key after another:
//
//   o_t = sum_{s <= t} softmax_s(scale q_t . k_s) v_s
//
// A warp has one query, and a lane has D / 32 of its channels. The softmax is online (arXiv:1805.02867), in powers of 2.
#include "activation.cuh"
#include "vector.cuh"

using Element = ELEMENT;

constexpr int D = HEAD_DIM, N = D / 32, WARPS = THREADS / 32;
// Below every score, but not infinite, so that the difference of two of them is 0.
constexpr float LOWEST = -3e38f;

// q, o: [B, queries, heads, D]. k, v: [B, keys, heads, D]; the queries are the last positions. bounds: [sequences + 1] of the sequences
// packed in one row, or null. Grid: as many warps as there are queries in all, `rows`.
extern "C" __global__ void __launch_bounds__(THREADS)
    softmax_naive(const Element* q, const Element* k, const Element* v, Element* o, const int* bounds, int sequences, int queries,
                  int keys, int heads, float scale, long long rows) {
  const long long row = static_cast<long long>(blockIdx.x) * WARPS + threadIdx.x / 32;
  if (row >= rows) return;
  const int lane = threadIdx.x % 32, t = static_cast<int>(row % queries), last = keys - queries + t;
  const long long n = row / queries / heads, head = row / queries % heads;
  int first = 0;
  for (int i = 0; i < sequences; ++i) {
    if (bounds[i] <= t) first = bounds[i];
  }

  float query[N], sums[N], largest = LOWEST, weights = 0.f;
  const long long own = ((n * queries + t) * heads + head) * D + lane;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    query[i] = scale * LOG2E * load_number(q + own + 32 * i);
    sums[i] = 0.f;
  }
  for (int s = first; s <= last; ++s) {
    const long long at = ((n * keys + s) * heads + head) * D + lane;
    float score = 0.f;
#pragma unroll
    for (int i = 0; i < N; ++i) score = fmaf(query[i], load_number(k + at + 32 * i), score);
    score = sum_over_lanes<32>(score);
    const float most = fmaxf(largest, score), factor = exp2_fast(largest - most), weight = exp2_fast(score - most);
    largest = most;
    weights = fmaf(factor, weights, weight);
#pragma unroll
    for (int i = 0; i < N; ++i) sums[i] = fmaf(factor, sums[i], weight * load_number(v + at + 32 * i));
  }
#pragma unroll
  for (int i = 0; i < N; ++i) store_number(o + own + 32 * i, sums[i] / weights);
}
