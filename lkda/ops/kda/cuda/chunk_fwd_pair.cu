// The whole forward in one kernel, as chunk_fwd.cu computes it. Heads of 128 in half precision on Hopper. A head of one sequence has a
// cluster of two blocks, and a multiprocessor holds one block.
//
// Each block computes one half of the columns of V. Both need all ChunkWorkspaces, so each computes those of every second chunk and
// copies them to the other, from shared memory to shared memory.
//
// Threads: a team of sixteen warps, and four scanners, which are warps too.
//   The team of block r computes the ChunkWorkspaces of the chunks r, r + 2, r + 4, ... Two warps have the channels of one leaf.
//   The scanners go through all chunks and compute the state and o. A scanner has 16 columns of V.
//
// Shared memory: SLOTS ChunkWorkspaces, that of chunk m in slot m % SLOTS of both blocks; v of one chunk; and what the team needs besides
// (Shared). A chunk's own slot holds operands until k_in, qg and kg are written: first those of the leaves, then those of two levels.
//
// Barriers and signals. A chunk m is made by its own block's team and arrives in the other block.
//   FILLED     in its own block the team and the scanners meet here. The team has filled the slot of m, and the scanners are done with
//              chunk m - 1, whose slot the team fills next, with chunk m + 2.
//   arrived    in the other block its scanners wait for the copy of m here.
//   emptied    the scanners of the other block are done with chunk m - SLOTS, so the copy of m may take its slot there.
// The copy of chunk m - SLOTS, which came from that slot of the other block, must have arrived too, so that nothing reads the slot any more.
// All that a chunk waits for belongs to earlier chunks, so the waiting ends. AMONG_TEAM is for the warps of the team alone.
//
// With SAVES a backward follows, and its two kernels get what intra_chunk_fwd and inter_chunk_fwd write for them. The block that makes
// a workspace also copies it to GPU memory, and `emptied` then waits for that copy as well. The scanners write the state that enters
// each chunk, and v~^T. One scale holds for a whole head there, as in inter_chunk_fwd.cu, so amax.cu finds the largest |v| first.
#include "bulk_copy.cuh"
#include "cluster.cuh"
#include "kda_inverse.cuh"
#include "named_barrier.cuh"
#include "registers.cuh"

constexpr int BLOCKS_OF_A_HEAD = 2, SLOTS = 3;
constexpr int WARPS = 2 * CHUNK / 8, THREADS = 32 * WARPS;  // of the team
constexpr int FIRST_SCANNER = THREADS;
#include "kda_one_pass.cuh"

constexpr int SCANNER_WARPS = SCANNERS / 32;
constexpr int AMONG_TEAM = 1, FILLED = 2;
static_assert(WARPS == 2 * LEAVES && WARPS == 16 && LEVELS == 3 && BLOCKS == 4, "tree_pairs_of_sixteen");
static_assert(D == BLOCKS_OF_A_HEAD * COLUMNS, "two warps have the channels of a leaf, and two blocks the columns of V");

// What the team needs beside the slots.
struct Shared {
  static constexpr int leaf_logs = 0;                                    // float [LEAVES][D]
  static constexpr int beta = leaf_logs + LEAVES * D * 4;                // float [C]
  static constexpr int corner = beta + C * 4;                            // float [C][17]: the diagonal 16x16 blocks of Akk
  static constexpr int below = (corner + C * 17 * 4 + 127) / 128 * 128;  // LeafSumsOfWarp; then Square: Akk below the diagonal blocks
  static constexpr int level_0 = below + Square::bytes;                  // Level, then T and T~
  static constexpr int inverse = level_0, inverse_rest = inverse + Square::bytes;
  static constexpr int leaf_t = inverse_rest + Square::bytes;            // float [8][C]: columns of T and T~ of the leaves
  static constexpr int leaf_rest = leaf_t + 8 * C * 4;
  static constexpr int bytes = level_0 + Level::bytes;
  static_assert(leaf_rest + 8 * C * 4 <= bytes, "T and T~ fit in the place of a level");
};

struct Memory {
  static constexpr int slot = (ChunkWorkspace::bytes + 1023) / 1024 * 1024;
  static constexpr int values = SLOTS * slot;           // Values
  static constexpr int team = values + Values::bytes;   // Shared
  static constexpr int signals = team + Shared::bytes;  // Signals
  static constexpr int bytes = signals + 2 * SLOTS * 8;
};
static_assert(Memory::bytes == SHARED_BYTES, "variants.py allocates what this kernel uses");

