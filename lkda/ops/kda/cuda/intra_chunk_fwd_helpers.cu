// What intra_chunk_fwd.cu computes, for heads of 128 in half precision on Hopper. It differs in three things:
//
//   Pairs inside a leaf are multiplied on tensor cores too (kda_leaf_products.cuh), with factors rounded to float16.
//   A block has HELPER_WARPS warps more, the helpers. They invert the matrix of an item while the workers go on to the next one.
//   The helpers also find the largest |v| of each item, which amax.cu does for the other kernel.
//
// Workers and helpers meet at two barriers for each item:
//   FREE    the helpers have read the matrices of the item before. The workers then write those of this item.
//   FILLED  the workers have written them. The helpers then invert.
#include "kda_half_operands.cuh"
#include "kda_inverse.cuh"
#include "kda_leaf_products.cuh"
#include "kda_scale.cuh"
#include "named_barrier.cuh"

using Value = VALUE;
constexpr int WORKERS = D * LEAVES / 2, HELPERS = 32 * HELPER_WARPS;  // threads; a worker holds two channels of one leaf
constexpr int WORKER_WARPS = WORKERS / 32;
static_assert(D == 128 && C == 64, "two warps have the channels of a leaf");
static_assert(HELPERS == C, "a helper prefetches one row of v");

struct Shared {
  static constexpr int leaf_logs = 0;                                    // float [LEAVES][D]
  static constexpr int beta = leaf_logs + LEAVES * D * 4;                // float [C]
  static constexpr int amax = beta + C * 4;                              // float [2][HELPER_WARPS]
  static constexpr int corner = amax + 8 * HELPER_WARPS;                 // float [C][17]: the diagonal 16x16 blocks of Akk
  static constexpr int pairs = (corner + C * 17 * 4 + 127) / 128 * 128;  // Square
  static constexpr int below = pairs + Square::bytes;                    // Square: Akk below the diagonal blocks
  static constexpr int leaf_operands = below + Square::bytes;            // LeafProducts [WORKER_WARPS]
  static constexpr int tree = leaf_operands + WORKER_WARPS * LeafProducts<>::bytes;  // LEVELS x Level
  static constexpr int inverse = tree + LEVELS * Level::bytes;           // Square: T
  static constexpr int inverse_rest = inverse + Square::bytes;           // Square: T~
  static constexpr int leaf_t = inverse_rest + Square::bytes;            // float [8][C]: columns of T and T~ of the leaves
  static constexpr int leaf_rest = leaf_t + 8 * C * 4;
  static constexpr int bytes = leaf_rest + 8 * C * 4;
};
static_assert(Shared::bytes == SHARED_BYTES, "variants.py allocates what this kernel uses");

// Barriers: the first two among workers and among helpers, the others between both.
constexpr int AMONG_WORKERS = 1, AMONG_HELPERS = 2, FREE = 3, FILLED = 4;

// The arguments of the kernel.
struct Arguments {
  const Element *q, *k;
  const Value* v;
  const float *g, *beta;
  char* workspaces;
  float* amax;
  const int4* spans;
  int items, length, heads;
  float scale;

  // 0 past the end.
  __device__ __forceinline__ float beta_of(int token, const Span& span, int item) const {
    return token < span.tokens ? beta[static_cast<long long>(span.start + token) * heads + item % heads] : 0.f;
  }
  __device__ __forceinline__ char* workspace(int item) const { return workspaces + static_cast<long long>(item) * ChunkWorkspace::bytes; }
};

// Helpers.

__device__ __forceinline__ int helper() { return opaque(threadIdx.x) - WORKERS; }
__device__ __forceinline__ void wait_for_helpers() { wait_at_barrier(AMONG_HELPERS, HELPERS); }

// Writes the largest |v| of an item. `turn` is 0 and 1 in turns, so that the values of the item before may still be read.
__device__ __forceinline__ void find_amax(char* shared, const Arguments& given, const Span& span, int head, int turn, float* amax) {
  const float x = amax_in_warp(packed_amax_of<HELPERS>(given.v, span, given.heads, head, helper()));
  float* of_warps = reinterpret_cast<float*>(shared + Shared::amax) + turn * HELPER_WARPS;
  const int warp = helper() / 32;
  if (lane_id() == 0) of_warps[warp] = x;
  wait_for_helpers();
  if (helper() == 0) {
    float largest = of_warps[0];
    for (int w = 1; w < HELPER_WARPS; ++w) largest = fmaxf(largest, of_warps[w]);
    *amax = largest;
  }
}

// Begins to bring v of an item to the L2 cache, where find_amax reads it.
__device__ __forceinline__ void prefetch_values(const Arguments& given, int item) {
  if (item >= given.items) return;
  const Span span = span_of(item / given.heads, given.length, given.spans);
  if (helper() >= span.tokens) return;
  const Value* row = given.v + (static_cast<long long>(span.start + helper()) * given.heads + item % given.heads) * D;
  prefetch(row);
  prefetch(row + 64);
}

