// What all KDA kernels share: sizes, the position of a chunk, and the workspace that intra_chunk_fwd writes per chunk and head.
// The notation of all comments is that of docs/reference/mixers.md (h, qg, k_in, kg, Aqk, Akk, T, v_new) and docs/dev/kernels.md (T~, v~, r, Y).
//
// Macros: HEAD_DIM (K = V = D), CHUNK (C tokens), ELEMENT (type in memory of q, k, v, o and their gradients: bfloat16, float16
// or float), OPERAND (type that the tensor cores multiply: float16 with the scales of kda_scale.cuh, or tf32).
#pragma once
#include "tile.cuh"

constexpr int D = HEAD_DIM;
constexpr int C = CHUNK;
constexpr int LEAF = 8;              // tokens of a leaf: their pairs are summed one by one in float32
constexpr int LEAF_BITS = 3;
constexpr int LEAVES = C / LEAF;     // a power of two
constexpr int LEVELS = C == 64 ? 3 : 2;  // halves of 8, 16 (, 32) tokens
constexpr int BLOCKS = C / 16;       // 16-token blocks of a chunk
using Element = ELEMENT;
using Operand = OPERAND;
static_assert(LEAF << LEVELS == C, "the tree of anchors ends at the chunk");

using Rows = Tile<Operand, C, D>;    // tokens x channels
using Square = Tile<Operand, C, C>;  // tokens x tokens
using State = Tile<Operand, D, D, true>;    // V x K: a transposed state
using Columns = Tile<Operand, D, C, true>;  // V x tokens

// A State as it is saved for the backward. In half precision each 16 rows have a power-of-two scale of their own, so that all
// digits are in use: where beta is 0, dg is computed from two states alone and shows their rounding.
constexpr bool HALVES = sizeof(Operand) == 2;
struct SavedState {
  static constexpr int scales = State::bytes;  // float [D / 16][REPEATS]: multiply the rows by this to undo their scale
  static constexpr int REPEATS = 512 / D;      // copies of each scale: 128 bytes in all, so that states begin at a cache line
  static constexpr int bytes = scales + (HALVES ? 128 : 0);
};

// What intra_chunk_fwd writes for one chunk and head: k_in, qg (with the attention scale), kg, the pairs, exp(G_C), and beta (0
// past the end). Pairs: scale Aqk_ij at (i, j) on and below the diagonal; above it T~_ij at (j, i), with
// T = (I + B Akk)^-1 = I + B T~.
struct ChunkWorkspace {
  static constexpr int k_in = 0;
  static constexpr int qg = k_in + Rows::bytes;
  static constexpr int kg = qg + Rows::bytes;
  static constexpr int pairs = kg + Rows::bytes;
  static constexpr int decay = pairs + Square::bytes;
  static constexpr int beta = decay + D * 4;
  static constexpr int bytes = beta + C * 4;
};

// The position of a chunk: `tokens` rows (1..C; 0 where there is no such chunk) of [rows, H, D] from row `start` on.
struct Span {
  int sequence, start, tokens;
  bool first, last;  // whether it is the first or the last chunk of its sequence
};

// spans: int4 (sequence, start, tokens, first + 2 last) of every chunk, or null where each sequence has `length` tokens.
__device__ __forceinline__ Span span_of(int chunk, int length, const int4* spans) {
  if (spans != nullptr) {
    const int4 s = spans[chunk];
    return {s.x, s.y, s.z, (s.w & 1) != 0, (s.w & 2) != 0};
  }
  const int each = (length + C - 1) / C;
  const int sequence = chunk / each, first = (chunk - sequence * each) * C;
  return {sequence, sequence * length + first, min(C, length - first), first == 0, first + C >= length};
}

struct Sequence {
  int start, length, first_chunk;
};

// The position of sequence n. bounds: cu_seqlens [N + 1] followed by the number of chunks before each sequence [N + 1]; null
// where each of the `sequences` has `length` tokens.
__device__ __forceinline__ Sequence sequence_of(int n, int sequences, int length, const int* bounds) {
  if (bounds != nullptr) return {bounds[n], bounds[n + 1] - bounds[n], bounds[sequences + 1 + n]};
  return {n * length, length, n * ((length + C - 1) / C)};
}

// Segment s of a sequence. All segments have equally many chunks, except that the last ones may be shorter or empty.
__device__ __forceinline__ Sequence segment_of(Sequence whole, int s, int segments) {
  const int chunks = (whole.length + C - 1) / C, each = (chunks + segments - 1) / segments;
  const int first = min(s * each, chunks), skipped = min(first * C, whole.length);
  return {whole.start + skipped, min(each * C, whole.length - skipped), whole.first_chunk + first};
}
