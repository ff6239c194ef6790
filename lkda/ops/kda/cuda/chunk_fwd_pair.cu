// The whole forward in one kernel, for a forward that no backward follows, as chunk_fwd.cu computes it. Heads of 128 in half precision
// on Hopper. A head of one sequence has a cluster of two blocks, and a multiprocessor holds one block.
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
      emptied[slot].prepare(SCANNER_WARPS);  // of the other block
    }
    show_signals();
  }
  // The signals of one slot have a phase for each second chunk in it.
  static __device__ __forceinline__ int phase(int m) { return m / (BLOCKS_OF_A_HEAD * SLOTS); }
};

// Teams.

// A thread's place in its team. Two warps have one leaf, and a lane has two channels of it.
struct Team {
  int warp;

  __device__ __forceinline__ int leaf() const { return warp / 2; }
  __device__ __forceinline__ int half() const { return warp % 2; }  // of the channels
  __device__ __forceinline__ int thread() const { return threadIdx.x; }
  __device__ __forceinline__ int opaque_thread() const { return opaque(threadIdx.x); }
  __device__ __forceinline__ int channel() const { return half() * 64 + opaque(threadIdx.x) % 32 * 2; }  // the first of the two
  __device__ __forceinline__ void wait() const { wait_at_barrier(AMONG_TEAM, THREADS); }
};

// What a lane needs of the two products of a leaf, each summed over one warp's channels.
struct LeafSumsOfWarp {
  static __device__ __forceinline__ bool takes_bottom(int lane) { return lane % 4 >= 2; }  // of for_farther
  static __device__ __forceinline__ float4* at(char* shared, int warp) { return reinterpret_cast<float4*>(shared + Shared::below) + warp * 32 + opaque(lane_id()); }

  static __device__ __forceinline__ void write(char* shared, int warp, const LeafSums& neighbours, const LeafSums& farther) {
    const int lane = opaque(lane_id());
    const float2 far = lane % 4 >= 2 ? farther.bottom : farther.top;
    *at(shared, warp) = {neighbours.top.x, lane / 4 % 2 ? neighbours.bottom.y : neighbours.bottom.x, far.x, far.y};
  }
  // Summed over both warps of a leaf, of which `warp` is one. Each number is where for_neighbours or for_farther looks for it.
  static __device__ __forceinline__ LeafSums neighbours(char* shared, int warp) {
    const float4 a = *at(shared, warp & ~1), b = *at(shared, warp | 1);
    const float bottom = a.y + b.y;
    return {{a.x + b.x, 0.f}, {bottom, bottom}};
  }
  static __device__ __forceinline__ LeafSums farther(char* shared, int warp) {
    const float4 a = *at(shared, warp & ~1), b = *at(shared, warp | 1);
    const float2 far = {a.z + b.z, a.w + b.w};
    return {far, far};
  }
};

