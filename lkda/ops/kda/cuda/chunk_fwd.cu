// The forward in one kernel, where no backward follows: what intra_chunk_fwd.cu and inter_chunk_fwd.cu compute, but the
// ChunkWorkspaces stay in shared memory. For heads of 64 in half precision on Hopper. One block per head of a sequence.
//
// With PRODUCTS pairs inside a leaf are multiplied on tensor cores, and the factors of all operands are rounded to float16, as
// intra_chunk_fwd_helpers.cu does. Without, all bits are those of intra_chunk_fwd.cu.
//
// A block has two teams of eight warps and four scanners. Team t computes the ChunkWorkspaces of the chunks t, t + 2, t + 4, ...,
// each in one of SLOTS slots. The scanners go from chunk to chunk, and have all 64 columns of V. Without PRODUCTS they first find the
// largest |v| of the sequence, for its scale, while the teams compute the first two chunks. With PRODUCTS each scanner has a scale
// of its own for its columns, that of the largest |v| so far.
//
// A team and the scanners meet once for each chunk, at the barrier FILLED + t. The team has then filled the slot of chunk m, and the
// scanners are done with chunk m - 1. So when the team goes on to chunk m + 2, the slot of chunk m - 1 is free for it.
#include "kda_half_operands.cuh"
#include "kda_intra_chunk.cuh"
#include "kda_leaf_products.cuh"
#include "kda_scale.cuh"
#include "kda_solve.cuh"
#include "named_barrier.cuh"
#include "registers.cuh"

using Value = VALUE;
using Values = Tile<Value, C, D>;
constexpr int TEAMS = 2, SCANNERS = 128, SLOTS = TEAMS + 1;
constexpr int AMONG_TEAM = 1, FILLED = AMONG_TEAM + TEAMS, AMONG_SCANNERS = FILLED + TEAMS;  // barriers; the first two are one for each team
static_assert(D == 64 && HALVES && THREADS == 256, "a warp has 16 columns of V, and a team's registers fit");

struct Memory {
  static constexpr int slot = (ChunkWorkspace::bytes + 1023) / 1024 * 1024;
  static constexpr int values = SLOTS * slot;              // Values
  static constexpr int teams = values + Values::bytes;     // Shared of each team
  static constexpr int amax = ChunkWorkspace::bytes;       // float [4], behind the first slot's workspace
  static constexpr int bytes = teams + TEAMS * Shared::bytes;
};
static_assert(Memory::amax + SCANNERS / 32 * 4 <= Memory::slot, "it fits where a slot is rounded up");
static_assert(Memory::bytes == SHARED_BYTES, "variants.py allocates what this kernel uses");

__device__ __forceinline__ char* slot_of(char* memory, int m) { return memory + m % SLOTS * Memory::slot; }

// The arguments of the kernel, and what this block computes: one head of one sequence.
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

// A team's warp has one leaf, and its lanes have two channels each.
struct Team {
  int warp;  // of the block

  __device__ __forceinline__ int number() const { return warp / LEAVES; }
  __device__ __forceinline__ int leaf() const { return warp % LEAVES; }
  __device__ __forceinline__ int thread() const { return threadIdx.x % THREADS; }
  __device__ __forceinline__ int opaque_thread() const { return opaque(threadIdx.x) % THREADS; }
  __device__ __forceinline__ int channel() const { return opaque(threadIdx.x) % 32 * 2; }
  __device__ __forceinline__ void wait() const { wait_at_barrier(AMONG_TEAM + number(), THREADS); }
};

// What a thread reads of a chunk: two channels of one leaf, and beta of the token that has the thread's number.
struct ChunkInputs {
  Leaf<float> nats;
  Leaf<Element> q, k;
  float beta = 0.f;

