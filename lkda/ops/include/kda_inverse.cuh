// What the two kernels of intra_chunk_fwd, chunk_fwd.cu and chunk_fwd_pair.cu have in common: the pairs on the levels of the tree, and T~ from Akk.
//
// `Shared` says where a kernel has its arrays in shared memory, and `pairs` is the Square there that gets Aqk and T~. The THREADS
// threads or WARPS warps that call a function together share its work; each gives its number among them.
#pragma once
#include "kda_tree.cuh"

// Akk and Aqk between the halves of each group of each level, on tensor cores. A task is 16 rows of one level. scale: of Aqk; 1
// if q^ is already multiplied by it.
template <class Shared, int WARPS>
__device__ __forceinline__ void tree_pairs(char* shared, char* pairs, int warp, float scale) {
  for (int task = warp; task < LEVELS * BLOCKS; task += WARPS) {
    const int level = LEVELS - 1 - task / BLOCKS, rows = task % BLOCKS * 16, bits = LEAF_BITS + level, half = 1 << bits;
    const char* tree = shared + Shared::tree + level * Level::bytes;
    const int group = rows >> (bits + 1), columns = (half + 15) / 16, first = group << bits & ~15;
    Sum sum[BLOCKS / 2];
#pragma unroll
    for (int n = 0; n < BLOCKS / 2; ++n) clear(sum[n]);
#pragma unroll
    for (int d = 0; d < D; d += 16) {
      const Block<Operand> a = Level::Rows::load(tree + Level::rows, rows, d);
#pragma unroll
      for (int n = 0; n < BLOCKS / 2; ++n) {
        if (n < columns) product(sum[n], a, Level::Columns::load_right(tree + Level::columns, first + n * 16, d));
      }
    }
    const int start = group << (bits + 1);  // the group's first token
    if (level == 0) {  // rows 0-7 are of k, 8-15 of q; half of the columns are another group's
      const Sum& s = sum[0];
      const int i = start + LEAF + lane_row(), j = start + lane_column();
      float* corner = reinterpret_cast<float*>(shared + Shared::corner) + i * 17 + lane_column();
      const float2 m = group % 2 == 0 ? s.pair[0] : s.pair[2], p = group % 2 == 0 ? s.pair[1] : s.pair[3];
      corner[0] = m.x;
      corner[1] = m.y;
      store_pair(Square::at(pairs, i, j), times(make_float2(scale, scale), p));
      continue;
    }
#pragma unroll
    for (int n = 0; n < BLOCKS / 2; ++n) {
      if (n < columns) {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const int i = start + half + (rows & (half - 1)) + quadrant_row(q), j = start + n * 16 + quadrant_column(q);
          if (rows & half) {
            store_pair(Square::at(pairs, i, j), times(make_float2(scale, scale), sum[n].pair[q]));
          } else {
            store_pair(Square::at(shared + Shared::below, i, j), sum[n].pair[q]);
          }
        }
      }
    }
  }
}

// A task of tree_pairs whose level the compiler knows. It then has no branches, and operands are read while others are multiplied.
// operands: of the level. number: of the task on its level, 0 to BLOCKS - 1. Of the level's columns it multiplies COLUMNS blocks, from
// `column` on.
template <class Shared, int LEVEL, int COLUMNS = ((LEAF << LEVEL) + 15) / 16>
__device__ __forceinline__ void level_pairs(char* shared, const char* operands, char* pairs, int number, float scale, int column = 0) {
  constexpr int HALF = LEAF << LEVEL;
  const int rows = number * 16, group = rows / (2 * HALF), start = group * 2 * HALF;
  Sum sum[COLUMNS];
#pragma unroll
  for (int n = 0; n < COLUMNS; ++n) clear(sum[n]);
#pragma unroll (D < 128 ? D / 16 : 2)
  for (int d = 0; d < D; d += 16) {
    const Block<Operand> a = Level::Rows::load(operands + Level::rows, rows, d);
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n) product(sum[n], a, Level::Columns::load_right(operands + Level::columns, (group * HALF & ~15) + column + n * 16, d));
  }
  const float2 scales = make_float2(scale, scale);
  if constexpr (LEVEL == 0) {
    const bool odd = group % 2;
    const float2 m = odd ? sum[0].pair[2] : sum[0].pair[0], p = odd ? sum[0].pair[3] : sum[0].pair[1];
    float* corner = reinterpret_cast<float*>(shared + Shared::corner) + (start + LEAF + lane_row()) * 17 + lane_column();
    corner[0] = m.x;
    corner[1] = m.y;
    store_pair(Square::at(Square::from(pairs, start + LEAF), lane_row(), start + lane_column()), times(scales, p));
  } else {
    const bool of_q = rows & HALF;
    char* to = Square::from(of_q ? pairs : shared + Shared::below, start + HALF + (rows & (HALF - 1)));
    const float2 factor = of_q ? scales : make_float2(1.f, 1.f);
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
      for (int q = 0; q < 4; ++q) store_pair(Square::at(to, quadrant_row(q), start + column + n * 16 + quadrant_column(q)), times(factor, sum[n].pair[q]));
  }
}

