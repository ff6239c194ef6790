// The whole forward in one kernel, for a forward that no backward follows. Heads of 64 in half precision on Hopper.
//
// It computes what intra_chunk_fwd.cu and inter_chunk_fwd.cu compute (their comments have the equations), but a ChunkWorkspace never
// leaves shared memory. As in intra_chunk_fwd_helpers.cu the factors of all operands are rounded to float16, and pairs inside a leaf
// are multiplied on tensor cores, so the last bits are not those of the two kernels. A block has one head of one sequence, and a
// multiprocessor holds one block.
//
// Threads: two teams of eight warps, and four scanners, which are warps too.
//   Team t computes the ChunkWorkspaces of the chunks t, t + 2, t + 4, ... A warp has one leaf.
//   The scanners go from chunk to chunk and compute the state and o. A scanner has 16 columns of V.
//
// Shared memory: SLOTS ChunkWorkspaces, that of chunk m in slot m % SLOTS; v of one chunk; and what each team needs besides (Shared).
//
// Barriers: the teams and the scanners meet once for each chunk m, at FILLED + m % TEAMS. The team has then filled the slot of chunk m,
// and the scanners are done with chunk m - 1. So the slot of chunk m - 1 is free for chunk m + 2, which the team computes next, and no
// other barrier is needed. AMONG_TEAM + t is for the warps of one team alone. Scanners exchange nothing: each copies its own columns
// of v, and has its own power-of-two scale.
//
// The scale (kda_scale.cuh) is that of the largest |v| of the 16 columns so far, and of the initial state. A chunk with a larger |v|
// lowers it, and the state is multiplied by the ratio. So o of a chunk does not depend on v of later chunks.
#include "kda_half_operands.cuh"
#include "kda_inverse.cuh"
#include "kda_leaf_products.cuh"
#include "kda_scale.cuh"
#include "kda_solve.cuh"
#include "named_barrier.cuh"
#include "registers.cuh"

using Value = VALUE;
using Values = Tile<Value, C, D>;
constexpr int TEAMS = 2, SLOTS = TEAMS + 1;
constexpr int WARPS = LEAVES, THREADS = 32 * WARPS;  // of a team
constexpr int SCANNERS = 32 * D / 16;                // threads
constexpr int AMONG_TEAM = 1, FILLED = AMONG_TEAM + TEAMS;  // the first of TEAMS barriers each
static_assert(WARPS == 8 && LEVELS == 3 && BLOCKS == 4, "tree_pairs_of_eight");
static_assert(D == 64 && HALVES, "a lane has two channels of its warp's leaf, and the scanners are one warp group");

// What a team needs beside its slot.
struct Shared {
  static constexpr int leaf_logs = 0;                                    // float [LEAVES][D]
  static constexpr int beta = leaf_logs + LEAVES * D * 4;                // float [C]
  static constexpr int corner = beta + C * 4;                            // float [C][17]: the diagonal 16x16 blocks of Akk
  static constexpr int below = (corner + C * 17 * 4 + 127) / 128 * 128;  // Square: Akk below the diagonal blocks
  static constexpr int tree = below + Square::bytes;                     // LEVELS x Level, then T and T~
  static constexpr int inverse = tree, inverse_rest = inverse + Square::bytes;
  static constexpr int leaf_t = inverse_rest + Square::bytes;            // float [8][C]: columns of T and T~ of the leaves
  static constexpr int leaf_rest = leaf_t + 8 * C * 4;
  static constexpr int bytes = tree + LEVELS * Level::bytes;
  static_assert(leaf_rest + 8 * C * 4 <= bytes, "T and T~ fit in the place of the levels");
};

struct Memory {
  static constexpr int slot = (ChunkWorkspace::bytes + 1023) / 1024 * 1024;
  static constexpr int values = SLOTS * slot;           // Values
  static constexpr int teams = values + Values::bytes;  // Shared of each team
  static constexpr int bytes = teams + TEAMS * Shared::bytes;
};
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

// Teams.

// A thread's place in its team. Its warp has one leaf, and a lane has two channels of it.
struct Team {
  int warp;  // of the block

  __device__ __forceinline__ int number() const { return warp / WARPS; }
  __device__ __forceinline__ int leaf() const { return warp % WARPS; }
  __device__ __forceinline__ int thread() const { return threadIdx.x % THREADS; }
  __device__ __forceinline__ int opaque_thread() const { return opaque(threadIdx.x) % THREADS; }
  __device__ __forceinline__ int channel() const { return opaque(threadIdx.x) % 32 * 2; }  // the first of the two
  __device__ __forceinline__ void wait() const { wait_at_barrier(AMONG_TEAM + number(), THREADS); }
};