__device__ __forceinline__ char* slot_of(char* memory, int m) { return memory + m % SLOTS * Memory::slot; }

// The signals of a block, two for each slot.
struct Signals {
  Signal *arrived, *emptied;

  __device__ __forceinline__ explicit Signals(char* memory) : arrived(reinterpret_cast<Signal*>(memory + Memory::signals)), emptied(arrived + SLOTS) {}
  __device__ __forceinline__ void prepare() const {
    for (int slot = 0; slot < SLOTS; ++slot) {
      arrived[slot].prepare(1);              // by who sends
      emptied[slot].prepare(SCANNER_WARPS + SAVES);  // of the other block, and its sender
    }
    show_signals();
  }
  // The signals of one slot have a phase for each second chunk in it.
  static __device__ __forceinline__ int phase(int m) { return m / (BLOCKS_OF_A_HEAD * SLOTS); }
};

// Teams.

// A leaf and two channels of it.
struct Place {
  int leaf, channel;
};

// A thread's place in its team. Two warps have one leaf, and a lane has two channels of it.
struct Team {
  int warp;

  __device__ __forceinline__ int leaf() const { return warp / 2; }
  __device__ __forceinline__ int half() const { return warp % 2; }  // of the channels
  __device__ __forceinline__ int thread() const { return opaque(threadIdx.x); }
  __device__ __forceinline__ int channel() const { return half() * 64 + static_cast<unsigned>(opaque(threadIdx.x)) % 32 * 2; }  // the first of the two
  // It is computed again for each use, so that no address computed from it is kept in registers.
  __device__ __forceinline__ Place place() const { return {leaf(), channel()}; }
  __device__ __forceinline__ void wait() const { wait_at_barrier(AMONG_TEAM, THREADS); }
};

// The operands of LeafProducts: 24 rows of 64 channels. A row begins 16 bytes after a multiple of 128 bytes from the one before, so that eight rows
// of one column lie in different banks, and all addresses of a lane are one register plus constants.
struct LeafOperands {
  static constexpr int row_bytes = 64 * sizeof(float16) + 16;
  static constexpr int bytes = 24 * row_bytes;
  static __device__ __forceinline__ float16* at(char* leaf, int row, int column) { return reinterpret_cast<float16*>(leaf + row * row_bytes) + column; }
  static __device__ __forceinline__ Block<float16> load(char* leaf, int row, int column) {
    Block<float16> rows;
    load_matrices(rows.word, at(leaf, row + lane_id() % 16, column + lane_id() / 16 * 8));
    return rows;
  }
};
static_assert(WARPS * LeafOperands::bytes <= ChunkWorkspace::decay, "they fit in a slot, before beta");

// What a lane needs of the two products of a leaf (for_neighbours, for_farther), each summed over one warp's channels.
struct LeafSumsOfWarp {
  static __device__ __forceinline__ float2* at(char* shared, int warp, int product) { return reinterpret_cast<float2*>(shared + Shared::below) + (warp * 2 + product) * 32 + opaque(lane_id()); }

  static __device__ __forceinline__ void write_neighbours(char* shared, int warp, const LeafSums& sums) {
    *at(shared, warp, 0) = make_float2(sums.top.x, lane_row() % 2 ? sums.bottom.y : sums.bottom.x);
  }
  static __device__ __forceinline__ void write_farther(char* shared, int warp, const LeafSums& sums) { *at(shared, warp, 1) = lane_id() % 4 >= 2 ? sums.bottom : sums.top; }

  // Summed over both warps of a leaf, of which `warp` is one. Each number is where the function for it looks.
  static __device__ __forceinline__ LeafSums neighbours(char* shared, int warp) {
    const float2 a = *at(shared, warp, 0), b = *at(shared, warp ^ 1, 0);
    const float bottom = a.y + b.y;
    return {{a.x + b.x, 0.f}, {bottom, bottom}};
  }
  static __device__ __forceinline__ LeafSums farther(char* shared, int warp) {
    const float2 a = *at(shared, warp, 1), b = *at(shared, warp ^ 1, 1), sum = make_float2(a.x + b.x, a.y + b.y);
    return {sum, sum};
  }
};