  __device__ __forceinline__ void read(const Element* q_of_all, const Element* k_of_all, const float* g, const float* beta_of_all, const Span& span, int heads, int head, int leaf, int channel, int thread) {
    nats.read(g, span, heads, head, leaf, channel);
    q.read(q_of_all, span, heads, head, leaf, channel);
    k.read(k_of_all, span, heads, head, leaf, channel);
    if (thread < C) beta = thread < span.tokens ? beta_of_all[static_cast<long long>(span.start + thread) * heads + head] : 0.f;
  }
};

// A thread's part of q or k, which lies in shared memory in place of a Square that is written later, to save registers.
struct SharedLeaf {
  volatile unsigned* pair;

  __device__ __forceinline__ SharedLeaf(char* square, int thread) : pair(reinterpret_cast<volatile unsigned*>(square) + thread) {
    static_assert(LEAF * THREADS * 4 <= Square::bytes, "it fits");
  }
  __device__ __forceinline__ void set(const Leaf<Element>& leaf) const {
#pragma unroll
    for (int i = 0; i < LEAF; ++i) pair[i * THREADS] = leaf.pair[i];
  }
  __device__ __forceinline__ float2 operator[](int i) const { return unpack(Element{}, pair[i * THREADS]); }
};

// Writes the operands of all levels, and k_in, qg and kg, as intra_chunk_fwd.cu does, but one matrix after another, which takes fewer
// registers.
__device__ __forceinline__ void write_operands(const Team& team, char* shared, char* workspace, const Gates& gates, const SharedLeaf& q, const SharedLeaf& k, float scale) {
  const float* leaf_logs = reinterpret_cast<const float*>(shared + Shared::leaf_logs);
  const int leaf = team.leaf();
  Reach reach;
  float2 near[LEVELS];  // the reach on each level
#pragma unroll
  for (int level = 0; level < LEVELS; ++level) {
    near[level] = reach.at(level, leaf);
    reach.widen_both(leaf_logs, level, leaf, team.channel());
  }
  reach.before = exp2_fast(reach.before);
  reach.after = exp2_fast(reach.after);
  float2 x[LEAF];  // k or q, times the product inside the leaf
  auto write_rows = [&](int matrix, bool of_q) {
    const int channel = team.channel();
#pragma unroll
    for (int level = 0; level < LEVELS; ++level)
      if (Level::is_row(level, leaf)) Level::write_rows(shared + Shared::tree + level * Level::bytes, level, leaf, channel, near[level], x, of_q);
    char* to = Rows::from(workspace + matrix, leaf * LEAF);
#pragma unroll
    for (int i = 0; i < LEAF; ++i) store_pair(Rows::at(to, i, channel), times(reach.before, x[i]));
    __syncwarp();
  };
  gates.rows(make_float2(1.f, 1.f), [&](int i, float2 f) { x[i] = times(f, k[i]); });
  write_rows(ChunkWorkspace::k_in, false);
  gates.rows(make_float2(1.f, 1.f), [&](int i, float2 f) { x[i] = times(make_float2(scale * f.x, scale * f.y), q[i]); });
  write_rows(ChunkWorkspace::qg, true);
  gates.columns(make_float2(1.f, 1.f), [&](int j, float2 f) { x[j] = times(f, k[j]); });
  const int channel = team.channel();
#pragma unroll
  for (int level = 0; level < LEVELS; ++level)
    if (!Level::is_row(level, leaf)) Level::write_columns(shared + Shared::tree + level * Level::bytes, level, leaf, channel, near[level], x);
  char* kg = Rows::from(workspace + ChunkWorkspace::kg, leaf * LEAF);
#pragma unroll
  for (int j = 0; j < LEAF; ++j) store_pair(Rows::at(kg, j, channel), times(reach.after, x[j]));
  __syncwarp();
}

