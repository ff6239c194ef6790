// What chunk_fwd.cu and chunk_fwd_pair.cu share: what their teams read, and all that their scanners do. Their comments explain both.
//
// Macros, besides those of kda_chunk.cuh: VALUE (type in memory of v and o), and SAVES (1: a backward follows). The including file defines
// FIRST_SCANNER, the number of threads before the scanners.
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

// What is written for a backward, and read to write it, both as in inter_chunk_fwd.cu.
struct Saved {
  const float *amax, *entering;           // the largest |v| of each chunk, and the whole initial state
  char *workspaces, *states, *v_tilde;
  float* scales;
  int column;                             // the first one of this block
};

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
#if SAVES
  Saved saved;
#endif

  __device__ __forceinline__ Span span(int m) const { return {sequence, sequence * length + m * C, min(C, length - m * C), m == 0, m == chunks - 1}; }
  // The first channel of a token.
  __device__ __forceinline__ long long at(int token) const { return ((static_cast<long long>(sequence) * length + token) * heads + head) * D; }
  // beta of a chunk's token. It is 0 past the end.
  __device__ __forceinline__ const float* beta_at(int m, int token) const { return beta + static_cast<long long>(span(m).start + token) * heads + head; }
  __device__ __forceinline__ float beta_of(int m, int token) const { return token < span(m).tokens ? *beta_at(m, token) : 0.f; }
  __device__ __forceinline__ long long state() const { return (static_cast<long long>(sequence) * heads + head) * D * D; }
  // The number of a chunk and head among all, in the order of what is saved.
  __device__ __forceinline__ long long item(int m) const { return (static_cast<long long>(sequence) * chunks + m) * heads + head; }
};

// Teams.

// What a thread reads of a chunk: two channels of one leaf.
struct ChunkInputs {
  Leaf<float> nats;
  Leaf<Element> q, k;

  template <class Team>
  __device__ __forceinline__ void read(const Arguments& given, int m, const Team& team) {
    const Span span = given.span(m);
    const int leaf = team.leaf(), channel = team.channel();
    nats.read(given.g, span, given.heads, given.head, leaf, channel);
    q.read(given.q, span, given.heads, given.head, leaf, channel);
    k.read(given.k, span, given.heads, given.head, leaf, channel);
  }
};

// Scanners.

// The first of the warp's 16 columns of V. It is computed again for each use, to save a register.
__device__ __forceinline__ int scanner_column() { return (opaque(threadIdx.x) - FIRST_SCANNER) / 32 * 16; }

// A scanner's 16 columns of v of a chunk, which no other warp reads, in pieces of 16 bytes. A lane has four of them.
struct ValuePieces {
  char* values;
  int lane, column;  // the lane's first column

  __device__ __forceinline__ ValuePieces(char* values) : values(values), lane(opaque(threadIdx.x) % 32), column(scanner_column() + lane % 2 * 8) {}
  __device__ __forceinline__ int token(int n) const { return n * 16 + lane / 2; }
  __device__ __forceinline__ Value* at(int n) const { return Values::at(values, token(n), column); }

  // Starts copying the pieces. Rows past the last token become zeros.
  __device__ __forceinline__ void fetch(const Arguments& given, int m) const {
    const int tokens = min(C, given.length - m * C);
#pragma unroll
    for (int n = 0; n < 4; ++n) copy_16_async(at(n), given.v + given.at(m * C + min(token(n), tokens - 1)) + column, token(n) < tokens);
    commit_copies();
  }
  // After v has been read, four blocks may be kept in its place.
  __device__ __forceinline__ void keep(const Block<Operand>* x) const {
#pragma unroll
    for (int n = 0; n < 4; ++n) *reinterpret_cast<uint4*>(at(n)) = {x[n].word[0], x[n].word[1], x[n].word[2], x[n].word[3]};
  }
  __device__ __forceinline__ void get(Block<Operand>* x) const {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const uint4 word = *reinterpret_cast<const uint4*>(at(n));
      x[n] = {{word.x, word.y, word.z, word.w}};
    }
  }
};

// Whether the product for the output is started before v~ is computed, as in inter_chunk_fwd.cu. If not, the rounded state is kept in the place of v
// meanwhile, so that it takes no registers. With SAVES that product is waited for before v~ is computed: while it runs its left operand
// takes registers, and with those for saving v~ there are too few. The compiler would then wait for each part of each product.
constexpr bool IN_BACKGROUND = STEPS > BLOCKS;
static_assert(IN_BACKGROUND || !SAVES, "heads of 128");

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

#if SAVES
// The one scale of the head, for all chunks and columns, because the backward multiplies what they saved. As SharedScale::find.
__device__ __forceinline__ float scale_of_head(const Arguments& given) {
  const Sequence whole = {given.sequence * given.length, given.length, given.sequence * given.chunks};
  const float* entering = given.saved.entering;
  const float scale = value_scale(amax_of_sequence(given.saved.amax, whole, given.heads, given.head, entering == nullptr ? nullptr : entering + given.state()));
  if (given.saved.column == 0 && threadIdx.x == FIRST_SCANNER) given.saved.scales[given.sequence * given.heads + given.head] = scale;
  return scale;
}