// Akk and Aqk inside a leaf, as far as a warp has its channels. They are stored after a barrier, by store_leaf_pairs.
__device__ __forceinline__ void multiply_leaf(const Team& team, char* shared, char* slot, const Gates& gates, const Leaf<float16>& q, const Leaf<float16>& k) {
  const LeafProducts<LeafOperands> products(slot + team.warp * LeafOperands::bytes, gates, q, k);
  LeafSumsOfWarp::write_neighbours(shared, team.warp, products.neighbours());
  LeafSumsOfWarp::write_farther(shared, team.warp, products.farther(gates));
}

// The two warps of a leaf store one product each.
__device__ __forceinline__ void store_leaf_pairs(const Team& team, char* shared, char* pairs, float scale) {
  const int first = team.leaf() * LEAF;
  float* corner = reinterpret_cast<float*>(shared + Shared::corner) + first * 17 + first % 16;
  if (team.half() == 0) {
    for_neighbours(
        LeafSumsOfWarp::neighbours(shared, team.warp), [&](int i, int j, float a) { corner[i * 17 + j] = a; },
        [&](int i, int j, float a) { store_one(Square::at(pairs, first + i, first + j), scale * a); });
  } else {
    for_farther(
        LeafSumsOfWarp::farther(shared, team.warp),
        [&](int i, int j, float2 a) {
          corner[i * 17 + j] = a.x;
          corner[i * 17 + j + 1] = a.y;
        },
        [&](int i, int j, float2 a) { store_pair(Square::at(pairs, first + i, first + j), times(make_float2(scale, scale), a)); });
  }
}

// Starts copying beta of a chunk to two places. Past the end it is 0.
__device__ __forceinline__ void fetch_beta(const Arguments& given, int m, int token, char* to, char* and_to) {
  if (token >= C) return;
  float *first = reinterpret_cast<float*>(to) + token, *second = reinterpret_cast<float*>(and_to) + token;
  if (token < min(C, given.length - m * C)) {
    copy_4_async(first, given.beta_at(m, token));
    copy_4_async(second, given.beta_at(m, token));
  } else {
    *first = *second = 0.f;
  }
  commit_copies();
}

// Begins to bring the inputs of a chunk to the L2 cache. Each of the team's threads has 128 bytes of them.
__device__ __forceinline__ void prefetch_inputs(const Arguments& given, int m, int thread) {
  static_assert(THREADS == C * D * (2 * sizeof(Element) + sizeof(float)) / 128, "a thread has 128 bytes");
  constexpr int LINES = D * sizeof(Element) / 128;  // of a row of q or k
  const int part = thread / (LINES * C), line = thread % (LINES * C);
  const int token = part < 2 ? line / LINES : line / (2 * LINES) + (part - 2) * (C / 2);
  if (token >= given.span(m).tokens) return;
  const long long row = given.at(m * C + token);
  if (part < 2) {
    prefetch((part == 0 ? given.q : given.k) + row + line % LINES * 64);
  } else {
    prefetch(given.g + row + line % (2 * LINES) * 32);
  }
}

// The operands of level 0 have a place of their own. Those of the others are where k_in, qg and kg are written later.
struct Levels {
  char *level_0, *slot;

  __device__ __forceinline__ char* at(int level) const { return level == 0 ? level_0 : slot + (level - 1) * Level::bytes; }
};
static_assert(ChunkWorkspace::k_in == 0 && (LEVELS - 1) * Level::bytes <= ChunkWorkspace::pairs, "operands of two levels fit in the place of k_in, qg and kg");

// T~ from Akk. Aqk and T~ are complete in the slot after the next barrier.
__device__ __forceinline__ void merge_inverse(const Team& team, char* shared, char* pairs) {
  spread_leaves<Shared, THREADS>(shared, pairs, team.thread());
  merge_leaves<Shared, THREADS>(shared, pairs, team.thread());
  team.wait();
  merge<Shared, WARPS, 16>(shared, pairs, opaque(team.warp));
  team.wait();
  merge<Shared, WARPS, 32>(shared, pairs, opaque(team.warp));
}

// Copies of workspaces to the other block, and with SAVES to GPU memory, all of which one thread starts.
struct Sender {
  char* memory;
  int rank;  // of the other block