// Akk and Aqk inside a leaf, on tensor cores. The operands lie where the warp's rows of k_in, qg and kg are written later.
__device__ __forceinline__ void multiply_leaf(const Team& team, char* shared, char* workspace, const Gates& gates, const Leaf<float16>& q, const Leaf<float16>& k, float scale) {
  const int first = team.leaf() * LEAF;
  const LeafProducts<Rows::bytes> products(Rows::from(workspace, first), gates, q, k);
  const LeafSums neighbours = products.neighbours(), farther = products.farther(gates);
  char* pairs = workspace + ChunkWorkspace::pairs;
  float* corner = reinterpret_cast<float*>(shared + Shared::corner) + first * 17 + first % 16;
  for_neighbours(
      neighbours, [&](int i, int j, float a) { corner[i * 17 + j] = a; },
      [&](int i, int j, float a) { store_one(Square::at(pairs, first + i, first + j), scale * a); });
  for_farther(
      farther,
      [&](int i, int j, float2 a) {
        corner[i * 17 + j] = a.x;
        corner[i * 17 + j + 1] = a.y;
      },
      [&](int i, int j, float2 a) { store_pair(Square::at(pairs, first + i, first + j), times(make_float2(scale, scale), a)); });
}

// The same as write_operands, with factors in float16.
__device__ __forceinline__ void write_half_operands(const Team& team, char* shared, char* workspace, const Gates& gates, const Leaf<float16>& q, const Leaf<float16>& k, float scale) {
  const float* leaf_logs = reinterpret_cast<const float*>(shared + Shared::leaf_logs);
  Reach reach;
  unsigned near[LEVELS];
#pragma unroll
  for (int level = 0; level < LEVELS; ++level) {
    near[level] = pack(float16{}, reach.at(level, team.leaf()));
    reach.widen_both(leaf_logs, level, team.leaf(), team.channel());
  }
  reach.before = exp2_fast(reach.before);
  reach.after = exp2_fast(reach.after);
  struct {
    int leaf, channel;
  } const place = {team.leaf(), team.channel()};
  write_workspace(workspace, place, gates, reach, q, k, scale);
  __syncwarp();
  write_levels(shared + Shared::tree, place, gates, near, q, k);
  __syncwarp();
}

__device__ __forceinline__ void compute_chunks(char* memory, const Arguments& given, const Team& team) {
  char* shared = memory + Memory::teams + team.number() * Shared::bytes;
  ChunkInputs inputs;
  auto ask = [&](int chunk) {  // past the last chunk the last one: if nothing were read there, the old inputs would need registers
    const int m = min(chunk, given.chunks - 1);
    inputs.read(given.q, given.k, given.g, given.beta, given.span(m), given.heads, given.head, team.leaf(), team.channel(), team.thread());
  };
  ask(team.number());
#pragma unroll 1
  for (int m = team.number(); m < given.chunks; m += TEAMS) {
    char* slot = slot_of(memory, m);
    if (team.thread() < C) {
      reinterpret_cast<float*>(shared + Shared::beta)[team.thread()] = inputs.beta;
      reinterpret_cast<float*>(slot + ChunkWorkspace::beta)[team.thread()] = inputs.beta;
    }
    Gates gates;
    gates.set(inputs.nats);
    Gates::share(inputs.nats, reinterpret_cast<float*>(shared + Shared::leaf_logs), team.leaf(), team.channel());
    if constexpr (PRODUCTS) {
      const Leaf<float16> q = in_float16(inputs.q), k = in_float16(inputs.k);
      multiply_leaf(team, shared, slot, gates, q, k, given.scale);
      team.wait();  // the sums of all leaves' logs are there
      write_half_operands(team, shared, slot, gates, q, k, given.scale);
    } else {
      const SharedLeaf q(shared + Shared::below, team.thread()), k(shared + Shared::pairs, team.thread());
      q.set(inputs.q);
      k.set(inputs.k);
      team.wait();
      write_operands(team, shared, slot, gates, q, k, given.scale);
      leaf_pairs(team, shared, slot + ChunkWorkspace::pairs, team.leaf(), gates, q, k, given.scale);
    }
    ask(m + TEAMS);
    slot = slot_of(memory, opaque(m));  // computed again, to save registers
    pairs_and_inverse<true>(team, shared, slot + ChunkWorkspace::pairs, slot, PRODUCTS ? given.scale : 1.f);
    show_to_products();
    wait_at_barrier(FILLED + team.number(), THREADS + SCANNERS);
  }
}