// tree_pairs by eight warps, for three levels of four tasks each. A warp has a task of level 2, or one of each of the other levels.
template <class Shared>
__device__ __forceinline__ void tree_pairs_of_eight(char* shared, char* pairs, int warp, float scale) {
  const char* tree = shared + Shared::tree;
  if (warp < 4) {
    level_pairs<Shared, 2>(shared, tree + 2 * Level::bytes, pairs, warp, scale);
  } else {
    level_pairs<Shared, 1>(shared, tree + Level::bytes, pairs, warp - 4, scale);
    level_pairs<Shared, 0>(shared, tree, pairs, warp - 4, scale);
  }
}

// The same by sixteen warps. Each has one block of 16x16. levels: `at(level)` says where the operands of a level lie.
template <class Shared, class Levels>
__device__ __forceinline__ void tree_pairs_of_sixteen(char* shared, const Levels& levels, char* pairs, int warp, float scale) {
  if (warp < 8) {
    level_pairs<Shared, 2, 1>(shared, levels.at(2), pairs, warp / 2, scale, warp % 2 * 16);
  } else if (warp < 12) {
    level_pairs<Shared, 1>(shared, levels.at(1), pairs, warp - 8, scale);
  } else {
    level_pairs<Shared, 0>(shared, levels.at(0), pairs, warp - 12, scale);
  }
}

// T and T~ of the 8x8 diagonal blocks, by substitution in float32. A call computes one column c of a block:
//   T~_ic = -sum_{c <= j < i} Akk_ij T_jc,    T_ic = [i = c] + beta_i T~_ic
template <class Shared, class Index>
__device__ __forceinline__ void invert_column(char* shared, Index column) {
  const int leaf = column / LEAF, c = column % LEAF, first = leaf * LEAF;
  const float* m = reinterpret_cast<const float*>(shared + Shared::corner) + first * 17 + leaf % 2 * LEAF;
  const float* beta = reinterpret_cast<const float*>(shared + Shared::beta) + first;
  float* leaf_t = reinterpret_cast<float*>(shared + Shared::leaf_t) + column;
  float* leaf_rest = reinterpret_cast<float*>(shared + Shared::leaf_rest) + column;
  float entry[LEAF * (LEAF - 1) / 2], weight[LEAF], t[LEAF], rest[LEAF];  // all read first: a load would wait for the stores before it
#pragma unroll
  for (int i = 0; i < LEAF; ++i) {
    weight[i] = beta[i];
#pragma unroll
    for (int j = 0; j < i; ++j) entry[i * (i - 1) / 2 + j] = m[i * 17 + j];
  }
#pragma unroll
  for (int i = 0; i < LEAF; ++i) {
    rest[i] = 0.f;
#pragma unroll
    for (int j = 0; j < i; ++j) rest[i] -= j >= c ? entry[i * (i - 1) / 2 + j] * t[j] : 0.f;
    t[i] = i == c ? 1.f : i > c ? weight[i] * rest[i] : 0.f;
  }
#pragma unroll
  for (int i = 0; i < LEAF; ++i) {
    leaf_t[i * C] = t[i];
    leaf_rest[i * C] = rest[i];
  }
}

// Copies entry (i, c) of each inverted leaf to the matrices that use it.
template <class Shared, int THREADS>
__device__ __forceinline__ void spread_leaves(char* shared, char* pairs, int thread) {
  for (int n = thread; n < C * LEAF; n += THREADS) {
    const int i = n / C, column = n % C, row = column / LEAF * LEAF + i;
    const float t = reinterpret_cast<const float*>(shared + Shared::leaf_t)[n], rest = reinterpret_cast<const float*>(shared + Shared::leaf_rest)[n];
    store_one(Square::at(shared + Shared::inverse, row, column), t);
    store_one(Square::at(shared + Shared::inverse_rest, row, column), rest);
    if (row > column) store_one(Square::at(pairs, column, row), rest);
  }
}

