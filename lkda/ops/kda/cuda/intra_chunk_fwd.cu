// Forward inside each chunk: everything that does not depend on the state. One block per chunk and head, all chunks in parallel.
//
//   E_t = exp(g_t)    Akk_ij = sum_d k_i k_j decay(j..i), j < i    Aqk_ij = sum_d q_i k_j decay(j..i), j <= i
//   T = (I + B Akk)^-1 = I + B T~,  B = diag(beta)
//
// decay(j..i) is the product of E over (j, i]. It is never computed as a quotient of running products. Instead each pair (i, j)
// belongs to the smallest group of 2h tokens, h = 8, 16 or 32, that has j in its first half and i in its second. With f_i the
// product of E from the boundary of the halves through i, and f_j the product after j up to it, both <= 1, decay = f_i f_j. So
// each level of the tree is a product of two matrices of rounded numbers <= |k|. Pairs inside 8 tokens are summed in float32.
//
// For heads of 128 in half precision on Hopper there is intra_chunk_fwd_helpers.cu.
#include "kda_inverse.cuh"

constexpr int THREADS = D * LEAVES / 2;  // a thread holds two channels of one leaf
constexpr int WARPS = THREADS / 32;
constexpr int LANES = D / 2 < 32 ? D / 2 : 32;        // lanes of a warp that share a leaf
constexpr int WARPS_PER_LEAF = D / 2 > 32 ? D / 64 : 1;

struct Shared {
  static constexpr int leaf_logs = 0;                                        // float [LEAVES][D]
  static constexpr int beta = leaf_logs + LEAVES * D * 4;                    // float [C]
  static constexpr int corner = beta + C * 4;                                // float [C][17]: the diagonal 16x16 blocks of Akk
  static constexpr int pairs = (corner + C * 17 * 4 + 127) / 128 * 128;  // Square
  static constexpr int below = pairs + Square::bytes;                        // Square: Akk below the diagonal blocks
  static constexpr int tree = below + Square::bytes;                    // LEVELS x Level, then T and T~
  static constexpr int inverse = tree, inverse_rest = tree + Square::bytes;
  static constexpr int leaf_t = inverse_rest + Square::bytes;           // float [8][C]: columns of T and T~ of the leaves
  static constexpr int leaf_rest = leaf_t + 8 * C * 4;
  static constexpr int after_tree = leaf_rest + 8 * C * 4 - tree;
  static constexpr int tree_bytes = LEVELS * Level::bytes > after_tree ? LEVELS * Level::bytes : after_tree;
  static constexpr int partial = below;                                      // float [WARPS][64], in the place of Akk before it is written: sums over half the channels
  static constexpr int bytes = tree + tree_bytes;
};
static_assert(WARPS_PER_LEAF == 1 || WARPS * 64 * 4 <= Square::bytes, "the partial sums fit where Akk will be");
static_assert(THREADS >= C + D / 2, "a thread for each column of the leaves' inverses, and for two channels");
static_assert(Shared::bytes == SHARED_BYTES, "variants.py allocates what this kernel uses");

// Sums value[0..31] over LANES lanes. Lane l of them gets the sums of the 32 / LANES values from 32 / LANES * l on.
__device__ __forceinline__ void sum_over_lanes(float (&value)[32]) {
  int count = 32;
#pragma unroll
  for (int step = LANES / 2; step >= 1; step /= 2) {
    count /= 2;
    const bool upper = lane_id() & step;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (i < count) {
        const float mine = upper ? value[i + count] : value[i];
        const float other = upper ? value[i] : value[i + count];
        value[i] = mine + __shfl_xor_sync(0xffffffffu, other, step);
      }
    }
  }
}

// The row i of pair number n = i (i - 1) / 2 + j, j < i, of a leaf. There are 28 pairs.
__device__ __forceinline__ int pair_row(int n) { return n < 1 ? 1 : n < 3 ? 2 : n < 6 ? 3 : n < 10 ? 4 : n < 15 ? 5 : n < 21 ? 6 : 7; }

__device__ __forceinline__ void store_leaf_sum(char* shared, int leaf, int batch, int n, float sum) {
  const int first = leaf * LEAF;
  if (n >= 28) {  // Aqk_ii
    const int i = first + (n - 28) + 4 * batch;
    store_one(Square::at(shared + Shared::pairs, i, i), sum);
    return;
  }
  const int i = pair_row(n), j = n - i * (i - 1) / 2;
  if (batch == 0) {
    float* corner = reinterpret_cast<float*>(shared + Shared::corner);
    const int row = first + i, column = first + j;
    corner[row * 17 + column % 16] = sum;
  } else {
    store_one(Square::at(shared + Shared::pairs, first + i, first + j), sum);
  }
}