  // Of a warp that has no part in the merges.
  __device__ __forceinline__ bool is_here() const { return threadIdx.x == THREADS - 1; }
  // k_in, qg and kg, as soon as their place in the other block is free.
  __device__ __forceinline__ void send_rows(int m, int length) const {
    if (is_here()) {
      const Signals signals(memory);
      const int slot = m % SLOTS;
      if (SAVES && m >= BLOCKS_OF_A_HEAD) release(m - BLOCKS_OF_A_HEAD, length);
      if (m >= SLOTS) {
        signals.emptied[slot].wait(Signals::phase(m - SLOTS));
        signals.arrived[slot].wait(Signals::phase(m - SLOTS));
      }
      signals.arrived[slot].announce_in(rank, ChunkWorkspace::bytes);
      copy_to_block(slot_of(memory, m), ChunkWorkspace::pairs, signals.arrived + slot, rank);
    }
    __syncwarp();
  }
  // The pairs, decay and beta. Only then the whole workspace to GPU memory: the other block waits for its copy, and nothing for this one until
  // the team's next chunk.
  template <class Compute>
  __device__ __forceinline__ void send_rest(int m, const Compute& arguments) const {
    if (is_here()) {
      copy_to_block(slot_of(memory, m) + ChunkWorkspace::pairs, ChunkWorkspace::bytes - ChunkWorkspace::pairs, Signals(memory).arrived + m % SLOTS, rank);
#if SAVES
      const Arguments given = arguments();
      char* workspaces = given.saved.workspaces;  // null where the backward computes them again
      if (workspaces != nullptr) copy_to_memory(workspaces + given.item(m) * ChunkWorkspace::bytes, slot_of(memory, m), ChunkWorkspace::bytes);
#endif
    }
    __syncwarp();
  }
  // The team's chunk before, m, has been read for its copy to GPU memory, so the other block may fill its slot, as Workspaces::release has it.
  __device__ __forceinline__ void release(int m, int length) const {
    wait_until_read();
    if ((m + SLOTS) * C < length) Signals(memory).emptied[m % SLOTS].arrive_in(rank);
  }
  // After the last chunk.
  __device__ __forceinline__ void finish() const {
    if (is_here()) wait_until_copied();
    __syncwarp();
  }
};

// arguments() returns the Arguments. They are computed again for each use, to save registers.
template <class Compute>
__device__ __forceinline__ void compute_chunks(char* memory, const Compute& arguments, const Team& team, int rank) {
  char* shared = memory + Memory::team;
  const Sender sender = {memory, rank ^ 1};
  const int length = arguments().length;
  const float scale = arguments().scale;
  ChunkInputs inputs;
  inputs.read(arguments(), rank * C < length ? rank : 0, team);
#pragma unroll 1
  for (int m = rank; m * C < length; m += BLOCKS_OF_A_HEAD) {
    const auto slot = [&] { return slot_of(memory, opaque(m)); };  // the address is computed again for each use, to save registers
    fetch_beta(arguments(), m, team.thread(), shared + Shared::beta, slot() + ChunkWorkspace::beta);
    float* leaf_logs = reinterpret_cast<float*>(shared + Shared::leaf_logs);
    Gates gates;
    gates.set(inputs.nats);
    Gates::share(inputs.nats, leaf_logs, team.leaf(), team.channel());
    const Leaf<float16> q = in_float16(inputs.q), k = in_float16(inputs.k);
    multiply_leaf(team, shared, slot(), gates, q, k);
    team.wait();  // the sums of all leaves' logs are there, and those of the products
    store_leaf_pairs(team, shared, slot() + ChunkWorkspace::pairs, scale);
    unsigned near[LEVELS];
    find_reach(leaf_logs, team.place(), near);
    write_levels(Levels{shared + Shared::level_0, slot()}, team.place(), gates, near, q, k);
    team.wait();
    tree_pairs_of_sixteen<Shared>(shared, Levels{shared + Shared::level_0, slot()}, slot() + ChunkWorkspace::pairs, opaque(team.warp), scale);
    wait_copies<0>();  // beta
    team.wait();  // the operands of the levels make place
    write_workspace(slot(), team.place(), gates, find_reach(leaf_logs, team.place(), near), q, k, scale);  // found again, to save registers
    __syncwarp();
    if (team.thread() < C) invert_column<Shared>(shared, team.thread());
    whole_decay<Shared>(shared, slot(), 2 * (team.thread() - C));  // by threads that invert nothing
    // The team's next chunk. After the last one it is read again: if nothing were read, the old inputs would need registers.
    const auto next = [&] { return (opaque(m) + BLOCKS_OF_A_HEAD) * C < length ? opaque(m) + BLOCKS_OF_A_HEAD : opaque(m); };
    prefetch_inputs(arguments(), next(), team.thread());
    show_to_products();
    team.wait();
    sender.send_rows(m, length);
    merge_inverse(team, shared, slot() + ChunkWorkspace::pairs);
    inputs.read(arguments(), next(), team);  // only now, because there are no registers for them during the merges
    show_to_products();
    team.wait();
    sender.send_rest(m, arguments);
    wait_at_barrier(FILLED, THREADS + SCANNERS);
  }
  if constexpr (SAVES) sender.finish();
}

