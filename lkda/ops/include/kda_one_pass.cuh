// What chunk_fwd.cu and chunk_fwd_pair.cu share: what their teams read, and all that their scanners do. Their comments explain both.
//
// Macros, besides those of kda_chunk.cuh: VALUE (type in memory of v and o). The including file defines FIRST_SCANNER, the number of
// threads before the scanners.
#pragma once
#include "kda_half_operands.cuh"
#include "kda_leaf_products.cuh"
#include "kda_scale.cuh"
#include "kda_solve.cuh"

using Value = VALUE;
constexpr int COLUMNS = 64;                  // of V, of a block
constexpr int SCANNERS = 32 * COLUMNS / 16;  // threads
using Values = Tile<Value, C, COLUMNS>;
static_assert(HALVES && SCANNERS == 128, "the scanners are one warp group");

// The arguments of the kernel, and what this block computes: COLUMNS columns of V of one head of one sequence. v, o and the states begin
// at the first of them.
struct Arguments {
  const Element *q, *k;
  const Value* v;
  const float *g, *beta, *initial_state;
  Value* o;
  float* final_state;
  int heads, head, sequence, length, chunks;
  float scale;

  __device__ __forceinline__ Span span(int m) const { return {sequence, sequence * length + m * C, min(C, length - m * C), m == 0, m == chunks - 1}; }
  // The first channel of a token.
  __device__ __forceinline__ long long at(int token) const { return ((static_cast<long long>(sequence) * length + token) * heads + head) * D; }
  __device__ __forceinline__ long long state() const { return (static_cast<long long>(sequence) * heads + head) * D * D; }
};

// Teams.

// What a thread reads of a chunk: two channels of one leaf, and beta of the token that has the thread's number.
struct ChunkInputs {
  Leaf<float> nats;
  Leaf<Element> q, k;
  float beta = 0.f;

  template <class Team>
  __device__ __forceinline__ void read(const Arguments& given, int m, const Team& team) {
    const Span span = given.span(m);
    const int leaf = team.leaf(), channel = team.channel(), token = team.thread();
    nats.read(given.g, span, given.heads, given.head, leaf, channel);
    q.read(given.q, span, given.heads, given.head, leaf, channel);
    k.read(given.k, span, given.heads, given.head, leaf, channel);
    if (token < C) beta = token < span.tokens ? given.beta[static_cast<long long>(span.start + token) * given.heads + given.head] : 0.f;
  }
};

// The operands of LeafProducts, 24 rows: eight each in the place of a leaf's rows of k_in, qg and kg, which are written later.
struct LeafOperands {
  static constexpr int bytes = 24 * D * sizeof(float16);
  static __device__ __forceinline__ float16* at(char* leaf, int row, int column) { return Rows::at(leaf + row / LEAF * Rows::bytes, row % LEAF, column); }
  static __device__ __forceinline__ Block<float16> load(char* leaf, int row, int column) {
    Block<float16> rows;
    load_matrices(rows.word, at(leaf, row + lane_id() % 16, column + lane_id() / 16 * 8));
    return rows;
  }
};

// Scanners.

// A thread's number among them.
__device__ __forceinline__ int scanner() { return threadIdx.x - FIRST_SCANNER; }

// A scanner's 16 columns of v of a chunk, which no other warp reads, in pieces of 16 bytes. A lane has four of them.
struct ValuePieces {
  char* values;
  int lane, column;  // the lane's first column

  __device__ __forceinline__ ValuePieces(char* values) : values(values), lane(opaque(threadIdx.x) % 32), column((opaque(threadIdx.x) - FIRST_SCANNER) / 32 * 16 + lane % 2 * 8) {}
  __device__ __forceinline__ int token(int n) const { return n * 16 + lane / 2; }
  __device__ __forceinline__ Value* at(int n) const { return Values::at(values, token(n), column); }