// Saves the state that enters a chunk, and a block of v~^T.
__device__ __forceinline__ void save_entry(const Arguments& given, int m, const Sum (&state)[STEPS]) {
  save_state(given.saved.states + given.item(m) * SavedState::bytes, given.saved.column + scanner_column(), state);
}
__device__ __forceinline__ void save_residual(const Arguments& given, int m, int t, const Sum& x) {
  write_block<Columns>(given.saved.v_tilde + given.item(m) * Columns::bytes, given.saved.column + scanner_column(), t * 16, round_to<Operand>(x));
}
#else  // never called
__device__ __forceinline__ float scale_of_head(const Arguments&) { return 0.f; }
__device__ __forceinline__ void save_entry(const Arguments&, int, const Sum (&)[STEPS]) {}
__device__ __forceinline__ void save_residual(const Arguments&, int, int, const Sum&) {}
#endif

// Reads the initial state, or zeros, and returns the scale of both.
__device__ __forceinline__ float begin(Sum (&state)[STEPS], const Arguments& given) {
  float scale = SAVES ? scale_of_head(given) : value_scale(0.f);
  if (given.initial_state != nullptr) {
    read_state(state, given.initial_state + given.state() + scanner_column(), SAVES ? scale : 1.f);
    if constexpr (!SAVES) {
      scale = scale_of_state(state);
      change_scale(state, 1.f, scale);
    }
  } else {
#pragma unroll
    for (int i = 0; i < STEPS; ++i) clear(state[i]);
  }
  return scale;
}

// -v^T times the scale, which is lowered first where it must be.
__device__ __forceinline__ void load_values(Sum (&x)[BLOCKS], Sum (&state)[STEPS], const char* values, int column, float& scale) {
  Block<Value> blocks[BLOCKS];
#pragma unroll
  for (int t = 0; t < BLOCKS; ++t) blocks[t] = Values::load_transposed(values, t * 16, column);
  if constexpr (!SAVES) lower_scale(scale, state, blocks);
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

// Goes through all chunks. values: where a chunk's v lies in shared memory. workspaces: `has(m)` says whether there is a chunk m; `wait(m)` waits for its workspace and
// says where it lies; after `release(m)` this warp does not read it any more.
template <class Workspaces>
__device__ __forceinline__ void scan(const Workspaces& workspaces, char* values, const Arguments& given) {
  ValuePieces(values).fetch(given, 0);
  Sum state[STEPS];
  float scale = begin(state, given);
#pragma unroll 1
  for (int m = 0; workspaces.has(m); ++m) {
    // Here and not while products run, for which there would be too few registers. If the teams are slower, the scanner would only wait.
    if constexpr (SAVES) save_entry(given, m, state);
    wait_copies<0>();
    const char* workspace = workspaces.wait(m);
    const char* pairs = workspace + ChunkWorkspace::pairs;
    const float* beta = reinterpret_cast<const float*>(workspace + ChunkWorkspace::beta);
    const float* decay = reinterpret_cast<const float*>(workspace + ChunkWorkspace::decay);

    Sum x[BLOCKS];  // -r^T, then -v~^T, then v~^T
    load_values(x, state, values, scanner_column(), scale);
    __syncwarp();  // the warp has read its columns of v
    Block<Operand> entry[STEPS];
#pragma unroll
    for (int i = 0; i < STEPS; ++i) entry[i] = round_to<Operand>(state[i]);
    if constexpr (!IN_BACKGROUND) ValuePieces(values).keep(entry);
    Sum out[BLOCKS];  // [16 of V, tokens]
    const auto multiply_by_qg = [&] {
      products_over_channels(out, entry, workspace + ChunkWorkspace::qg);
      close_products();
      if (workspaces.has(m + 1)) ValuePieces(values).fetch(given, m + 1);
    };
    settle(x);
    if constexpr (IN_BACKGROUND) {
#pragma unroll
      for (int t = 0; t < BLOCKS; ++t) clear(out[t]);
      settle(out);
    }
    open_products();
    products_over_channels(x, entry, workspace + ChunkWorkspace::k_in);
    close_products();
    if constexpr (IN_BACKGROUND) multiply_by_qg();
    wait_products<IN_BACKGROUND && !SAVES ? 1 : 0>();
    settle(x);
    if constexpr (SAVES) settle(out);
    __syncwarp();
    solve(x, pairs, beta);
    __syncwarp();
    Block<Operand> written[BLOCKS];  // v_new^T
#pragma unroll
    for (int t = 0; t < BLOCKS; ++t) {
#pragma unroll
      for (int q = 0; q < 4; ++q) x[t].pair[q] = make_float2(-x[t].pair[q].x, -x[t].pair[q].y);
      if constexpr (SAVES) save_residual(given, m, t, x[t]);
      scale_columns(x[t], beta + t * 16);
      written[t] = round_to<Operand>(x[t]);
    }
    if constexpr (!IN_BACKGROUND) {
      ValuePieces(values).get(entry);
#pragma unroll
      for (int t = 0; t < BLOCKS; ++t) clear(out[t]);
    }
#pragma unroll
    for (int i = 0; i < STEPS; ++i) scale_columns(state[i], decay + i * 16);
    if constexpr (!IN_BACKGROUND) settle(out);
    settle(state);
    open_products();
    if constexpr (!IN_BACKGROUND) multiply_by_qg();
    products_over_tokens(state, written, workspace + ChunkWorkspace::kg);
    close_products();
    wait_products<1>();
    settle(out);
    add_within_chunk(out, written, pairs);
    wait_products<0>();
    settle(state);
    workspaces.release(m);
    write_output(given, m, scanner_column(), out, inverse_of(scale));
  }
  write_state(state, given.final_state + given.state() + scanner_column(), inverse_of(scale));
}
