// Chunks that forget: no bit of the state that leaves such a chunk depends on the state that enters it.
//
// In the rounded numbers that the inter-chunk kernels multiply, the entering state goes on in two ways: times exp(G_C), and from a
// row j of k_in to a row i of kg where i = j or where T~_ij links them. A chunk forgets if exp(G_C) is 0 in every channel and no
// such pair of rows has numbers other than 0. The gradient of the state takes the same ways back, so it ends there too. With slow
// gates no chunk forgets. Rows are taken by leaves of 8: a leaf counts if one of its rows does.
//
// float32 inputs are not tested: their chunks have 32 tokens, and the decays of a production model over so few are not 0 in tf32.
#pragma once
#include "kda_inter_chunk.cuh"

constexpr unsigned MAGNITUDE = sizeof(Operand) == 2 ? 0x7fff7fffu : 0x7fffffffu;  // all bits but the signs
constexpr unsigned ALL_LANES = 0xffffffffu;

struct Forgetting {
  char* shared;  // memory of the block: `memory` bytes for a workspace, then unsigned [WARPS]
  static constexpr int memory = (ChunkWorkspace::bytes + 127) / 128 * 128;

  // max or or of x over the block.
  template <class Reduce>
  __device__ __forceinline__ unsigned of_block(unsigned x, const Reduce& reduce) const {
    unsigned* of_warp = reinterpret_cast<unsigned*>(shared + memory);
    __syncthreads();  // what was here has been read
    if (lane_id() == 0) of_warp[threadIdx.x / 32] = x;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) x = reduce(x, of_warp[warp]);
    return x;
  }

  // 1 + the last step before `end` at which exp(G_C) is 0 in every channel; 0 if there is none. step(i): a step's ChunkWorkspace.
  template <class Step>
  __device__ __forceinline__ int last_without_decay(int end, const Step& step) const {
    unsigned last = 0u;
#pragma unroll 4
    for (int i = threadIdx.x / 32; i < end; i += WARPS) {
      const unsigned* decay = reinterpret_cast<const unsigned*>(step(i) + ChunkWorkspace::decay);
      unsigned bits = 0u;
#pragma unroll
      for (int d = 0; d < D / 32; ++d) bits |= decay[d * 32 + lane_id()];
      if (__reduce_or_sync(ALL_LANES, bits) == 0u) last = i + 1;
    }
    return static_cast<int>(of_block(last, [](unsigned a, unsigned b) { return a < b ? b : a; }));
  }

  // The leaves of a tile, one bit each, in which a number is not 0.
  __device__ __forceinline__ unsigned leaves(int tile) const {
    constexpr int ROW = Rows::row_bytes < 128 ? Rows::row_bytes : 128;  // a row of a panel
    unsigned found = 0u;
    for (int at = threadIdx.x * 16; at < Rows::bytes; at += WARPS * 32 * 16)
      if (nonzero(tile + at)) found |= 1u << (at / ROW % C / LEAF);
    return found;
  }
  __device__ __forceinline__ bool nonzero(int at) const {
    const uint4 piece = *reinterpret_cast<const uint4*>(shared + at);
    return ((piece.x | piece.y | piece.z | piece.w) & MAGNITUDE) != 0u;
  }

  // Whether the chunk of this workspace forgets, given that exp(G_C) is 0.
  __device__ __forceinline__ bool forgets(const char* workspace) const {
    __syncthreads();  // what was here has been read
    for (int at = threadIdx.x * 16; at < ChunkWorkspace::bytes; at += WARPS * 32 * 16) copy_16_async(shared + at, workspace + at);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    const unsigned mine = leaves(ChunkWorkspace::k_in) | leaves(ChunkWorkspace::kg) << 16;
    const auto either = [](unsigned a, unsigned b) { return a | b; };
    const unsigned ways = of_block(__reduce_or_sync(ALL_LANES, mine), either);
    const unsigned enter = ways & 0xffffu, leave = ways >> 16, after_all = 1u << LEAVES;
    const unsigned first_to_leave = (leave | after_all) & -(leave | after_all);  // the lowest bit
    if (enter >= first_to_leave) return false;  // a leaf of k_in is one of kg too, or comes after one
    constexpr int PIECE = 16 / sizeof(Operand), PIECES = C / PIECE;
    unsigned linked = 0u;
    for (int n = threadIdx.x; n < C * PIECES; n += WARPS * 32) {  // T~_ij is at (j, i)
      const int j = n / PIECES, i = n % PIECES * PIECE;
      if ((enter >> j / LEAF & leave >> i / LEAF & 1u) && nonzero(ChunkWorkspace::pairs + Square::offset(j, i))) linked = 1u;
    }
    return of_block(__reduce_or_sync(ALL_LANES, linked), either) == 0u;
  }
};
static_assert(Forgetting::memory + WARPS * 4 <= SHARED_BYTES, "it fits where the stages are later");

// The last of `count` steps whose chunk forgets; -1 if there is none. step(i): the ChunkWorkspace of a step. shared: all of it.
template <class Step>
__device__ __forceinline__ int last_forgetting(char* shared, int count, const Step& step) {
  const Forgetting chunk = {shared};
  int end = chunk.last_without_decay(count, step);
  while (end > 0 && !chunk.forgets(step(end - 1))) end = chunk.last_without_decay(end - 1, step);
  __syncthreads();
  return end - 1;
}
