// What inter_chunk_fwd.cu and inter_chunk_bwd.cu share: the pipeline that copies one chunk after another from global to shared
// memory, and the scale of what a warp computes.
//
// A block has WIDTH columns of V of one head of one segment, 16 columns per warp, and goes through the segment's chunks. All
// warps read the same ChunkWorkspace and the same rows of v (and do, in the backward). They lie in one of STAGES stages of
// shared memory, which are filled in turn: while one chunk is computed on, the next STAGES - 1 are being copied.
//
// Macros, besides those of kda_chunk.cuh: WARPS of a block, STAGES, SHARED_BYTES of a block, SUMMARY (1: compute A and Z of a
// segment alone), WARPGROUPS (1: multiply with wgmma). The including file defines STREAMS, the number of [T, V] tensors that
// it reads (v; or v and do), and COLUMNS, the number of columns of a head that all blocks together compute.
#pragma once
#include "kda_scale.cuh"
#if WARPGROUPS
#include "warpgroup.cuh"
#endif

static_assert(!WARPGROUPS || WARPS % 4 == 0, "wgmma is an instruction of four warps");
constexpr int WIDTH = WARPS * 16;        // columns of a block
constexpr int SPLITS = COLUMNS / WIDTH;  // blocks of a head
constexpr int VALUES = WIDTH < D ? WIDTH : D;  // columns of V of a block
using Values = Tile<Element, C, VALUES>;

struct Stage {
  static constexpr int workspace = 0;
  static constexpr int values = (ChunkWorkspace::bytes + 127) / 128 * 128;  // Values: v; in the backward do, then v
  static constexpr int bytes = (values + STREAMS * Values::bytes + 1023) / 1024 * 1024;
  static constexpr int scales = bytes - WARPS * 4;  // of the first stage: float [WARPS]
};
static_assert(Stage::values + STREAMS * Values::bytes <= Stage::scales, "the scales fit where a stage is rounded up");
static_assert(STAGES * Stage::bytes == SHARED_BYTES, "variants.py allocates what this kernel uses");

// Whether this kernel can be launched with optional segments (inter_chunk_fwd.cu). Wider heads have two blocks, so they rarely leave
// multiprocessors without work, and their kernels have no registers to spare.
constexpr bool OPTIONAL = !SUMMARY && HALVES && D <= 64;

// Returns x. For 32-bit operands the compiler computes x again at each use instead of holding it in a register.
__device__ __forceinline__ int recomputed(int x) { return sizeof(Operand) == 4 ? opaque(x) : x; }

// Starts copying one chunk's workspace into a stage.
__device__ __forceinline__ void fetch_workspace(char* stage, const char* workspace) {
  for (int at = recomputed(threadIdx.x) * 16; at < ChunkWorkspace::bytes; at += WARPS * 32 * 16) copy_16_async(stage + Stage::workspace + at, workspace + at);
}

// Starts copying a chunk's rows of `values` [rows, H, D], from column `first` on. Rows past the last token become zeros.
__device__ __forceinline__ void fetch_values(char* to, const Element* values, int start, int tokens, int heads, int head, int first) {
  constexpr int THREADS = WARPS * 32, PIECE = 16 / sizeof(Element), PIECES = VALUES / PIECE;
  for (int n = recomputed(threadIdx.x); n < C * PIECES; n += THREADS) {
    const int t = n / PIECES, column = n % PIECES * PIECE;
    const long long row = start + min(t, tokens - 1);
    copy_16_async(Values::at(to, t, column), values + (row * heads + head) * D + first + column, t < tokens);
  }
}

// Makes this thread's copies that have arrived visible to wgmma of all warps, from the next barrier on.
__device__ __forceinline__ void show_copies() {
#if WARPGROUPS
  show_to_products();
#endif
}

// Before the first chunk: starts the copies of the first STAGES - 1. fetch(m) starts and commits the copies of the m-th chunk of this
// block. Past the last chunk an empty group is committed, because wait_copies counts groups.
template <class Fetch>
__device__ __forceinline__ void fill_pipeline(int chunks, const Fetch& fetch) {
  for (int m = 0; m < STAGES - 1; ++m) {
    if (m < chunks) {
      fetch(m);
    } else {
      commit_copies();
    }
  }
}

// At the beginning of chunk m: waits until it is in its stage for all warps, and starts the copies of the chunk that takes the
// stage of chunk m - 1, which all warps are done with after the barrier.
template <class Fetch>
__device__ __forceinline__ void advance_pipeline(int m, int chunks, const Fetch& fetch) {
  if constexpr (STAGES == 1) {
    __syncthreads();  // all warps are done with the chunk before
    fetch(m);
    wait_copies<0>();
    __syncthreads();
  } else {
    wait_copies<STAGES - 2>();
    show_copies();
    __syncthreads();
    if (m + STAGES - 1 < chunks) {
      fetch(m + STAGES - 1);
    } else {
      commit_copies();
    }
  }
}

// The power-of-two scale of what this warp computes (kda_scale.cuh). It is kept in shared memory to save a register.
struct SharedScale {
  char* shared;

  __device__ __forceinline__ volatile float* at() const {
    return reinterpret_cast<volatile float*>(shared + Stage::scales) + opaque(threadIdx.x) / 32;
  }
  __device__ __forceinline__ void set(float scale) const {
    if (lane_id() == 0) *at() = scale;
    __syncwarp();
  }
  // Computes the scale of head `head` of sequence n, SCALE_OF(its largest number), and stores it.
  // amax: [chunks, H]. states (may be null): [N, H, K, V], at one end of each sequence. scales (may be null): [N, H], result.
  template <float (*SCALE_OF)(float)>
  __device__ __forceinline__ void find(int n, const Sequence& whole, int heads, int head, const float* amax, const float* states, float* scales) const {
    const long long of_head = static_cast<long long>(n) * heads + head;
    set(SCALE_OF(amax_of_sequence(amax, whole, heads, head, states == nullptr ? nullptr : states + of_head * D * D)));
    if (scales != nullptr && threadIdx.x == 0) scales[of_head] = get();
  }
  __device__ __forceinline__ float get() const { return HALVES ? *at() : 1.f; }
  __device__ __forceinline__ float inverse() const { return HALVES ? inverse_of(get()) : 1.f; }
};
