// What the threads that compute one chunk without helper warps do, in intra_chunk_fwd.cu and in chunk_fwd.cu: the operands of all
// levels, k_in, qg and kg, the pairs and T~.
#pragma once
#include "kda_inverse.cuh"

constexpr int THREADS = D * LEAVES / 2;  // a thread holds two channels of one leaf
constexpr int WARPS = THREADS / 32;
constexpr int LANES = D / 2 < 32 ? D / 2 : 32;        // lanes of a warp that share a leaf
constexpr int WARPS_PER_LEAF = D / 2 > 32 ? D / 64 : 1;

struct Shared {
  static constexpr int leaf_logs = 0;                                        // float [LEAVES][D]
  static constexpr int beta = leaf_logs + LEAVES * D * 4;                    // float [C]
  static constexpr int corner = beta + C * 4;                                // float [C][17]: the diagonal 16x16 blocks of Akk
  static constexpr int pairs = (corner + C * 17 * 4 + 127) / 128 * 128;  // Square
  static constexpr int below = pairs + Square::bytes;                        // Square: Akk below the diagonal blocks
  static constexpr int tree = below + Square::bytes;                    // LEVELS x Level, then T and T~
  static constexpr int inverse = tree, inverse_rest = tree + Square::bytes;
  static constexpr int leaf_t = inverse_rest + Square::bytes;           // float [8][C]: columns of T and T~ of the leaves
  static constexpr int leaf_rest = leaf_t + 8 * C * 4;
  static constexpr int after_tree = leaf_rest + 8 * C * 4 - tree;
  static constexpr int tree_bytes = LEVELS * Level::bytes > after_tree ? LEVELS * Level::bytes : after_tree;
  static constexpr int partial = below;                                      // float [WARPS][64], in the place of Akk before it is written: sums over half the channels
  static constexpr int bytes = tree + tree_bytes;
};
static_assert(WARPS_PER_LEAF == 1 || WARPS * 64 * 4 <= Square::bytes, "the partial sums fit where Akk will be");
static_assert(THREADS >= C + D / 2, "a thread for each column of the leaves' inverses, and for two channels");

// Sums value[0..31] over LANES lanes. Lane l of them gets the sums of the 32 / LANES values from 32 / LANES * l on.
__device__ __forceinline__ void sum_over_lanes(float (&value)[32]) {
  int count = 32;
#pragma unroll
  for (int step = LANES / 2; step >= 1; step /= 2) {
    count /= 2;
    const bool upper = lane_id() & step;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (i < count) {
        const float mine = upper ? value[i + count] : value[i];
        const float other = upper ? value[i] : value[i + count];
        value[i] = mine + __shfl_xor_sync(0xffffffffu, other, step);
      }
    }
  }
}

// The row i of pair number n = i (i - 1) / 2 + j, j < i, of a leaf. There are 28 pairs.
__device__ __forceinline__ int pair_row(int n) { return n < 1 ? 1 : n < 3 ? 2 : n < 6 ? 3 : n < 10 ? 4 : n < 15 ? 5 : n < 21 ? 6 : 7; }

__device__ __forceinline__ void store_leaf_sum(char* shared, char* pairs, int leaf, int batch, int n, float sum) {
  const int first = leaf * LEAF;
  if (n >= 28) {  // Aqk_ii
    const int i = first + (n - 28) + 4 * batch;
    store_one(Square::at(pairs, i, i), sum);
    return;
  }
  const int i = pair_row(n), j = n - i * (i - 1) / 2;
  if (batch == 0) {
    float* corner = reinterpret_cast<float*>(shared + Shared::corner);
    const int row = first + i, column = first + j;
    corner[row * 17 + column % 16] = sum;
  } else {
    store_one(Square::at(pairs, first + i, first + j), sum);
  }
}