// Scanners.

__device__ __forceinline__ int scanner() { return threadIdx.x - TEAMS * THREADS; }

// The power-of-two scale of v and the state (kda_scale.cuh).
__device__ __forceinline__ float find_scale(char* memory, const Arguments& given) {
  float x = packed_amax_of_rows<SCANNERS>(given.v + given.at(0), given.length, given.heads, scanner());
  if (given.initial_state != nullptr) {
    const float* state = given.initial_state + given.state();
#pragma unroll 4
    for (int i = scanner(); i < D * D; i += SCANNERS) x = max_finite(x, state[i]);
  }
  x = amax_in_warp(x);
  float* of_warps = reinterpret_cast<float*>(memory + Memory::amax);
  if (lane_id() == 0) of_warps[scanner() / 32] = x;
  wait_at_barrier(AMONG_SCANNERS, SCANNERS);
#pragma unroll
  for (int warp = 0; warp < SCANNERS / 32; ++warp) x = fmaxf(x, of_warps[warp]);
  return value_scale(x);
}

// A warp's 16 columns of v of a chunk, which only this warp reads, in pieces of 16 bytes. A lane has four of them.
struct ValuePieces {
  char* values;
  int lane, column;  // the lane's first column

  __device__ __forceinline__ ValuePieces(char* memory) : values(memory + Memory::values), lane(opaque(threadIdx.x) % 32), column((opaque(threadIdx.x) - TEAMS * THREADS) / 32 * 16 + lane % 2 * 8) {}
  __device__ __forceinline__ int token(int n) const { return n * 16 + lane / 2; }
  __device__ __forceinline__ Value* at(int n) const { return Values::at(values, token(n), column); }

  // Starts copying the pieces. Rows past the last token become zeros.
  __device__ __forceinline__ void fetch(const Arguments& given, int m) const {
    const int tokens = min(C, given.length - m * C);
#pragma unroll
    for (int n = 0; n < 4; ++n) copy_16_async(at(n), given.v + given.at(m * C + min(token(n), tokens - 1)) + column, token(n) < tokens);
    commit_copies();
  }
  // After v has been read, something else may be kept in its place.
  __device__ __forceinline__ void keep(const Block<Operand> (&x)[4]) const {
#pragma unroll
    for (int n = 0; n < 4; ++n) *reinterpret_cast<uint4*>(at(n)) = {x[n].word[0], x[n].word[1], x[n].word[2], x[n].word[3]};
  }
  __device__ __forceinline__ void get(Block<Operand> (&x)[4]) const {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const uint4 word = *reinterpret_cast<const uint4*>(at(n));
      x[n] = {{word.x, word.y, word.z, word.w}};
    }
  }
};

// Multiplies a state by to / from, two powers of two.
__device__ __forceinline__ void change_scale(Sum (&state)[STEPS], float from, float to) {
#pragma unroll
  for (int i = 0; i < STEPS; ++i) {
    scale_all(state[i], inverse_of(from));
    scale_all(state[i], to);
  }
}

// The scale of a warp's columns of the initial state.
__device__ __forceinline__ float scale_of_state(const Sum (&state)[STEPS]) {
  float x = 0.f;
#pragma unroll
  for (int i = 0; i < STEPS; ++i)
#pragma unroll
    for (int q = 0; q < 4; ++q) x = max_finite(max_finite(x, state[i].pair[q].x), state[i].pair[q].y);
  return value_scale(amax_in_warp(x));
}

// Where a number of v is too large for the scale of those before it: a smaller scale, also for the state.
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