// Akk and Aqk inside a leaf. Batch 0 is the 28 entries of Akk and Aqk_00..Aqk_33, batch 1 the 28 of Aqk and Aqk_44..Aqk_77.
__device__ __forceinline__ void leaf_pairs(char* shared, int leaf, const Gates& gates, const Leaf<Element>& q, const Leaf<Element>& k, float scale) {
#pragma unroll 1
  for (int batch = 0; batch < 2; ++batch) {
    float sum[32];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x = batch == 0 ? q[i] : q[i + 4], y = batch == 0 ? k[i] : k[i + 4];
      sum[28 + i] = scale * (x.x * y.x + x.y * y.y);
    }
#pragma unroll
    for (int channel = 0; channel < 2; ++channel) {
      float decayed[LEAF];  // k_j decay(j..i)
#pragma unroll
      for (int i = 0; i < LEAF; ++i) {
        const float e = channel == 0 ? gates.e[i].x : gates.e[i].y;
        const float ki = channel == 0 ? k[i].x : k[i].y, qi = channel == 0 ? q[i].x : q[i].y;
        const float row = batch == 0 ? ki : scale * qi;
#pragma unroll
        for (int j = 0; j < i; ++j) {
          decayed[j] *= e;
          const float term = row * decayed[j];
          sum[i * (i - 1) / 2 + j] = channel == 0 ? term : sum[i * (i - 1) / 2 + j] + term;
        }
        decayed[i] = ki;
      }
    }
    sum_over_lanes(sum);
    const int each = 32 / LANES, lane = lane_id() % LANES;
    if constexpr (WARPS_PER_LEAF > 1) {
      reinterpret_cast<float*>(shared + Shared::partial)[(threadIdx.x / 32) * 64 + batch * 32 + lane] = sum[0];
    } else {
#pragma unroll
      for (int n = 0; n < each; ++n) store_leaf_sum(shared, leaf, batch, lane * each + n, sum[n]);
    }
  }
  if constexpr (WARPS_PER_LEAF > 1) {
    __syncthreads();
    const float* partial = reinterpret_cast<const float*>(shared + Shared::partial);
    for (int n = threadIdx.x; n < LEAVES * 64; n += THREADS) {
      const int of = n / 64;
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS_PER_LEAF; ++w) sum += partial[(of * WARPS_PER_LEAF + w) * 64 + n % 64];
      store_leaf_sum(shared, of, n % 64 / 32, n % 32, sum);
    }
  }
}

__device__ __forceinline__ void invert_leaves(char* shared) {
  if (threadIdx.x >= C) return;
  invert_column<Shared>(shared, threadIdx.x);
}

// q, k: [rows, H, D] Element. g: [rows, H, D], beta: [rows, H] float32. workspaces: [chunks, H] ChunkWorkspace, result. An item is
// one chunk of one head, items = chunks x H. A block takes item blockIdx.x, then every gridDim.x-th, and reads the inputs of the
// next one while it computes.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) kda_intra_chunk_fwd(
    const Element* q, const Element* k, const float* g, const float* beta, char* workspaces, const int4* spans, int items, int length, int heads, float scale) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  char* shared = reinterpret_cast<char*>(shared_memory);
  const int channel = threadIdx.x % (D / 2) * 2, leaf = threadIdx.x / (D / 2);

  bool exists = false;
  Leaf<float> nats;
  Leaf<Element> qs, ks;
  float own_beta = 0.f;  // of token threadIdx.x
  auto ask = [&](int item) {
    const int channel = opaque(threadIdx.x) % (D / 2) * 2, leaf = opaque(threadIdx.x) / (D / 2);
    const Span span = span_of(item / heads, length, spans);
    exists = span.tokens > 0;
    if (!exists) return;
    nats.read(g, span, heads, item % heads, leaf, channel);
    qs.read(q, span, heads, item % heads, leaf, channel);
    ks.read(k, span, heads, item % heads, leaf, channel);
    if (threadIdx.x < C) own_beta = threadIdx.x < span.tokens ? beta[static_cast<long long>(span.start + threadIdx.x) * heads + item % heads] : 0.f;
  };
  ask(blockIdx.x);
