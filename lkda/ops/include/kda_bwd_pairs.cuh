// intra_chunk_bwd.cu: dAqk and dAkk, and the gradients of pairs inside a leaf.
#pragma once
#include "kda_bwd_shared.cuh"

// A warp's task: a 16x16 block of dAqk or dAkk, on or below the diagonal.
struct Task {
  bool exists, of_aqk;
  int row, column;  // in blocks

  __device__ __forceinline__ explicit Task(int n) : exists(n < 2 * LOWER), of_aqk(n < LOWER) {
    const int of = of_aqk ? n : n - LOWER;
    row = of < 1 ? 0 : of < 3 ? 1 : of < 6 ? 2 : 3;
    column = of - row * (row + 1) / 2;
  }
};

// Adds the part of a task's block that a slice of V contributes. left_at(v): the left operand of 16 columns of V. A persistent block has the
// registers to load all operands at once. It matters, since in the last round only some of its warps have a task.
template <class LeftAt>
__device__ __forceinline__ void add_task(Sum& sum, const char* slice, int column, LeftAt left_at) {
#pragma unroll(STEPS)
  for (int v = 0; v < SLICE; v += 16) {
    const Right<Operand> n = ColumnsSlice::load_right_transposed(ColumnsSlice::from(slice + Shared::v_tilde, v), 0, column * 16);
    product(sum, left_at(v), n);
  }
}

// Stores a task's block where its pairs are used: in their leaf, or in their level.
__device__ __forceinline__ void store_pairs(char* shared, const Task& task, const Sum& sum) {
  if (task.row != task.column) {
    const int level = (task.row ^ task.column) >= 2 ? 2 : 1, bits = LEAF_BITS + level, half = 1 << bits, i = task.row * 16;
    const int row = (i >> (bits + 1) << (bits + 1)) + (i & (half - 1)) + (task.of_aqk ? half : 0), column = task.column * 16 & (half - 1);
    char* pairs = shared + Shared::pairs + level * Pairs::bytes;
#pragma unroll
    for (int q = 0; q < 4; ++q) store_pair(Pairs::at(pairs, row + quadrant_row(q), column + quadrant_column(q)), sum.pair[q]);
    return;
  }
#pragma unroll
  for (int q = 0; q < 4; q += 3) {
    const int at = ((task.row * 2 + q / 3) * LEAF + lane_row()) * LEAF + lane_column();
    *reinterpret_cast<float2*>(shared + (task.of_aqk ? Shared::leaf_daqk : Shared::leaf_dakk) + at * 4) = sum.pair[q];
  }
  const int row = task.row * 16 + lane_row() + (task.of_aqk ? LEAF : 0), column = task.row % 2 * LEAF + lane_column();
  char* pairs = shared + Shared::pairs;
  store_pair(Pairs::at(pairs, row, column), sum.pair[1]);
  store_pair(Pairs::at(pairs, row, column ^ LEAF), make_float2(0.f, 0.f));  // the other group has these 16 columns too
}

// Pairs inside the leaf, j < i, w = decay(j..i), x = dAqk q_i + beta_i dAkk k_i:
//   a_i += dAqk w k_j    b_i += dAkk w k_j    c_j += w x    dg_t += w k_j x, j < t <= i
// Calls done(i, a_i, b_i) when row i is complete.
template <class Done>
__device__ __forceinline__ void leaf_gradients(
    const char* shared, int leaf, const Gates& gates, const Leaf<Query>& q, const Leaf<Query>& k, const float* beta,
    float2 (&column)[LEAF], float2 (&dg)[LEAF], Done done) {
  const float* daqk = reinterpret_cast<const float*>(shared + Shared::leaf_daqk) + leaf * LEAF * LEAF;
  const float* dakk = reinterpret_cast<const float*>(shared + Shared::leaf_dakk) + leaf * LEAF * LEAF;
  float2 w[LEAF];
#pragma unroll
  for (int i = 0; i < LEAF; ++i) {
    if constexpr (HALVES) __syncwarp();  // no load moves up past this: there are no registers for it
    const float2 qi = q[i], weighted = scaled(beta[i], k[i]);
    float2 a = make_float2(0.f, 0.f), b = a, sum = a;
#pragma unroll
    for (int j = 0; j < i; ++j) {
      w[j] = times(w[j], gates.e[i]);
      const float p = daqk[i * LEAF + j], m = dakk[i * LEAF + j];
      const float2 decayed = times(w[j], k[j]), x = fused(p, qi, scaled(m, weighted));
      a = fused(p, decayed, a);
      b = fused(m, decayed, b);
      add_to(column[j], times(w[j], x));
      add_to(sum, times(decayed, x));
      add_to(dg[j + 1], sum);
    }
    done(i, a, b);
    w[i] = make_float2(1.f, 1.f);
  }
}

// Sums x[i] over the lanes that share a leaf, into out[i].
__device__ __forceinline__ void sum_over_channels(float (&x)[LEAF], float* out) {
  int count = LEAF;
#pragma unroll
  for (int step = LANES / 2; step >= 1; step /= 2) {
    if (count > 1) {
      count /= 2;
      const bool upper = lane_id() & step;
#pragma unroll
      for (int i = 0; i < LEAF / 2; ++i)
        if (i < count) x[i] = (upper ? x[i + count] : x[i]) + __shfl_xor_sync(0xffffffffu, upper ? x[i] : x[i + count], step);
    } else {
      x[0] += __shfl_xor_sync(0xffffffffu, x[0], step);
    }
  }
  if (lane_id() % (LANES / LEAF) == 0) out[lane_id() % LANES / (LANES / LEAF)] = x[0];
}