// Copies beta of an item to shared memory and to the workspace.
__device__ __forceinline__ void copy_beta(char* shared, const Arguments& given, const Span& span, int item) {
#pragma unroll
  for (int first = 0; first < C; first += HELPERS) {
    const int token = first + helper();
    const float x = given.beta_of(token, span, item);
    reinterpret_cast<float*>(shared + Shared::beta)[token] = x;
    reinterpret_cast<float*>(given.workspace(item) + ChunkWorkspace::beta)[token] = x;
  }
}

// T~ from Akk, and the pairs to the workspace.
__device__ __forceinline__ void invert(char* shared, char* workspace) {
#pragma unroll 1
  for (int first = 0; first < C; first += HELPERS) invert_column<Shared>(shared, first + helper());
  wait_for_helpers();
  spread_leaves<Shared, HELPERS>(shared, shared + Shared::pairs, helper());
  merge_leaves<Shared, HELPERS>(shared, shared + Shared::pairs, helper());
  wait_for_helpers();
  merge<Shared, HELPER_WARPS, 16>(shared, shared + Shared::pairs, helper() / 32);
  wait_for_helpers();
  merge<Shared, HELPER_WARPS, 32>(shared, shared + Shared::pairs, helper() / 32);
  wait_for_helpers();
  copy_pairs<Shared, HELPERS>(shared, helper(), workspace);
}

__device__ __forceinline__ void help(char* shared, const Arguments& given) {
  int turn = 0;
#pragma unroll 1
  for (int item = blockIdx.x; item < given.items; item += gridDim.x, turn ^= 1) {
    const Span span = span_of(item / given.heads, given.length, given.spans);
    if (span.tokens <= 0) continue;
    wait_at_barrier(FREE, WORKERS + HELPERS);
    find_amax(shared, given, span, item % given.heads, turn, given.amax + item);
    copy_beta(shared, given, span, item);
    wait_at_barrier(FILLED, WORKERS + HELPERS);
    prefetch_values(given, item + gridDim.x);
    invert(shared, given.workspace(item));
  }
}

// Workers.

// A worker's leaf and its two channels. It is computed again for each use, so that no address computed from it is kept in registers.
struct Place {
  int channel, leaf;

  __device__ __forceinline__ explicit Place(int warp) : channel(warp % 2 * 64 + 2 * (opaque(threadIdx.x) % 32)), leaf(warp / 2) {}
};

// Reads what a worker needs of an item. exists: whether it has tokens; if not, nothing is read.
__device__ __forceinline__ void read(const Arguments& given, int item, int warp, bool& exists, Leaf<float>& nats, Leaf<Element>& q, Leaf<Element>& k) {
  const Place at(warp);
  const int chunk = static_cast<unsigned>(item) / static_cast<unsigned>(given.heads), head = item - chunk * given.heads;  // without signs, which would take registers
  const Span span = span_of(chunk, given.length, given.spans);
  exists = span.tokens > 0;
  if (!exists) return;
  nats.read(given.g, span, given.heads, head, at.leaf, at.channel);
  q.read(given.q, span, given.heads, head, at.leaf, at.channel);
  k.read(given.k, span, given.heads, head, at.leaf, at.channel);
}

// The factors of a worker's leaf: between its tokens, from it to the boundaries on each level, and to the ends of the chunk.
struct Factors {
  Gates gates;
  unsigned near[LEVELS];  // the reach on each level, float16
  Reach reach;

  // All workers call it, and share the sums of their logs.
  __device__ __forceinline__ Factors(char* shared, const Leaf<float>& nats, int warp) {
    float* leaf_logs = reinterpret_cast<float*>(shared + Shared::leaf_logs);
    const Place writes(warp);
    gates.set(nats);
    Gates::share(nats, leaf_logs, writes.leaf, writes.channel);
    wait_at_barrier(AMONG_WORKERS, WORKERS);  // they have also computed the products of the item before
    reach = find_reach(leaf_logs, Place(warp), near);
  }
};

// The sums of one warp over its 64 channels, in the place of its operands.
struct LeafSumsOfWarp {
  static __device__ __forceinline__ float4* at(char* shared, int warp, int product) {
    return reinterpret_cast<float4*>(shared + Shared::leaf_operands + warp * LeafProducts<>::bytes) + product * 32 + opaque(lane_id());
  }
  static __device__ __forceinline__ void write(char* shared, int warp, int product, const LeafSums& sums) {
    *at(shared, warp, product) = {sums.top.x, sums.top.y, sums.bottom.x, sums.bottom.y};
  }
  // Summed over both warps of a leaf, of which `warp` is one.
  static __device__ __forceinline__ LeafSums read(char* shared, int warp, int product) {
    const float4 a = *at(shared, warp, product), b = *at(shared, warp ^ 1, product);
    return {{a.x + b.x, a.y + b.y}, {a.z + b.z, a.w + b.w}};
  }
};