  // Starts copying the pieces. Rows past the last token become zeros.
  __device__ __forceinline__ void fetch(const Arguments& given, int m) const {
    const int tokens = min(C, given.length - m * C);
#pragma unroll
    for (int n = 0; n < 4; ++n) copy_16_async(at(n), given.v + given.at(m * C + min(token(n), tokens - 1)) + column, token(n) < tokens);
    commit_copies();
  }
  // After v has been read, as many other words may be kept in its place.
  __device__ __forceinline__ void keep(const Block<Operand> (&x)[STEPS]) const {
#pragma unroll
    for (int n = 0; n < 4; ++n) *reinterpret_cast<uint4*>(at(n)) = {x[n].word[0], x[n].word[1], x[n].word[2], x[n].word[3]};
  }
  __device__ __forceinline__ void get(Block<Operand> (&x)[STEPS]) const {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const uint4 word = *reinterpret_cast<const uint4*>(at(n));
      x[n] = {{word.x, word.y, word.z, word.w}};
    }
  }
};

constexpr bool KEEPS_ENTRY = STEPS == BLOCKS;
__device__ __forceinline__ void round_state(Block<Operand> (&entry)[STEPS], const Sum (&state)[STEPS]) {
#pragma unroll
  for (int i = 0; i < STEPS; ++i) entry[i] = round_to<Operand>(state[i]);
}

// Multiplies a state by to / from, two powers of two.
__device__ __forceinline__ void change_scale(Sum (&state)[STEPS], float from, float to) {
#pragma unroll
  for (int i = 0; i < STEPS; ++i) {
    scale_all(state[i], inverse_of(from));
    scale_all(state[i], to);
  }
}

// The scale of the initial state.
__device__ __forceinline__ float scale_of_state(const Sum (&state)[STEPS]) {
  float x = 0.f;
#pragma unroll
  for (int i = 0; i < STEPS; ++i)
#pragma unroll
    for (int q = 0; q < 4; ++q) x = max_finite(max_finite(x, state[i].pair[q].x), state[i].pair[q].y);
  return value_scale(amax_in_warp(x));
}

// Where a number of v is too large for the scale of those before it, lowers the scale, and that of the state with it. Infinities
// and NaNs are left out.
__device__ __forceinline__ void lower_scale(float& scale, Sum (&state)[STEPS], const Block<Value> (&values)[BLOCKS]) {
  unsigned largest = above_finite(Value{});
#pragma unroll
  for (int t = 0; t < BLOCKS; ++t)
#pragma unroll
    for (int q = 0; q < 4; ++q) largest = max_of_pairs(largest, (values[t].word[q] & 0x7fff7fffu) + above_finite(Value{}));
  const float2 both = unpack(Value{}, largest - above_finite(Value{}));
  const float needed = value_scale(amax_in_warp(fmaxf(both.x, both.y)));
  if (needed < scale) {
    change_scale(state, scale, needed);
    scale = needed;
  }
}

// -v^T times the scale, which is lowered first where it must be.
__device__ __forceinline__ void load_values(Sum (&x)[BLOCKS], Sum (&state)[STEPS], const char* values, int column, float& scale) {
  Block<Value> blocks[BLOCKS];
#pragma unroll
  for (int t = 0; t < BLOCKS; ++t) blocks[t] = Values::load_transposed(values, t * 16, column);
  lower_scale(scale, state, blocks);
#pragma unroll
  for (int t = 0; t < BLOCKS; ++t)
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const float2 pair = get_pair(blocks[t], q);
      x[t].pair[q] = make_float2(-scale * pair.x, -scale * pair.y);
    }
}