// The 8x8 block of T~ below two diagonal blocks 1 and 2, in float32. Eight neighbouring threads have a column:
//   T~_21 = -(I + T~_22 B_2) X,    X = Akk_21 T_11
template <class Shared, int THREADS>
__device__ __forceinline__ void merge_leaves(char* shared, char* pairs, int thread) {
  for (int n = thread; n < BLOCKS * 64; n += THREADS) {
    const int block = n / 64, c = n % 64 / LEAF, i = n % LEAF, upper = block * 16, lower = upper + LEAF;
    const float* m = reinterpret_cast<const float*>(shared + Shared::corner) + (lower + i) * 17;
    const float* beta = reinterpret_cast<const float*>(shared + Shared::beta) + lower;
    const float* leaf_t = reinterpret_cast<const float*>(shared + Shared::leaf_t) + upper + c;
    const float* leaf_rest = reinterpret_cast<const float*>(shared + Shared::leaf_rest) + lower;
    float x = 0.f;
#pragma unroll
    for (int l = 0; l < LEAF; ++l) x += m[l] * leaf_t[l * C];
    float rest = -x;
    const float weighted = beta[i] * x;
#pragma unroll
    for (int l = 0; l < LEAF - 1; ++l) {
      const float other = __shfl_sync(0xffffffffu, weighted, (lane_id() & ~7) + l);
      rest -= l < i ? leaf_rest[i * C + l] * other : 0.f;
    }
    store_one(Square::at(shared + Shared::inverse, lower + i, upper + c), beta[i] * rest);
    store_one(Square::at(shared + Shared::inverse, upper + c, lower + i), 0.f);
    store_one(Square::at(shared + Shared::inverse_rest, lower + i, upper + c), rest);
    store_one(Square::at(shared + Shared::inverse_rest, upper + c, lower + i), 0.f);
    store_one(Square::at(pairs, upper + c, lower + i), rest);
  }
}

// The block of T~ below two inverted diagonal blocks 1 and 2 of HALF tokens:
//   T~_21 = -(I + T~_22 B_2) X,    X = Akk_21 T_11
// It is computed transposed, X^T = T_11^T Akk_21^T: then a sum is the next operand, and the result lies as `pairs` holds it.
template <class Shared, int WARPS, int HALF>
__device__ __forceinline__ void merge(char* shared, char* pairs, int warp) {
  constexpr int N = HALF / 16;
  const float* beta = reinterpret_cast<const float*>(shared + Shared::beta);
  for (int task = warp; task < C / (2 * HALF) * N; task += WARPS) {
    const int upper = task / N * 2 * HALF, lower = upper + HALF, column = upper + task % N * 16;
    Sum x[N];
    Block<Operand> weighted[N];  // X^T B_2
#pragma unroll
    for (int n = 0; n < N; ++n) {
      clear(x[n]);
#pragma unroll
      for (int l = 0; l < N; ++l)
        if (upper + l * 16 >= column)  // T_11 is lower triangular, and only that part was written
          product(x[n], Square::load_transposed(shared + Shared::inverse, upper + l * 16, column),
                  Square::load_right(shared + Shared::below, lower + n * 16, upper + l * 16));
      Sum scaled;
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int i = lower + n * 16 + quadrant_column(q);
        scaled.pair[q] = make_float2(x[n].pair[q].x * beta[i], x[n].pair[q].y * beta[i + 1]);
      }
      weighted[n] = round_to<Operand>(scaled);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int l = 0; l <= n; ++l) product(x[n], weighted[l], Square::load_right(shared + Shared::inverse_rest, lower + n * 16, lower + l * 16));
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int j = column + quadrant_row(q), i = lower + n * 16 + quadrant_column(q);
        const float2 rest = make_float2(-x[n].pair[q].x, -x[n].pair[q].y);
        store_pair(Square::at(pairs, j, i), rest);
        if (2 * HALF < C) {
          store_one(Square::at(shared + Shared::inverse_rest, i, j), rest.x);
          store_one(Square::at(shared + Shared::inverse_rest, i + 1, j), rest.y);
          store_one(Square::at(shared + Shared::inverse, i, j), rest.x * beta[i]);
          store_one(Square::at(shared + Shared::inverse, i + 1, j), rest.y * beta[i + 1]);
        }
      }
    }
  }
}

// Copies the finished matrix of Aqk and T~ to the workspace.
template <class Shared, int THREADS>
__device__ __forceinline__ void copy_pairs(const char* shared, int thread, char* workspace) {
  for (int at = thread * 16; at < Square::bytes; at += THREADS * 16)
    *reinterpret_cast<uint4*>(workspace + ChunkWorkspace::pairs + at) = *reinterpret_cast<const uint4*>(shared + Shared::pairs + at);
}

// exp(G_C) of two channels. A thread does nothing if `channel`, the first of the two, is not one.
template <class Shared>
__device__ __forceinline__ void whole_decay(const char* shared, char* workspace, int channel) {
  if (channel < 0 || channel >= D) return;
  float2 sum = make_float2(0.f, 0.f);
#pragma unroll
  for (int leaf = 0; leaf < LEAVES; ++leaf) add_to(sum, *reinterpret_cast<const float2*>(shared + Shared::leaf_logs + (leaf * D + channel) * 4));
  *reinterpret_cast<float2*>(workspace + ChunkWorkspace::decay + channel * 4) = exp2_fast(sum);
}