// Akk and Aqk inside a leaf. Batch 0 is the 28 entries of Akk and Aqk_00..Aqk_33, batch 1 the 28 of Aqk and Aqk_44..Aqk_77.
//
// `team`, here and below: the THREADS threads that call a function together. thread() is a thread's number among them,
// opaque_thread() the same (see opaque), and wait() a barrier for them.
template <class Team, class Pairs>
__device__ __forceinline__ void leaf_pairs(const Team& team, char* shared, char* pairs, int leaf, const Gates& gates, const Pairs& q, const Pairs& k, float scale) {
#pragma unroll 1
  for (int batch = 0; batch < 2; ++batch) {
    float sum[32];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x = batch == 0 ? q[i] : q[i + 4], y = batch == 0 ? k[i] : k[i + 4];
      sum[28 + i] = scale * (x.x * y.x + x.y * y.y);
    }
#pragma unroll
    for (int channel = 0; channel < 2; ++channel) {
      float decayed[LEAF];  // k_j decay(j..i)
#pragma unroll
      for (int i = 0; i < LEAF; ++i) {
        const float e = channel == 0 ? gates.e[i].x : gates.e[i].y;
        const float ki = channel == 0 ? k[i].x : k[i].y, qi = channel == 0 ? q[i].x : q[i].y;
        const float row = batch == 0 ? ki : scale * qi;
#pragma unroll
        for (int j = 0; j < i; ++j) {
          decayed[j] *= e;
          const float term = row * decayed[j];
          sum[i * (i - 1) / 2 + j] = channel == 0 ? term : sum[i * (i - 1) / 2 + j] + term;
        }
        decayed[i] = ki;
      }
    }
    sum_over_lanes(sum);
    const int each = 32 / LANES, lane = lane_id() % LANES;
    if constexpr (WARPS_PER_LEAF > 1) {
      reinterpret_cast<float*>(shared + Shared::partial)[(team.thread() / 32) * 64 + batch * 32 + lane] = sum[0];
    } else {
#pragma unroll
      for (int n = 0; n < each; ++n) store_leaf_sum(shared, pairs, leaf, batch, lane * each + n, sum[n]);
    }
  }
  if constexpr (WARPS_PER_LEAF > 1) {
    team.wait();
    const float* partial = reinterpret_cast<const float*>(shared + Shared::partial);
    for (int n = team.thread(); n < LEAVES * 64; n += THREADS) {
      const int of = n / 64;
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS_PER_LEAF; ++w) sum += partial[(of * WARPS_PER_LEAF + w) * 64 + n % 64];
      store_leaf_sum(shared, pairs, of, n % 64 / 32, n % 32, sum);
    }
  }
}

// Akk and Aqk on the levels, and T~. Aqk and T~ are complete in `pairs` after the next barrier. exp(G_C) goes to the workspace. The
// operands of all levels are in `shared` already, and the pairs inside leaves there and in `pairs`. scale: of Aqk; 1 if q^ is already multiplied by it.
template <bool LEVELS_APART = false, class Team>
__device__ __forceinline__ void pairs_and_inverse(const Team& team, char* shared, char* pairs, char* workspace, float scale) {
  team.wait();
  if constexpr (LEVELS_APART) {
    tree_pairs_of_eight<Shared>(shared, pairs, opaque(team.thread() / 32), scale);
  } else {
    tree_pairs<Shared, WARPS>(shared, pairs, opaque(team.thread() / 32), scale);
  }
  team.wait();  // T and T~ take the place of the level tiles
  if (team.thread() < C) invert_column<Shared>(shared, team.thread());
  whole_decay<Shared>(shared, workspace, team.opaque_thread() - C);  // by threads that invert nothing
  team.wait();
  spread_leaves<Shared, THREADS>(shared, pairs, team.opaque_thread());
  merge_leaves<Shared, THREADS>(shared, pairs, team.opaque_thread());
  team.wait();
  merge<Shared, WARPS, 16>(shared, pairs, opaque(team.thread() / 32));
  if constexpr (C == 64) {
    team.wait();
    merge<Shared, WARPS, 32>(shared, pairs, opaque(team.thread() / 32));
  }
}
