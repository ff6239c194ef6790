// The state that enters each segment of a sequence, computed from A and Z of the segments, one segment after another, in float32.
//
// In the forward the state that enters segment s + 1 is A_s S + Z_s. In the backward the gradient of the state that leaves segment
// s - 1 is A_s^T dS + Z'_s. A block has COLUMNS columns of V of one head. Of the product A S each warp computes the terms of 16 rows
// of S, for all rows of the result. No other warp reads the same part of A, so each warp copies its part and waits for it alone.
// A segment that forgets the state that enters it has no A: S is then Z.
#include "kda_chunk.cuh"

constexpr int COLUMNS = 8, THREADS = 2 * D, SHARE = 16;  // SHARE: rows of A^T (in the backward, of A) per warp
constexpr int GROUPS = D / 4;      // groups of four rows of the sum; a lane has one of them, and all columns
constexpr int PARTS = 32 / GROUPS;  // rows of A^T that a warp multiplies at a time
constexpr int PIECE = 4, PIECES = SHARE / PIECE;  // PIECE: rows in a stage of a warp
constexpr int STRIDE = D + 4;      // of partial sums: puts eight columns in different banks
constexpr int STATE_BYTES = D * COLUMNS * 4, PARTIAL_BYTES = 8 * COLUMNS * STRIDE * 4, PIECE_BYTES = PIECE * D * 4;
static_assert(STATE_BYTES + PARTIAL_BYTES + STAGES * PIECE_BYTES * (THREADS / 32) == SHARED_BYTES, "variants.py allocates what this kernel uses");

// matrices: [N, segments, H, D, D], A^T in the forward, A in the backward. offsets: [N, segments, H, K, V], Z.
// start (may be null, zeros): [N, H, K, V], the state that enters the first segment. entries: [N, segments, H, K, V], result.
// forgotten (may be null): [N, H, segments], 1 where A is 0 and its matrix was not written.
// Grid: N x H x V / COLUMNS.
extern "C" __global__ void __launch_bounds__(THREADS) kda_segments(
    const float* matrices, const float* offsets, const float* start, float* entries, const int* forgotten, int segments, int heads, int backward) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  float* state = reinterpret_cast<float*>(shared_memory);                      // [D][COLUMNS]
  float* partial = reinterpret_cast<float*>(shared_memory + STATE_BYTES);      // [8][COLUMNS][STRIDE]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  unsigned char* stages = shared_memory + STATE_BYTES + PARTIAL_BYTES + warp * STAGES * PIECE_BYTES;
  const int group = lane % GROUPS, part = lane / GROUPS;            // while multiplying
  const int column = threadIdx.x % COLUMNS, row = threadIdx.x / COLUMNS * 4;  // while adding up
  const int head = blockIdx.x / (D / COLUMNS) % heads, n = blockIdx.x / (D / COLUMNS) / heads;
  const int mine = row * D + blockIdx.x % (D / COLUMNS) * COLUMNS + column;

  auto segment_of = [&](int step) { return backward ? segments - 1 - step : step; };
  auto matrix_of = [&](int step) {  // its place in an array of states
    return (static_cast<long long>(n * segments + segment_of(step)) * heads + head) * D * D;
  };
  auto has_matrix = [&](int step) { return forgotten == nullptr || forgotten[(static_cast<long long>(n) * heads + head) * segments + segment_of(step)] == 0; };
  auto fetch = [&](int piece) {
    if (piece < (segments - 1) * PIECES && has_matrix(piece / PIECES)) {
      const float* from = matrices + matrix_of(piece / PIECES) + (warp * SHARE + piece % PIECES * PIECE) * D;
#pragma unroll
      for (int at = lane * 4; at < PIECE * D; at += 32 * 4) copy_16_async(stages + piece % STAGES * PIECE_BYTES + at * 4, from + at);
    }
    commit_copies();
  };
  for (int piece = 0; piece < STAGES - 1; ++piece) fetch(piece);

  float x[4] = {0.f, 0.f, 0.f, 0.f};
  if (start != nullptr) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = start[(static_cast<long long>(n) * heads + head) * D * D + mine + i * D];
  }
  for (int step = 0; step < segments; ++step) {
    const long long at = matrix_of(step) + mine;
#pragma unroll
    for (int i = 0; i < 4; ++i) entries[at + i * D] = x[i];
    if (step == segments - 1) break;
    if (!has_matrix(step)) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = offsets[at + i * D];
      for (int p = 0; p < PIECES; ++p) {
        __syncwarp();  // all lanes are done with the stage next to fill
        fetch(step * PIECES + p + STAGES - 1);
      }
      continue;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      state[(row + i) * COLUMNS + column] = x[i];
      x[i] = offsets[at + i * D];
    }
    __syncthreads();  // the state is there for all

    float4 sum[COLUMNS];
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) sum[c] = {0.f, 0.f, 0.f, 0.f};
    for (int p = 0; p < PIECES; ++p) {
      const int piece = step * PIECES + p;
      wait_copies<STAGES - 2>();
      __syncwarp();  // the piece is there for the warp, and all its lanes are done with the stage next to fill
      fetch(piece + STAGES - 1);
      const float* rows = reinterpret_cast<const float*>(stages + piece % STAGES * PIECE_BYTES) + group * 4;
      const float* ys = state + (warp * SHARE + p * PIECE) * COLUMNS;
#pragma unroll
      for (int j = 0; j < PIECE / PARTS; ++j) {
        const int r = j * PARTS + part;
        const float4 a = *reinterpret_cast<const float4*>(rows + r * D);
        float y[COLUMNS];
#pragma unroll
        for (int c = 0; c < COLUMNS; c += 4) {
          const float4 four = *reinterpret_cast<const float4*>(ys + r * COLUMNS + c);
          y[c] = four.x, y[c + 1] = four.y, y[c + 2] = four.z, y[c + 3] = four.w;
        }
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
          sum[c].x = fmaf(a.x, y[c], sum[c].x);
          sum[c].y = fmaf(a.y, y[c], sum[c].y);
          sum[c].z = fmaf(a.z, y[c], sum[c].z);
          sum[c].w = fmaf(a.w, y[c], sum[c].w);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c)
      *reinterpret_cast<float4*>(partial + ((warp * PARTS + part) * COLUMNS + c) * STRIDE + group * 4) = sum[c];
    __syncthreads();  // the sums are there for all, and all have read the state
#pragma unroll
    for (int s = 0; s < 8; ++s) {
      const float4 y = *reinterpret_cast<const float4*>(partial + (s * COLUMNS + column) * STRIDE + row);
      x[0] += y.x, x[1] += y.y, x[2] += y.z, x[3] += y.w;
    }
  }
}