// What a thread reads of a chunk: two channels of one leaf, and beta of the token that has the thread's number.
struct ChunkInputs {
  Leaf<float> nats;
  Leaf<Element> q, k;
  float beta = 0.f;

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

// Akk and Aqk inside a leaf.
__device__ __forceinline__ void multiply_leaf(const Team& team, char* shared, char* workspace, const Gates& gates, const Leaf<float16>& q, const Leaf<float16>& k, float scale) {
  const int first = team.leaf() * LEAF;
  const LeafProducts<LeafOperands> products(Rows::from(workspace, first), gates, q, k);
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

// Writes k_in, qg and kg of a leaf, and its operands of all levels.
__device__ __forceinline__ void write_operands(const Team& team, char* shared, char* workspace, const Gates& gates, const Leaf<float16>& q, const Leaf<float16>& k, float scale) {
  const float* leaf_logs = reinterpret_cast<const float*>(shared + Shared::leaf_logs);
  struct {
    int leaf, channel;
  } const place = {team.leaf(), team.channel()};
  Reach reach;
  unsigned near[LEVELS];  // the reach on each level
#pragma unroll
  for (int level = 0; level < LEVELS; ++level) {
    near[level] = pack(float16{}, reach.at(level, place.leaf));
    reach.widen_both(leaf_logs, level, place.leaf, place.channel);
  }
  reach.before = exp2_fast(reach.before);
  reach.after = exp2_fast(reach.after);
  write_workspace(workspace, place, gates, reach, q, k, scale);
  __syncwarp();
  write_levels(shared + Shared::tree, place, gates, near, q, k);
  __syncwarp();
}

// Akk and Aqk on the levels, T~ and exp(G_C). Aqk and T~ are complete in the workspace after the next barrier.
__device__ __forceinline__ void invert(const Team& team, char* shared, char* workspace, float scale) {
  char* pairs = workspace + ChunkWorkspace::pairs;
  team.wait();
  tree_pairs_of_eight<Shared>(shared, pairs, opaque(team.thread() / 32), scale);
  team.wait();  // T and T~ take the place of the levels
  if (team.thread() < C) invert_column<Shared>(shared, team.thread());
  whole_decay<Shared>(shared, workspace, 2 * (team.opaque_thread() - C));  // by threads that invert nothing
  team.wait();
  spread_leaves<Shared, THREADS>(shared, pairs, team.opaque_thread());
  merge_leaves<Shared, THREADS>(shared, pairs, team.opaque_thread());
  team.wait();
  merge<Shared, WARPS, 16>(shared, pairs, opaque(team.thread() / 32));
  team.wait();
  merge<Shared, WARPS, 32>(shared, pairs, opaque(team.thread() / 32));
}

__device__ __forceinline__ void compute_chunks(char* memory, const Arguments& given, const Team& team) {
  char* shared = memory + Memory::teams + team.number() * Shared::bytes;
  ChunkInputs inputs;
  inputs.read(given, min(team.number(), given.chunks - 1), team);
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
    const Leaf<float16> q = in_float16(inputs.q), k = in_float16(inputs.k);
    multiply_leaf(team, shared, slot, gates, q, k, given.scale);
    team.wait();  // the sums of all leaves' logs are there
    write_operands(team, shared, slot, gates, q, k, given.scale);
    // The team's next chunk. After the last one it is read again: if nothing were read, the old inputs would need registers.
    inputs.read(given, min(m + TEAMS, given.chunks - 1), team);
    invert(team, shared, slot_of(memory, opaque(m)), given.scale);  // the address is computed again, to save registers
    show_to_products();
    wait_at_barrier(FILLED + team.number(), THREADS + SCANNERS);
  }
}

// Scanners.

// A thread's number among them.
__device__ __forceinline__ int scanner() { return threadIdx.x - TEAMS * THREADS; }

// A scanner's 16 columns of v of a chunk, which no other warp reads, in pieces of 16 bytes. A lane has four of them.
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
__device__ __forceinline__ void load_values(Sum (&x)[BLOCKS], Sum (&state)[STEPS], const char* memory, int column, float& scale) {
  Block<Value> values[BLOCKS];
#pragma unroll
  for (int t = 0; t < BLOCKS; ++t) values[t] = Values::load_transposed(memory + Memory::values, t * 16, column);
  lower_scale(scale, state, values);
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
  const int column = scanner() / 32 * 16;  // the first of the warp's 16 columns of V
  ValuePieces(memory).fetch(given, 0);
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
    ValuePieces(memory).keep(entry);  // in the place of v, so that it takes no registers while v~ is computed
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
    add_within_chunk(out, written, pairs);
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