// Scanners.

// The workspaces of both blocks, for the scanners.
struct Workspaces {
  char* memory;
  int rank, length;

  __device__ __forceinline__ bool has(int m) const { return m * C < length; }
  __device__ __forceinline__ bool made_here(int m) const { return m % BLOCKS_OF_A_HEAD == rank; }
  __device__ __forceinline__ const char* wait(int m) const {
    if (made_here(m)) {
      wait_at_barrier(FILLED, THREADS + SCANNERS);
    } else {
      Signals(memory).arrived[m % SLOTS].wait(Signals::phase(m));
      __syncwarp();  // v has come too
    }
    return slot_of(memory, m);
  }
  // The next chunk in the slot of one that was made here comes from the other block.
  __device__ __forceinline__ void release(int m) const {
    if (!made_here(m) || !has(m + SLOTS)) return;
    __syncwarp();
    if (lane_id() == 0) Signals(memory).emptied[m % SLOTS].arrive_in(rank ^ 1);
  }
};

// q, k: [N, length, H, D] Element. v, o: the same, Value. g: the same, beta: [N, length, H], float32. initial_state (may be null,
// zeros), final_state: [N, H, K, V] float32. With SAVES, amax: [chunks, H] float32, of v; workspaces (may be null): [chunks, H] ChunkWorkspace;
// states: [chunks, H] SavedState, the h that enters each chunk; v_tilde: [chunks, H] Columns, v~^T; scales: [N, H] float32, those of v.
// Grid: N x H x 2.
#if SAVES
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(THREADS + SCANNERS, 1) kda_chunk_fwd_pair_saves(
    const Element* q, const Element* k, const Value* v, const float* g, const float* beta, const float* initial_state, Value* o, float* final_state,
    const float* amax, char* workspaces, char* states, char* v_tilde, float* scales, int length, int heads, float scale) {
#else
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(THREADS + SCANNERS, 1) kda_chunk_fwd_pair(
    const Element* q, const Element* k, const Value* v, const float* g, const float* beta, const float* initial_state, Value* o, float* final_state, int length, int heads, float scale) {
#endif
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  char* shared = reinterpret_cast<char*>(shared_memory);
  if (threadIdx.x == 0) Signals(shared).prepare();
  meet_cluster();
  const auto arguments_of = [&](unsigned block) {
    const unsigned column = block % BLOCKS_OF_A_HEAD * COLUMNS;
    const int run = block / BLOCKS_OF_A_HEAD, sequence = run / heads, head = run % heads, chunks = (length + C - 1) / C;
    const float* initial_columns = initial_state == nullptr ? nullptr : initial_state + column;
    return Arguments{
        q, k, v + column, g, beta, initial_columns, o + column, final_state + column, heads, head, sequence, length, chunks, scale,
#if SAVES
        {amax, initial_state, workspaces, states, v_tilde, scales, static_cast<int>(column)},
#endif
    };
  };
  const int rank = blockIdx.x % BLOCKS_OF_A_HEAD;
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0);  // so that the compiler knows that all lanes have the same
  if (warp >= WARPS) {
    take_registers<SCANNER_REGISTERS>();
    Arguments given = arguments_of(blockIdx.x);
    given.head = __shfl_sync(0xffffffffu, given.head, 0);  // as for `warp`
    scan(Workspaces{shared, rank, length}, shared + Memory::values, given);
  } else {
    give_registers<TEAM_REGISTERS>();
    const auto arguments = [&] { return arguments_of(opaque(blockIdx.x)); };
    compute_chunks(shared, arguments, {warp}, rank);
  }
  meet_cluster();  // until here the other block may write to this one
}