// Writes o of a chunk from o^T in float32.
__device__ __forceinline__ void write_output(const Arguments& given, int m, int column, Sum (&out)[BLOCKS], float factor) {
  const int tokens = min(C, given.length - m * C);
#pragma unroll
  for (int t = 0; t < BLOCKS; ++t) {
    scale_all(out[t], factor);
    Block<Value> rows = round_to<Value>(out[t]);
    rows = {{transpose(rows.word[0]), transpose(rows.word[2]), transpose(rows.word[1]), transpose(rows.word[3])}};
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int token = t * 16 + quadrant_row(q);
      if (token < tokens) store_quadrant(given.o + given.at(m * C + token) + column + quadrant_column(q), rows, q);
    }
  }
}

// Goes through all chunks. values: where a chunk's v lies in shared memory. workspaces: `wait(m)` waits for that of chunk m and says where
// it lies; after `release(m)` this warp does not read it any more.
template <class Workspaces>
__device__ __forceinline__ void scan(const Workspaces& workspaces, char* values, const Arguments& given) {
  const int column = scanner() / 32 * 16;  // the first of the warp's 16 columns of V
  ValuePieces(values).fetch(given, 0);
  float scale = value_scale(0.f);
  Sum state[STEPS];
  if (given.initial_state != nullptr) {
    read_state(state, given.initial_state + given.state() + column, 1.f);
    scale = scale_of_state(state);
    change_scale(state, 1.f, scale);
  } else {
#pragma unroll
    for (int i = 0; i < STEPS; ++i) clear(state[i]);
  }
#pragma unroll 1
  for (int m = 0; m < given.chunks; ++m) {
    wait_copies<0>();
    const char* workspace = workspaces.wait(m);
    const char* pairs = workspace + ChunkWorkspace::pairs;
    const float* beta = reinterpret_cast<const float*>(workspace + ChunkWorkspace::beta);
    const float* decay = reinterpret_cast<const float*>(workspace + ChunkWorkspace::decay);

    Sum x[BLOCKS];  // -r^T, then -v~^T, then v~^T
    load_values(x, state, values, opaque(column), scale);
    __syncwarp();  // the warp has read its columns of v
    Block<Operand> entry[STEPS];
    round_state(entry, state);
    // The rounded state takes no registers while v~ is computed: it is kept in the place of v, or if it is larger it is rounded again.
    if constexpr (KEEPS_ENTRY) ValuePieces(values).keep(entry);
    settle(x);
    open_products();
    products_over_channels(x, entry, workspace + ChunkWorkspace::k_in);
    close_products();
    wait_products<0>();
    settle(x);
    __syncwarp();
    solve(x, pairs, beta);
    __syncwarp();
    Block<Operand> written[BLOCKS];  // v_new^T
#pragma unroll
    for (int t = 0; t < BLOCKS; ++t) {
#pragma unroll
      for (int q = 0; q < 4; ++q) x[t].pair[q] = make_float2(-x[t].pair[q].x, -x[t].pair[q].y);
      scale_columns(x[t], beta + t * 16);
      written[t] = round_to<Operand>(x[t]);
    }
    if constexpr (KEEPS_ENTRY) {
      ValuePieces(values).get(entry);
    } else {
      settle(state);
      round_state(entry, state);
    }
    Sum out[BLOCKS];  // [16 of V, tokens]
#pragma unroll
    for (int t = 0; t < BLOCKS; ++t) clear(out[t]);
#pragma unroll
    for (int i = 0; i < STEPS; ++i) scale_columns(state[i], decay + i * 16);
    settle(out);
    settle(state);
    open_products();
    products_over_channels(out, entry, workspace + ChunkWorkspace::qg);
    close_products();
    products_over_tokens(state, written, workspace + ChunkWorkspace::kg);
    close_products();
    if (m + 1 < given.chunks) ValuePieces(values).fetch(given, m + 1);
    wait_products<1>();
    settle(out);
    add_within_chunk(out, written, pairs);
    wait_products<0>();
    settle(state);
    workspaces.release(m);
    write_output(given, m, opaque(column), out, inverse_of(scale));
  }
  write_state(state, given.final_state + given.state() + column, inverse_of(scale));
}