// Akk and Aqk inside a leaf, as far as a warp has its channels. They are stored after a barrier, by store_leaf_pairs.
__device__ __forceinline__ void multiply_leaf(char* shared, int warp, const Gates& gates, const Leaf<float16>& q, const Leaf<float16>& k) {
  const LeafProducts<> products(shared + Shared::leaf_operands + warp * LeafProducts<>::bytes, gates, q, k);
  const LeafSums neighbours = products.neighbours(), farther = products.farther(gates);
  LeafSumsOfWarp::write(shared, warp, 0, neighbours);
  LeafSumsOfWarp::write(shared, warp, 1, farther);
}

// The two warps of a leaf store one product each.
__device__ __forceinline__ void store_leaf_pairs(char* shared, int warp, float scale) {
  const int first = warp / 2 * LEAF;
  float* corner = reinterpret_cast<float*>(shared + Shared::corner) + first * 17 + first % 16;
  if (warp % 2 == 0) {
    for_neighbours(
        LeafSumsOfWarp::read(shared, warp, 0), [&](int i, int j, float a) { corner[i * 17 + j] = a; },
        [&](int i, int j, float a) { store_one(Square::at(shared + Shared::pairs, first + i, first + j), scale * a); });
  }
  if (warp % 2 == 1) {
    for_farther(
        LeafSumsOfWarp::read(shared, warp, 1),
        [&](int i, int j, float2 a) {
          corner[i * 17 + j] = a.x;
          corner[i * 17 + j + 1] = a.y;
        },
        [&](int i, int j, float2 a) { store_pair(Square::at(shared + Shared::pairs, first + i, first + j), times(make_float2(scale, scale), a)); });
  }
}

__device__ __forceinline__ void work(char* shared, const Arguments& given, int warp) {
  bool exists = false;
  Leaf<float> nats;
  Leaf<Element> first_q, first_k;
  read(given, blockIdx.x, warp, exists, nats, first_q, first_k);
  Leaf<float16> q = in_float16(first_q), k = in_float16(first_k);
#pragma unroll 1
  for (int item = blockIdx.x; item < given.items; item += gridDim.x) {
    if (!exists) {
      Leaf<Element> next_q{}, next_k{};  // a new one for each item, because one that is kept takes registers
      if (item + gridDim.x < given.items) read(given, item + gridDim.x, warp, exists, nats, next_q, next_k);
      q = in_float16(next_q), k = in_float16(next_k);
      continue;
    }
    char* workspace = given.workspace(item);
    const Factors factors(shared, nats, warp);
    __syncwarp();
    write_workspace(workspace, Place(warp), factors.gates, factors.reach, q, k, given.scale);
    __syncwarp();
    Leaf<Element> next_q{}, next_k{};
    nats = {};  // so that those of this item need no registers any more, whether there is a next one or not
    if (item + gridDim.x < given.items) read(given, item + gridDim.x, warp, exists, nats, next_q, next_k);
    write_levels(Tree{shared + Shared::tree}, Place(warp), factors.gates, factors.near, q, k);
    __syncwarp();
    multiply_leaf(shared, warp, factors.gates, q, k);
    whole_decay<Shared>(shared, workspace, 2 * opaque(threadIdx.x));
    wait_at_barrier(FREE, WORKERS + HELPERS);
    tree_pairs<Shared, WORKER_WARPS>(shared, shared + Shared::pairs, warp, given.scale);
    store_leaf_pairs(shared, warp, given.scale);
    q = in_float16(next_q), k = in_float16(next_k);
    wait_at_barrier(FILLED, WORKERS + HELPERS);
  }
}

// q, k: [rows, H, D] Element. v: [rows, H, D] Value. g: [rows, H, D], beta: [rows, H] float32. workspaces: [chunks, H] ChunkWorkspace,
// result. amax: [chunks, H] float32, the largest |v|, result. An item is one chunk of one head, items = chunks x H. A block takes
// item blockIdx.x, then every gridDim.x-th, and reads the inputs of the next one while it computes.
extern "C" __global__ void __launch_bounds__(WORKERS + HELPERS, RESIDENT) kda_intra_chunk_fwd(
    const Element* q, const Element* k, const Value* v, const float* g, const float* beta, char* workspaces, float* amax, const int4* spans, int items, int length, int heads, float scale) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  char* shared = reinterpret_cast<char*>(shared_memory);
  const Arguments given = {q, k, v, g, beta, workspaces, amax, spans, items, length, heads, scale};
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0);  // so that the compiler knows that all lanes have the same
  if (warp >= WORKER_WARPS) {
    help(shared, given);
    return;
  }
  work(shared, given, warp);
}
