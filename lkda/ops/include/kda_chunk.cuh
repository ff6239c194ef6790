// What every KDA kernel agrees on: sizes, where a chunk lies, and the workspace that `prepare` writes for one chunk and head.
//
// Macros: HEAD_DIM (K = V = D), CHUNK (C tokens), ELEMENT (q k v o and their gradients in memory: bfloat16, float16 or
// float), OPERAND (what tensor cores multiply: float16, in units of kda_scale.cuh, or tf32).
#pragma once
#include "tile.cuh"

constexpr int D = HEAD_DIM;
constexpr int C = CHUNK;
constexpr int LEAF = 8;              // tokens whose pairs are taken one by one in float32
constexpr int LEAF_BITS = 3;
constexpr int LEAVES = C / LEAF;     // a power of two
constexpr int LEVELS = C == 64 ? 3 : 2;  // halves of 8, 16 (, 32) tokens
constexpr int BLOCKS = C / 16;       // 16-token blocks of a chunk
using Element = ELEMENT;
using Operand = OPERAND;
static_assert(LEAF << LEVELS == C, "the tree of anchors ends at the chunk");

using Rows = Tile<Operand, C, D>;    // tokens x channels
using Square = Tile<Operand, C, C>;  // tokens x tokens
using State = Tile<Operand, D, D, true>;    // V x K: a state, transposed
using Columns = Tile<Operand, D, C, true>;  // V x tokens

// A State as it is kept for the backward. Halves come with a power of two for every 16 rows, all digits in use: where nothing is
// written, dg is made of two states and nothing else.
constexpr bool HALVES = sizeof(Operand) == 2;
struct SavedState {
  static constexpr int scales = State::bytes;  // float [D / 16][REPEATS]: what the rows are to be multiplied by
  static constexpr int REPEATS = 512 / D;      // of each: 128 bytes, so that states begin where lines do
  static constexpr int bytes = scales + (HALVES ? 128 : 0);
};

// ChunkWorkspace: k_in = pre k, qg = scale pre q, kg = suf k, the pairs, Gam = the product of E over the chunk, beta (0 past the end).
// Pairs: on and below the diagonal scale P_ij at (i, j); above it T~_ij at (j, i), where T = (I + B M)^-1 = I + B T~.
struct ChunkWorkspace {
  static constexpr int k_in = 0;
  static constexpr int qg = k_in + Rows::bytes;
  static constexpr int kg = qg + Rows::bytes;
  static constexpr int pairs = kg + Rows::bytes;
  static constexpr int decay = pairs + Square::bytes;
  static constexpr int beta = decay + D * 4;
  static constexpr int bytes = beta + C * 4;
};

// A chunk: `tokens` (1..C; 0 where this chunk does not exist) from row `start` of [rows, H, D], in a sequence.
struct Span {
  int sequence, start, tokens;
  bool first, last;  // of its sequence
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

// bounds: cu_seqlens [N + 1] followed by the number of chunks before each sequence [N + 1], or null.
__device__ __forceinline__ Sequence sequence_of(int n, int sequences, int length, const int* bounds) {
  if (bounds != nullptr) return {bounds[n], bounds[n + 1] - bounds[n], bounds[sequences + 1 + n]};
  return {n * length, length, n * ((length + C - 1) / C)};
}

// Segment s of `segments` runs of equally many chunks; the last ones may be shorter, or empty.
__device__ __forceinline__ Sequence segment_of(Sequence whole, int s, int segments) {
  const int chunks = (whole.length + C - 1) / C, each = (chunks + segments - 1) / segments;
  const int first = min(s * each, chunks), skipped = min(first * C, whole.length);
  return {whole.start + skipped, min(each * C, whole.length - skipped), whole.first_chunk + first};
}
