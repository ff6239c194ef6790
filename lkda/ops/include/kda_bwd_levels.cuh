// intra_chunk_bwd.cu: the sums over pairs of other leaves, a level of the tree at a time.
#pragma once
#include "kda_bwd_shared.cuh"

// What a warp sums up for its 16 tokens and 32 channels, [channels, tokens]: dq, and the parts of dk in which the token is a row
// (its beta left out) and a column. The products inside the leaf are not yet applied.
struct Gathered {
  Sum dq[2], row[2], column[2];
};

// sum += reach * x, for one level or for the chunk. reach: [LEAVES][D].
__device__ __forceinline__ void gather(Sum& sum, const Sum& x, const float* reach, int leaf, int channel) {
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const float r = reach[(leaf + (q >> 1)) * D + channel + (q & 1) * 8 + lane_row()];
    sum.pair[q] = fused(r, x.pair[q], sum.pair[q]);
  }
}

// Overwrites the reach with each quadrant's sum over its eight tokens.
__device__ __forceinline__ void store_totals(float* total, const float (&sum)[4], int leaf, int channel) {
  const int lane = lane_id();
  float two[2];
#pragma unroll
  for (int n = 0; n < 2; ++n) two[n] = (lane & 1 ? sum[n + 2] : sum[n]) + __shfl_xor_sync(0xffffffffu, lane & 1 ? sum[n] : sum[n + 2], 1);
  const float one = (lane & 2 ? two[1] : two[0]) + __shfl_xor_sync(0xffffffffu, lane & 2 ? two[0] : two[1], 2);
  __syncwarp();  // every lane has read the reaches
  total[(leaf + (lane & 1)) * D + channel + (lane & 2) * 4 + lane_row()] = one;
}

__device__ __forceinline__ float dot(float2 a, float2 b) { return a.x * b.x + a.y * b.y; }

// The lowest level, with halves of 8 tokens: a block's first leaf has the columns, the second the rows. All reaches are 1, and no
// other leaf's dg needs the sums.
__device__ __forceinline__ void lowest_level(Gathered& out, const char* tile, const char* pairs, int block, int channels) {
  const Right<Operand> of_rows = Pairs::load_right(pairs, block * 16, 0), of_columns = Pairs::load_right_transposed(pairs, block * 16, 0);
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    Sum x;
    clear(x);
    product(x, Level::Columns::load_transposed(tile + Level::columns, block / 2 * 16, channels + c * 16), of_rows);
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      add_to(out.row[c].pair[2 + q], x.pair[q]);
      add_to(out.dq[c].pair[2 + q], x.pair[2 + q]);
    }
    clear(x);
    product(x, Level::Rows::load_transposed(tile + Level::rows, block * 16, channels + c * 16), of_columns);
#pragma unroll
    for (int q = 0; q < 2; ++q) add_to(out.column[c].pair[q], block % 2 == 0 ? x.pair[q] : x.pair[2 + q]);
  }
}

// Level LEVEL >= 1. totals: [LEAVES][D], its reaches, replaced by its sums.
template <int LEVEL>
__device__ __forceinline__ void level_gradients(Gathered& out, const char* tile, const char* pairs, float* totals, int block, int channels) {
  constexpr int half = LEAF << LEVEL;
  const int group = block >> LEVEL, within = block * 16 & (half - 1), leaf = 2 * block;
  const char* rows = Level::Rows::from(tile + Level::rows, group * 2 * half);
  const char* columns = Level::Columns::from(tile + Level::columns, group * half);
  pairs = Pairs::from(pairs, group * 2 * half);
  if (block * 16 & half) {
    rows = Level::Rows::from(rows, within);
    pairs = Pairs::from(pairs, within);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int channel = channels + c * 16;
      Sum a, b;
      clear(a);
      clear(b);
#pragma unroll
      for (int j = 0; j < half; j += 16) {
        const Block<Operand> k = Level::Columns::load_transposed(Level::Columns::from(columns, j), 0, channel);
        product(b, k, Pairs::load_right(pairs, 0, j));
        product(a, k, Pairs::load_right(Pairs::from(pairs, half), 0, j));
      }
      gather(out.dq[c], a, totals, leaf, channel);
      gather(out.row[c], b, totals, leaf, channel);
      const Block<Operand> k = Level::Rows::load_transposed(rows, 0, channel);
      const Block<Operand> q = Level::Rows::load_transposed(Level::Rows::from(rows, half), 0, channel);
      float sum[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) sum[n] = dot(get_pair(q, n), a.pair[n]) + dot(get_pair(k, n), b.pair[n]);
      store_totals(totals, sum, leaf, channel);
    }
  } else {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int channel = channels + c * 16;
      Sum x;
      clear(x);
#pragma unroll
      for (int i = 0; i < 2 * half; i += 16)
        product(x, Level::Rows::load_transposed(Level::Rows::from(rows, i), 0, channel), Pairs::load_right_transposed(Pairs::from(pairs, i), 0, within));
      gather(out.column[c], x, totals, leaf, channel);
      const Block<Operand> k = Level::Columns::load_transposed(Level::Columns::from(columns, within), 0, channel);
      float sum[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) sum[n] = dot(get_pair(k, n), x.pair[n]);
      store_totals(totals, sum, leaf, channel);
    }
  }
}
