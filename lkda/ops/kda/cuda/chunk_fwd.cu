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
#include "kda_inverse.cuh"
#include "named_barrier.cuh"
#include "registers.cuh"

constexpr int TEAMS = 2, SLOTS = TEAMS + 1;
constexpr int WARPS = CHUNK / 8, THREADS = 32 * WARPS;  // of a team
constexpr int FIRST_SCANNER = TEAMS * THREADS;
#include "kda_one_pass.cuh"

constexpr int AMONG_TEAM = 1, FILLED = AMONG_TEAM + TEAMS;  // the first of TEAMS barriers each
static_assert(WARPS == LEAVES && WARPS == 8 && LEVELS == 3 && BLOCKS == 4, "tree_pairs_of_eight");
static_assert(D == COLUMNS, "a lane has two channels of its warp's leaf, and the scanners have all columns of V");

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
  unsigned near[LEVELS];
  const Reach reach = find_reach(leaf_logs, place, near);
  write_workspace(workspace, place, gates, reach, q, k, scale);
  __syncwarp();
  write_levels(Tree{shared + Shared::tree}, place, gates, near, q, k);
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
  float beta = 0.f;  // of the token that has the thread's number
  const auto read = [&](int m) {
    inputs.read(given, m, team);
    if (team.thread() < C) beta = given.beta_of(m, team.thread());
  };
  read(min(team.number(), given.chunks - 1));
#pragma unroll 1
  for (int m = team.number(); m < given.chunks; m += TEAMS) {
    char* slot = slot_of(memory, m);
    if (team.thread() < C) {
      reinterpret_cast<float*>(shared + Shared::beta)[team.thread()] = beta;
      reinterpret_cast<float*>(slot + ChunkWorkspace::beta)[team.thread()] = beta;
    }
    Gates gates;
    gates.set(inputs.nats);
    Gates::share(inputs.nats, reinterpret_cast<float*>(shared + Shared::leaf_logs), team.leaf(), team.channel());
    const Leaf<float16> q = in_float16(inputs.q), k = in_float16(inputs.k);
    multiply_leaf(team, shared, slot, gates, q, k, given.scale);
    team.wait();  // the sums of all leaves' logs are there
    write_operands(team, shared, slot, gates, q, k, given.scale);
    // The team's next chunk. After the last one it is read again: if nothing were read, the old inputs would need registers.
    read(min(m + TEAMS, given.chunks - 1));
    invert(team, shared, slot_of(memory, opaque(m)), given.scale);  // the address is computed again, to save registers
    show_to_products();
    wait_at_barrier(FILLED + team.number(), THREADS + SCANNERS);
  }
}

// Scanners.

// The workspaces of both teams, for the scanners.
struct Workspaces {
  char* memory;
  int chunks;

  __device__ __forceinline__ bool has(int m) const { return m < chunks; }
  __device__ __forceinline__ const char* wait(int m) const {
    wait_at_barrier(FILLED + m % TEAMS, THREADS + SCANNERS);
    return slot_of(memory, m);
  }
  __device__ __forceinline__ void release(int) const {}
};

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
    scan(Workspaces{shared, chunks}, shared + Memory::values, given);
  } else {
    give_registers<TEAM_REGISTERS>();
    compute_chunks(shared, given, {warp});
  }
}