// -v^T of a warp's 16 columns, times the scale, which with PRODUCTS is lowered first where it must be.
__device__ __forceinline__ void load_values(Sum (&x)[BLOCKS], Sum (&state)[STEPS], const char* memory, int column, float& scale) {
  Block<Value> values[BLOCKS];
#pragma unroll
  for (int t = 0; t < BLOCKS; ++t) values[t] = Values::load_transposed(memory + Memory::values, t * 16, column);
  if constexpr (PRODUCTS) lower_scale(scale, state, values);
#pragma unroll
  for (int t = 0; t < BLOCKS; ++t)
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const float2 pair = get_pair(values[t], q);
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

__device__ __forceinline__ void scan(char* memory, const Arguments& given) {
  const int column = scanner() / 32 * 16;  // the warp's first column of V
  ValuePieces(memory).fetch(given, 0);
  float scale = PRODUCTS ? value_scale(0.f) : find_scale(memory, given);
  Sum state[STEPS];
  if (given.initial_state != nullptr) {
    read_state(state, given.initial_state + given.state() + column, PRODUCTS ? 1.f : scale);
    if constexpr (PRODUCTS) {
      scale = scale_of_state(state);
      change_scale(state, 1.f, scale);
    }
  } else {
#pragma unroll
    for (int i = 0; i < STEPS; ++i) clear(state[i]);
  }
#pragma unroll 1
  for (int m = 0; m < given.chunks; ++m) {
    wait_copies<0>();
    wait_at_barrier(FILLED + m % TEAMS, THREADS + SCANNERS);
    const char* workspace = slot_of(memory, m);
    const char* pairs = workspace + ChunkWorkspace::pairs;
    const float* beta = reinterpret_cast<const float*>(workspace + ChunkWorkspace::beta);
    const float* decay = reinterpret_cast<const float*>(workspace + ChunkWorkspace::decay);

    Sum x[BLOCKS];  // -r^T, then -v~^T, then v~^T
    load_values(x, state, memory, opaque(column), scale);
    __syncwarp();  // the warp has read its columns of v
    Block<Operand> entry[STEPS];
#pragma unroll
    for (int i = 0; i < STEPS; ++i) entry[i] = round_to<Operand>(state[i]);
    ValuePieces(memory).keep(entry);  // so that it takes no registers while v~ is computed
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
    ValuePieces(memory).get(entry);
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
    if (m + 1 < given.chunks) ValuePieces(memory).fetch(given, m + 1);
    wait_products<1>();
    settle(out);
#pragma unroll
    for (int t = 0; t < BLOCKS; ++t)
#pragma unroll
      for (int j = 0; j <= t; ++j) {
        Right<Operand> p = Square::load_right(pairs, t * 16, j * 16);
        if (j == t) keep<Triangle::lower, true>(p);
        product(out[t], written[j], p);
      }
    wait_products<0>();
    settle(state);
    write_output(given, m, opaque(column), out, inverse_of(scale));
  }
  write_state(state, given.final_state + given.state() + column, inverse_of(scale));
}

// q, k: [N, length, H, D] Element. v, o: the same, Value. g: the same, beta: [N, length, H], float32. initial_state (may be null,
// zeros), final_state: [N, H, K, V] float32. Grid: N x H.
extern "C" __global__ void __launch_bounds__(TEAMS * THREADS + SCANNERS, 1) kda_chunk_fwd(
    const Element* q, const Element* k, const Value* v, const float* g, const float* beta, const float* initial_state, Value* o, float* final_state, int length, int heads, float scale) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  char* shared = reinterpret_cast<char*>(shared_memory);
  const int sequence = blockIdx.x / heads, head = blockIdx.x % heads, chunks = (length + C - 1) / C;
  const Arguments given = {q, k, v, g, beta, initial_state, o, final_state, heads, head, sequence, length, chunks, scale};
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0);  // so that the compiler knows that all lanes have the same
  const int team = warp / (THREADS / 32);
  if (team == TEAMS) {
    take_registers<SCANNER_REGISTERS>();
    scan(shared, given);
  } else {
    give_registers<TEAM_REGISTERS>();
    compute_chunks(shared, given, {warp});
  }
}