// Akk and Aqk inside a leaf, as far as a warp has its channels. They are stored after a barrier, by store_leaf_pairs.
__device__ __forceinline__ void multiply_leaf(const Team& team, char* shared, char* slot, const Gates& gates, const Leaf<float16>& q, const Leaf<float16>& k) {
  char* rows = Rows::from(slot, team.leaf() * LEAF) + Rows::offset(0, 64) * team.half();
  const LeafProducts<LeafOperands> products(rows, gates, q, k);
  const LeafSums neighbours = products.neighbours();
  LeafSumsOfWarp::write(shared, team.warp, neighbours, products.farther(gates));
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

// The operands of level 0 have a place of their own. Those of the others are where k_in, qg and kg are written later.
struct Levels {
  char *level_0, *slot;

  __device__ __forceinline__ char* at(int level) const { return level == 0 ? level_0 : slot + (level - 1) * Level::bytes; }
};
static_assert(ChunkWorkspace::k_in == 0 && (LEVELS - 1) * Level::bytes <= ChunkWorkspace::pairs, "operands of two levels fit in the place of k_in, qg and kg");

// T~ from Akk. Aqk and T~ are complete in the slot after the next barrier.
__device__ __forceinline__ void merge_inverse(const Team& team, char* shared, char* pairs) {
  spread_leaves<Shared, THREADS>(shared, pairs, team.opaque_thread());
  merge_leaves<Shared, THREADS>(shared, pairs, team.opaque_thread());
  team.wait();
  merge<Shared, WARPS, 16>(shared, pairs, opaque(team.thread() / 32));
  team.wait();
  merge<Shared, WARPS, 32>(shared, pairs, opaque(team.thread() / 32));
}

// Copies of workspaces to the other block, which one thread starts.
struct Sender {
  char* memory;
  int chunks, rank;  // of the other block

  // Of a warp that has no part in the merges.
  __device__ __forceinline__ bool is_here() const { return threadIdx.x == THREADS - 1; }
  // k_in, qg and kg, as soon as their place in the other block is free.
  __device__ __forceinline__ void send_rows(int m) const {
    if (is_here()) {
      const Signals signals(memory);
      const int slot = m % SLOTS;
      if (m >= SLOTS) {
        signals.emptied[slot].wait(Signals::phase(m - SLOTS));
        signals.arrived[slot].wait(Signals::phase(m - SLOTS));
      }
      signals.arrived[slot].announce_in(rank, ChunkWorkspace::bytes);
      copy_to_block(slot_of(memory, m), ChunkWorkspace::pairs, signals.arrived + slot, rank);
    }
    __syncwarp();
  }
  // The pairs, decay and beta.
  __device__ __forceinline__ void send_rest(int m) const {
    if (is_here()) copy_to_block(slot_of(memory, m) + ChunkWorkspace::pairs, ChunkWorkspace::bytes - ChunkWorkspace::pairs, Signals(memory).arrived + m % SLOTS, rank);
    __syncwarp();
  }
};

__device__ __forceinline__ void compute_chunks(char* memory, const Arguments& given, const Team& team, int rank) {
  char* shared = memory + Memory::team;
  const Sender sender = {memory, given.chunks, rank ^ 1};
  ChunkInputs inputs;
  inputs.read(given, min(rank, given.chunks - 1), team);
#pragma unroll 1
  for (int m = rank; m < given.chunks; m += BLOCKS_OF_A_HEAD) {
    char* slot = slot_of(memory, m);
    char* pairs = slot + ChunkWorkspace::pairs;
    if (team.thread() < C) {
      reinterpret_cast<float*>(shared + Shared::beta)[team.thread()] = inputs.beta;
      reinterpret_cast<float*>(slot + ChunkWorkspace::beta)[team.thread()] = inputs.beta;
    }
    float* leaf_logs = reinterpret_cast<float*>(shared + Shared::leaf_logs);
    struct {
      int leaf, channel;
    } const place = {team.leaf(), team.channel()};
    Gates gates;
    gates.set(inputs.nats);
    Gates::share(inputs.nats, leaf_logs, place.leaf, place.channel);
    const Leaf<float16> q = in_float16(inputs.q), k = in_float16(inputs.k);
    multiply_leaf(team, shared, slot, gates, q, k);
    team.wait();  // the sums of all leaves' logs are there, and those of the products
    store_leaf_pairs(team, shared, pairs, given.scale);
    unsigned near[LEVELS];
    const Reach reach = find_reach(leaf_logs, place, near);
    const Levels levels = {shared + Shared::level_0, slot};
    write_levels(levels, place, gates, near, q, k);
    team.wait();
    tree_pairs_of_sixteen<Shared>(shared, levels, pairs, opaque(team.warp), given.scale);
    team.wait();  // the operands of the levels make place
    write_workspace(slot, place, gates, reach, q, k, given.scale);
    __syncwarp();
    if (team.thread() < C) invert_column<Shared>(shared, team.thread());
    whole_decay<Shared>(shared, slot, 2 * (team.opaque_thread() - C));  // by threads that invert nothing
    // The team's next chunk. After the last one it is read again: if nothing were read, the old inputs would need registers.
    inputs.read(given, min(m + BLOCKS_OF_A_HEAD, given.chunks - 1), team);
    show_to_products();
    team.wait();
    sender.send_rows(m);
    merge_inverse(team, shared, slot_of(memory, opaque(m)) + ChunkWorkspace::pairs);  // the address is computed again, to save registers
    show_to_products();
    team.wait();
    sender.send_rest(m);
    wait_at_barrier(FILLED, THREADS + SCANNERS);
  }
}

// Scanners.

// The workspaces of both blocks, for the scanners.
struct Workspaces {
  char* memory;
  int rank, chunks;

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
    if (!made_here(m) || m + SLOTS >= chunks) return;
    __syncwarp();
    if (lane_id() == 0) Signals(memory).emptied[m % SLOTS].arrive_in(rank ^ 1);
  }
};

// q, k: [N, length, H, D] Element. v, o: the same, Value. g: the same, beta: [N, length, H], float32. initial_state (may be null,
// zeros), final_state: [N, H, K, V] float32. Grid: N x H x 2.
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(THREADS + SCANNERS, 1) kda_chunk_fwd_pair(
    const Element* q, const Element* k, const Value* v, const float* g, const float* beta, const float* initial_state, Value* o, float* final_state, int length, int heads, float scale) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  char* shared = reinterpret_cast<char*>(shared_memory);
  const int rank = blockIdx.x % BLOCKS_OF_A_HEAD, run = blockIdx.x / BLOCKS_OF_A_HEAD;
  const int sequence = run / heads, head = run % heads, chunks = (length + C - 1) / C, column = rank * COLUMNS;
  const float* initial_columns = initial_state == nullptr ? nullptr : initial_state + column;
  const Arguments given = {q, k, v + column, g, beta, initial_columns, o + column, final_state + column, heads, head, sequence, length, chunks, scale};
  if (threadIdx.x == 0) Signals(shared).prepare();
  meet_cluster();
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0);  // so that the compiler knows that all lanes have the same
  if (warp >= WARPS) {
    take_registers<SCANNER_REGISTERS>();
    scan(Workspaces{shared, rank, chunks}, shared + Memory::values, given);
  } else {
    give_registers<TEAM_REGISTERS>();
    compute_chunks(shared, given, {warp}, rank);
  }
  meet_cluster();  // until here the other block may write to this one
}