#pragma unroll 1
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    if (!exists) {
      if (item + gridDim.x < items) ask(item + gridDim.x);
      continue;
    }
    auto workspace_of = [&](int item) { return workspaces + static_cast<long long>(item) * ChunkWorkspace::bytes; };
    char* workspace = workspace_of(item);
    if (threadIdx.x < C) {
      reinterpret_cast<float*>(shared + Shared::beta)[threadIdx.x] = own_beta;
      reinterpret_cast<float*>(workspace + ChunkWorkspace::beta)[threadIdx.x] = own_beta;
    }
    Gates gates;
    gates.set(nats);
    Gates::share(nats, reinterpret_cast<float*>(shared + Shared::leaf_logs), leaf, channel);
    __syncthreads();  // the workspace of the item before has been copied out

    const float* leaf_logs = reinterpret_cast<const float*>(shared + Shared::leaf_logs);
    Reach reach;
    float2 near[LEVELS];  // the reach on each level
#pragma unroll
    for (int level = 0; level < LEVELS; ++level) {
      near[level] = reach.at(level, leaf);
#if __CUDA_ARCH__ < 900  // for fewer registers; the compiler for later architectures does better without it
      reach.widen(leaf_logs, level, opaque(leaf), channel);
#else
      reach.widen(leaf_logs, level, leaf, channel);
#endif
    }
    reach.before = exp2_fast(reach.before);
    reach.after = exp2_fast(reach.after);
    float2 near_k[LEAF], near_q[LEAF];  // times the product inside the leaf
    gates.rows(make_float2(1.f, 1.f), [&](int i, float2 f) {
      near_k[i] = times(f, ks[i]);
      near_q[i] = times(make_float2(scale * f.x, scale * f.y), qs[i]);
    });
    char* k_in = Rows::from(workspace + ChunkWorkspace::k_in, leaf * LEAF);
    char* qg = Rows::from(workspace + ChunkWorkspace::qg, leaf * LEAF);
    char* kg = Rows::from(workspace + ChunkWorkspace::kg, leaf * LEAF);
#pragma unroll
    for (int level = 0; level < LEVELS; ++level)
      if (Level::is_row(level, leaf)) {
        Level::write_rows(shared + Shared::tree + level * Level::bytes, level, leaf, channel, near[level], near_k, false);
        Level::write_rows(shared + Shared::tree + level * Level::bytes, level, leaf, channel, near[level], near_q, true);
      }
#pragma unroll
    for (int i = 0; i < LEAF; ++i) {
      store_pair(Rows::at(k_in, i, channel), times(reach.before, near_k[i]));
      store_pair(Rows::at(qg, i, channel), times(reach.before, near_q[i]));
    }
    gates.columns(make_float2(1.f, 1.f), [&](int j, float2 f) { near_k[j] = times(f, ks[j]); });
#pragma unroll
    for (int level = 0; level < LEVELS; ++level)
      if (!Level::is_row(level, leaf)) Level::write_columns(shared + Shared::tree + level * Level::bytes, level, leaf, channel, near[level], near_k);
#pragma unroll
    for (int j = 0; j < LEAF; ++j) store_pair(Rows::at(kg, j, channel), times(reach.after, near_k[j]));
    leaf_pairs(shared, leaf, gates, qs, ks, scale);
    workspace = workspace_of(opaque(item));  // computed again, to save registers
    if (item + gridDim.x < items) ask(item + gridDim.x);
    __syncthreads();
    tree_pairs<Shared, WARPS>(shared, shared + Shared::pairs, opaque(threadIdx.x / 32), 1.f);
    __syncthreads();  // T and T~ take the place of the level tiles
    invert_leaves(shared);
    whole_decay<Shared>(shared, workspace, 2 * (opaque(threadIdx.x) - C));  // by threads that invert nothing
    __syncthreads();
    spread_leaves<Shared, THREADS>(shared, shared + Shared::pairs, opaque(threadIdx.x));
    merge_leaves<Shared, THREADS>(shared, shared + Shared::pairs, opaque(threadIdx.x));
    __syncthreads();
    merge<Shared, WARPS, 16>(shared, shared + Shared::pairs, opaque(threadIdx.x / 32));
    if constexpr (C == 64) {
      __syncthreads();
      merge<Shared, WARPS, 32>(shared, shared + Shared::pairs, opaque(threadIdx.x / 32));
    }
    __syncthreads();
    copy_pairs<Shared, THREADS>(shared, opaque(threadIdx.x), workspace);
  }
}
