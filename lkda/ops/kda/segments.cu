// The state that enters each segment of a sequence, from what each segment does to a state: S -> A S + Z.
//
// Forward: S enters segment s + 1 as A_s S + Z_s. Backwards, of the state's gradient: dS leaves segment s - 1 as
// A_s^T dS + Z'_s. In float32, segment after segment; a block has COLUMNS columns of V of one head.
#include "kda_chunk.cuh"

constexpr int COLUMNS = 8, THREADS = 2 * D;  // a thread has a row of K and four columns
constexpr int PIECE = 16, PIECES = D / PIECE;  // rows of a matrix in a stage of shared memory
constexpr int STATE_BYTES = D * COLUMNS * 4, PIECE_BYTES = PIECE * D * 4;
static_assert(STATE_BYTES + STAGES * PIECE_BYTES == SHARED_BYTES, "cuda.py allocates what this kernel uses");

// matrices: [N, segments, H, D, D], A^T forward, A backwards. offsets: [N, segments, H, K, V], Z.
// start (may be null, zeros): [N, H, K, V], enters the first. entries: [N, segments, H, K, V]. Grid: N x H x V / COLUMNS.
extern "C" __global__ void __launch_bounds__(THREADS) kda_segments(
    const float* matrices, const float* offsets, const float* start, float* entries, int segments, int heads, int backward) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  float4* state = reinterpret_cast<float4*>(shared_memory);  // [D][2]
  unsigned char* stages = shared_memory + STATE_BYTES;
  const int row = threadIdx.x / 2, half = threadIdx.x % 2;
  const int column = blockIdx.x % (D / COLUMNS) * COLUMNS + half * 4;
  const int head = blockIdx.x / (D / COLUMNS) % heads, n = blockIdx.x / (D / COLUMNS) / heads;
  const int mine = row * D + column;

  auto matrix_of = [&](int step) {  // its place in an array of states
    const int s = backward ? segments - 1 - step : step;
    return (static_cast<long long>(n * segments + s) * heads + head) * D * D;
  };
  auto fetch = [&](int piece) {
    if (piece < (segments - 1) * PIECES) {
      const float* from = matrices + matrix_of(piece / PIECES) + piece % PIECES * PIECE * D;
      for (int at = threadIdx.x * 4; at < PIECE * D; at += THREADS * 4) copy_async(stages + piece % STAGES * PIECE_BYTES + at * 4, from + at);
    }
    close_copies();
  };
  for (int piece = 0; piece < STAGES - 1; ++piece) fetch(piece);

  float4 x = {0.f, 0.f, 0.f, 0.f};
  if (start != nullptr) x = *reinterpret_cast<const float4*>(start + (static_cast<long long>(n) * heads + head) * D * D + mine);
  for (int step = 0; step < segments; ++step) {
    const long long at = matrix_of(step) + mine;
    *reinterpret_cast<float4*>(entries + at) = x;
    if (step == segments - 1) break;
    state[threadIdx.x] = x;
    x = *reinterpret_cast<const float4*>(offsets + at);
    for (int p = 0; p < PIECES; ++p) {
      const int piece = step * PIECES + p;
      wait_copies<STAGES - 2>();
      __syncthreads();  // the piece and the state are there for all, and all are done with the stage next to fill
      fetch(piece + STAGES - 1);
      const float* rows = reinterpret_cast<const float*>(stages + piece % STAGES * PIECE_BYTES) + row;
      const float4* ys = state + p * PIECE * 2 + half;
#pragma unroll
      for (int j = 0; j < PIECE; ++j) {
        const float a = rows[j * D];
        const float4 y = ys[j * 2];
        x.x = fmaf(a, y.x, x.x);
        x.y = fmaf(a, y.y, x.y);
        x.z = fmaf(a, y.z, x.z);
        x.w = fmaf(a, y.w, x.w);
      }
    }
    __syncthreads();  // all have read the state
  }
}
