// Forward inside each chunk: everything that does not depend on the state. One block per chunk and head, all chunks in parallel.
//
//   E_t = exp(g_t)    Akk_ij = sum_d k_i k_j decay(j..i), j < i    Aqk_ij = sum_d q_i k_j decay(j..i), j <= i
//   T = (I + B Akk)^-1 = I + B T~,  B = diag(beta)
//
// decay(j..i) is the product of E over (j, i]. It is never computed as a quotient of running products. Instead each pair (i, j)
// belongs to the smallest group of 2h tokens, h = 8, 16 or 32, that has j in its first half and i in its second. With f_i the
// product of E from the boundary of the halves through i, and f_j the product after j up to it, both <= 1, decay = f_i f_j. So
// each level of the tree is a product of two matrices of rounded numbers <= |k|. Pairs inside 8 tokens are summed in float32, or
// with LEAF_PRODUCTS on tensor cores too (kda_leaf_products.cuh).
//
// With HELPER_WARPS a block has that many warps more. They invert the matrix of an item while the other warps, the workers, go on to
// the next one. With FINDS_AMAX they find the largest |v| of each item too, as amax.cu does otherwise.
#include "kda_leaf_products.cuh"
#include "kda_scale.cuh"
#include "named_barrier.cuh"

using Value = VALUE;
constexpr int THREADS = D * LEAVES / 2;  // the workers; each holds two channels of one leaf
constexpr int WARPS = THREADS / 32;
constexpr int HELPERS = 32 * HELPER_WARPS;
static_assert(HELPERS == 0 || LEAF_PRODUCTS, "the helpers need the registers that LEAF_PRODUCTS frees");
constexpr int LANES = D / 2 < 32 ? D / 2 : 32;        // lanes of a warp that share a leaf
constexpr int WARPS_PER_LEAF = D / 2 > 32 ? D / 64 : 1;

struct Shared {
  static constexpr int leaf_logs = 0;                                        // float [LEAVES][D]
  static constexpr int beta = leaf_logs + LEAVES * D * 4;                    // float [C]
  static constexpr int amax = beta + C * 4;                                     // float [2][HELPER_WARPS]
  static constexpr int corner = amax + 8 * HELPER_WARPS;                                // float [C][17]: the diagonal 16x16 blocks of Akk
  static constexpr int pairs = (corner + C * 17 * 4 + 127) / 128 * 128;  // Square
  static constexpr int below = pairs + Square::bytes;                        // Square: Akk below the diagonal blocks
  static constexpr int leaf_operands = below + Square::bytes;                // LeafProducts [WARPS]
  static constexpr int tree = leaf_operands + (LEAF_PRODUCTS ? WARPS * LeafProducts::bytes : 0);  // LEVELS x Level, then T and T~
  static constexpr int inverse = HELPERS > 0 ? tree + LEVELS * Level::bytes : tree;
  static constexpr int inverse_rest = inverse + Square::bytes;
  static constexpr int leaf_t = inverse_rest + Square::bytes;           // float [8][C]: columns of T and T~ of the leaves
  static constexpr int leaf_rest = leaf_t + 8 * C * 4;
  static constexpr int end = leaf_rest + 8 * C * 4;
  static constexpr int partial = below;                                      // float [WARPS][64], in the place of Akk before it is written: sums over half the channels
  static constexpr int bytes = end > tree + LEVELS * Level::bytes ? end : tree + LEVELS * Level::bytes;
};
static_assert(WARPS_PER_LEAF == 1 || WARPS * 64 * 4 <= Square::bytes, "the partial sums fit where Akk will be");
static_assert(THREADS >= C + D / 2, "a thread for each column of the leaves' inverses, and for two channels");
static_assert(Shared::bytes == SHARED_BYTES, "variants.py allocates what this kernel uses");

// Barriers between workers and helpers (named_barrier.cuh).
constexpr int WORKERS = 1, HELPERS_ONLY = 2, FREE = 3, FILLED = 4;

__device__ __forceinline__ void wait_for_workers() {
  if constexpr (HELPERS == 0) {
    __syncthreads();
  } else {
    wait_at_barrier(WORKERS, THREADS);
  }
}

// The number of the thread's warp, in a form that the compiler knows to be equal in all lanes.
__device__ __forceinline__ int warp_number() { return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0); }

// The threads that invert: the helpers, or all if there are none.
constexpr int TEAM = HELPERS > 0 ? HELPERS : THREADS;

__device__ __forceinline__ int team_thread() { return opaque(threadIdx.x) - (HELPERS > 0 ? THREADS : 0); }
__device__ __forceinline__ int team_warp() { return HELPERS > 0 ? team_thread() / 32 : opaque(threadIdx.x / 32); }
__device__ __forceinline__ void wait_for_team() {
  if constexpr (HELPERS == 0) {
    __syncthreads();
  } else {
    wait_at_barrier(HELPERS_ONLY, HELPERS);
  }
}

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

// The sums of one warp over its 64 channels, in the place of its operands.
struct LeafSumsOfWarp {
  static __device__ __forceinline__ float4* at(char* shared, int warp, int product) {
    return reinterpret_cast<float4*>(shared + Shared::leaf_operands + warp * LeafProducts::bytes) + product * 32 + opaque(lane_id());
  }
  static __device__ __forceinline__ void write(char* shared, int warp, int product, const LeafSums& sums) {
    *at(shared, warp, product) = {sums.top.x, sums.top.y, sums.bottom.x, sums.bottom.y};
  }
  // Summed over the warps of a leaf, of which `warp` is one.
  static __device__ __forceinline__ LeafSums read(char* shared, int warp, int product) {
    float4 a = *at(shared, warp, product);
    if constexpr (WARPS_PER_LEAF > 1) {
      const float4 b = *at(shared, warp ^ 1, product);
      a = {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
    }
    return {{a.x, a.y}, {a.z, a.w}};
  }
};

// Akk and Aqk inside a leaf, as far as a warp has its channels. They are stored after a barrier, by store_leaf_pairs.
__device__ __forceinline__ void multiply_leaf(char* shared, int warp, const Gates& gates, const Leaf<float16>& q, const Leaf<float16>& k) {
  const LeafProducts products(shared + Shared::leaf_operands + warp * LeafProducts::bytes, gates, q, k);
  const LeafSums neighbours = products.neighbours(), farther = products.farther(gates);
  LeafSumsOfWarp::write(shared, warp, 0, neighbours);
  LeafSumsOfWarp::write(shared, warp, 1, farther);
}

__device__ __forceinline__ void store_leaf_pairs(char* shared, int warp, float scale) {
  const int first = warp / WARPS_PER_LEAF * LEAF;
  float* corner = reinterpret_cast<float*>(shared + Shared::corner) + first * 17 + first % 16;
  if (warp % WARPS_PER_LEAF == 0) {
    for_neighbours(
        LeafSumsOfWarp::read(shared, warp, 0), [&](int i, int j, float a) { corner[i * 17 + j] = a; },
        [&](int i, int j, float a) { store_one(Square::at(shared + Shared::pairs, first + i, first + j), scale * a); });
  }
  if (warp % WARPS_PER_LEAF == WARPS_PER_LEAF - 1) {
    for_farther(
        LeafSumsOfWarp::read(shared, warp, 1),
        [&](int i, int j, float2 a) {
          corner[i * 17 + j] = a.x;
          corner[i * 17 + j + 1] = a.y;
        },
        [&](int i, int j, float2 a) { store_pair(Square::at(shared + Shared::pairs, first + i, first + j), times(make_float2(scale, scale), a)); });
  }
}

// Akk and Aqk between the halves of each group of each level, on tensor cores. A task is 16 rows of one level. scale: of Aqk, 1 if q^ has it.
__device__ __forceinline__ void tree_pairs(char* shared, int warp, float scale) {
  for (int task = warp; task < LEVELS * BLOCKS; task += WARPS) {
    const int level = LEVELS - 1 - task / BLOCKS, rows = task % BLOCKS * 16, bits = LEAF_BITS + level, half = 1 << bits;
    const char* tree = shared + Shared::tree + level * Level::bytes;
    const int group = rows >> (bits + 1), columns = (half + 15) / 16, first = group << bits & ~15;
    Sum sum[BLOCKS / 2];
#pragma unroll
    for (int n = 0; n < BLOCKS / 2; ++n) clear(sum[n]);
#pragma unroll
    for (int d = 0; d < D; d += 16) {
      const Block<Operand> a = Level::Rows::load(tree + Level::rows, rows, d);
#pragma unroll
      for (int n = 0; n < BLOCKS / 2; ++n) {
        if (n < columns) product(sum[n], a, Level::Columns::load_right(tree + Level::columns, first + n * 16, d));
      }
    }
    const int start = group << (bits + 1);  // the group's first token
    if (level == 0) {  // rows 0-7 are of k, 8-15 of q; half of the columns are another group's
      const Sum& s = sum[0];
      const int i = start + LEAF + lane_row(), j = start + lane_column();
      float* corner = reinterpret_cast<float*>(shared + Shared::corner) + i * 17 + lane_column();
      const float2 m = group % 2 == 0 ? s.pair[0] : s.pair[2], p = group % 2 == 0 ? s.pair[1] : s.pair[3];
      corner[0] = m.x;
      corner[1] = m.y;
      store_pair(Square::at(shared + Shared::pairs, i, j), times(make_float2(scale, scale), p));
      continue;
    }
#pragma unroll
    for (int n = 0; n < BLOCKS / 2; ++n) {
      if (n < columns) {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const int i = start + half + (rows & (half - 1)) + quadrant_row(q), j = start + n * 16 + quadrant_column(q);
          if (rows & half) {
            store_pair(Square::at(shared + Shared::pairs, i, j), times(make_float2(scale, scale), sum[n].pair[q]));
          } else {
            store_pair(Square::at(shared + Shared::below, i, j), sum[n].pair[q]);
          }
        }
      }
    }
  }
}

// T and T~ of the 8x8 diagonal blocks, by substitution in float32. Each thread has one column c:
//   T~_ic = -sum_{c <= j < i} Akk_ij T_jc,    T_ic = [i = c] + beta_i T~_ic
__device__ __forceinline__ void invert_column(char* shared, const float* betas, int column) {
  const int leaf = column / LEAF, c = column % LEAF, first = leaf * LEAF;
  const float* m = reinterpret_cast<const float*>(shared + Shared::corner) + first * 17 + leaf % 2 * LEAF;
  const float* beta = betas + first;
  float* leaf_t = reinterpret_cast<float*>(shared + Shared::leaf_t) + column;
  float* leaf_rest = reinterpret_cast<float*>(shared + Shared::leaf_rest) + column;
  float entry[LEAF * (LEAF - 1) / 2], weight[LEAF], t[LEAF], rest[LEAF];  // all read first: a load would wait for the stores before it
#pragma unroll
  for (int i = 0; i < LEAF; ++i) {
    weight[i] = beta[i];
#pragma unroll
    for (int j = 0; j < i; ++j) entry[i * (i - 1) / 2 + j] = m[i * 17 + j];
  }
#pragma unroll
  for (int i = 0; i < LEAF; ++i) {
    rest[i] = 0.f;
#pragma unroll
    for (int j = 0; j < i; ++j) rest[i] -= j >= c ? entry[i * (i - 1) / 2 + j] * t[j] : 0.f;
    t[i] = i == c ? 1.f : i > c ? weight[i] * rest[i] : 0.f;
  }
#pragma unroll
  for (int i = 0; i < LEAF; ++i) {
    leaf_t[i * C] = t[i];
    leaf_rest[i * C] = rest[i];
  }
}
__device__ __forceinline__ void invert_leaves(char* shared, const float* betas) {
  if constexpr (HELPERS == 0) {
    if (threadIdx.x < C) invert_column(shared, betas, threadIdx.x);
  } else {
#pragma unroll 1
    for (int first = 0; first < C; first += TEAM) invert_column(shared, betas, first + team_thread());
  }
}

// Copies entry (i, c) of each inverted leaf to the matrices that use it.
__device__ __forceinline__ void spread_leaves(char* shared) {
  for (int n = team_thread(); n < C * LEAF; n += TEAM) {
    const int i = n / C, column = n % C, row = column / LEAF * LEAF + i;
    const float t = reinterpret_cast<const float*>(shared + Shared::leaf_t)[n], rest = reinterpret_cast<const float*>(shared + Shared::leaf_rest)[n];
    store_one(Square::at(shared + Shared::inverse, row, column), t);
    store_one(Square::at(shared + Shared::inverse_rest, row, column), rest);
    if (row > column) store_one(Square::at(shared + Shared::pairs, column, row), rest);
  }
}

// exp(G_C), by the threads that invert nothing, or the first workers.
__device__ __forceinline__ void whole_decay(const char* shared, char* workspace) {
  const int channel = 2 * (opaque(threadIdx.x) - (HELPERS > 0 ? 0 : C));
  if (channel < 0 || channel >= D) return;
  float2 sum = make_float2(0.f, 0.f);
#pragma unroll
  for (int leaf = 0; leaf < LEAVES; ++leaf) add_to(sum, *reinterpret_cast<const float2*>(shared + Shared::leaf_logs + (leaf * D + channel) * 4));
  *reinterpret_cast<float2*>(workspace + ChunkWorkspace::decay + channel * 4) = exp2_fast(sum);
}

// The 8x8 block of T~ below two diagonal blocks 1 and 2, in float32. Eight neighbouring threads have a column:
//   T~_21 = -(I + T~_22 B_2) X,    X = Akk_21 T_11
__device__ __forceinline__ void merge_leaves(char* shared, const float* betas) {
  for (int n = team_thread(); n < BLOCKS * 64; n += TEAM) {
    const int block = n / 64, c = n % 64 / LEAF, i = n % LEAF, upper = block * 16, lower = upper + LEAF;
    const float* m = reinterpret_cast<const float*>(shared + Shared::corner) + (lower + i) * 17;
    const float* beta = betas + lower;
    const float* leaf_t = reinterpret_cast<const float*>(shared + Shared::leaf_t) + upper + c;
    const float* leaf_rest = reinterpret_cast<const float*>(shared + Shared::leaf_rest) + lower;
    float x = 0.f;
#pragma unroll
    for (int l = 0; l < LEAF; ++l) x += m[l] * leaf_t[l * C];
    float rest = -x;
    const float weighted = beta[i] * x;
#pragma unroll
    for (int l = 0; l < LEAF - 1; ++l) {
      const float other = __shfl_sync(0xffffffffu, weighted, (lane_id() & ~7) + l);
      rest -= l < i ? leaf_rest[i * C + l] * other : 0.f;
    }
    store_one(Square::at(shared + Shared::inverse, lower + i, upper + c), beta[i] * rest);
    store_one(Square::at(shared + Shared::inverse, upper + c, lower + i), 0.f);
    store_one(Square::at(shared + Shared::inverse_rest, lower + i, upper + c), rest);
    store_one(Square::at(shared + Shared::inverse_rest, upper + c, lower + i), 0.f);
    store_one(Square::at(shared + Shared::pairs, upper + c, lower + i), rest);
  }
}

// The block of T~ below two inverted diagonal blocks 1 and 2 of HALF tokens:
//   T~_21 = -(I + T~_22 B_2) X,    X = Akk_21 T_11
// It is computed transposed, X^T = T_11^T Akk_21^T: then a sum is the next operand, and the result lies as `pairs` holds it.
template <int HALF>
__device__ __forceinline__ void merge(char* shared, const float* beta) {
  constexpr int N = HALF / 16;
  for (int task = team_warp(); task < C / (2 * HALF) * N; task += TEAM / 32) {
    const int upper = task / N * 2 * HALF, lower = upper + HALF, column = upper + task % N * 16;
    Sum x[N];
    Block<Operand> weighted[N];  // X^T B_2
#pragma unroll
    for (int n = 0; n < N; ++n) {
      clear(x[n]);
#pragma unroll
      for (int l = 0; l < N; ++l)
        if (upper + l * 16 >= column)  // T_11 is lower triangular, and only that part was written
          product(x[n], Square::load_transposed(shared + Shared::inverse, upper + l * 16, column),
                  Square::load_right(shared + Shared::below, lower + n * 16, upper + l * 16));
      Sum scaled;
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int i = lower + n * 16 + quadrant_column(q);
        scaled.pair[q] = make_float2(x[n].pair[q].x * beta[i], x[n].pair[q].y * beta[i + 1]);
      }
      weighted[n] = round_to<Operand>(scaled);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int l = 0; l <= n; ++l) product(x[n], weighted[l], Square::load_right(shared + Shared::inverse_rest, lower + n * 16, lower + l * 16));
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int j = column + quadrant_row(q), i = lower + n * 16 + quadrant_column(q);
        const float2 rest = make_float2(-x[n].pair[q].x, -x[n].pair[q].y);
        store_pair(Square::at(shared + Shared::pairs, j, i), rest);
        if (2 * HALF < C) {
          store_one(Square::at(shared + Shared::inverse_rest, i, j), rest.x);
          store_one(Square::at(shared + Shared::inverse_rest, i + 1, j), rest.y);
          store_one(Square::at(shared + Shared::inverse, i, j), rest.x * beta[i]);
          store_one(Square::at(shared + Shared::inverse, i + 1, j), rest.y * beta[i + 1]);
        }
      }
    }
  }
}

// T~ of the chunk from Akk, and the pairs to the workspace. Called by the team after a barrier.
__device__ __forceinline__ void invert(char* shared, const float* betas, char* workspace) {
  invert_leaves(shared, betas);
  if constexpr (HELPERS == 0) whole_decay(shared, workspace);
  wait_for_team();
  spread_leaves(shared);
  merge_leaves(shared, betas);
  wait_for_team();
  merge<16>(shared, betas);
  if constexpr (C == 64) {
    wait_for_team();
    merge<32>(shared, betas);
  }
  wait_for_team();
  for (int at = team_thread() * 16; at < Square::bytes; at += TEAM * 16)
    *reinterpret_cast<uint4*>(workspace + ChunkWorkspace::pairs + at) = *reinterpret_cast<const uint4*>(shared + Shared::pairs + at);
}

// Writes the largest |v| of a chunk. The helpers do not wait for each other again until `turn` has changed.
template <class Half>
__device__ __forceinline__ void find_amax(char* shared, const Half* v, const Span& span, int heads, int head, int turn, float* amax) {
  const float x = amax_in_warp(packed_amax_of<HELPERS>(v, span, heads, head, team_thread()));
  float* of_warps = reinterpret_cast<float*>(shared + Shared::amax) + turn * HELPER_WARPS;
  const int warp = team_warp();
  if (lane_id() == 0) of_warps[warp] = x;
  wait_for_team();
  if (team_thread() == 0) {
    float largest = of_warps[0];
    for (int w = 1; w < HELPER_WARPS; ++w) largest = fmaxf(largest, of_warps[w]);
    *amax = largest;
  }
}

// A thread's two channels and its leaf. The channels are computed again, so that no address computed from them is kept in registers.
__device__ __forceinline__ void place(int warp, int& channel, int& leaf) {
  channel = warp % WARPS_PER_LEAF * 64 + 2 * (opaque(threadIdx.x) % 32);
  leaf = warp / WARPS_PER_LEAF;
}

// Writes the operands of all levels. They and their factors are rounded to float16.
__device__ __forceinline__ void write_levels(char* tree, int warp, const Gates& gates, const unsigned (&reaches)[LEVELS], const Leaf<float16>& q, const Leaf<float16>& k) {
  int channel, leaf;
  place(warp, channel, leaf);
  unsigned near[LEAF];  // products inside the leaf
  gates.rows(make_float2(1.f, 1.f), [&](int i, float2 f) { near[i] = pack(float16{}, f); });
#pragma unroll
  for (int level = 0; level < LEVELS; ++level)
    if (Level::is_row(level, leaf)) Level::write_rows(tree + level * Level::bytes, level, leaf, channel, reaches[level], near, q, k);
  gates.columns(make_float2(1.f, 1.f), [&](int j, float2 f) { near[j] = product_of_pairs(float16{}, pack(float16{}, f), k.pair[j]); });
#pragma unroll
  for (int level = 0; level < LEVELS; ++level)
    if (!Level::is_row(level, leaf)) Level::write_columns(tree + level * Level::bytes, level, leaf, channel, reaches[level], near);
}

// Writes k_in, qg and kg. Their factors are rounded to float16 too.
__device__ __forceinline__ void write_workspace(char* workspace, int warp, const Gates& gates, const Reach& reach, const Leaf<float16>& q, const Leaf<float16>& k, float scale) {
  int channel, leaf;
  place(warp, channel, leaf);
  auto write = [&](int matrix, int i, float2 factor, const Leaf<float16>& x) {
    char* at = workspace + static_cast<unsigned>(Rows::offset(leaf * LEAF + i, channel)) + matrix;
    *reinterpret_cast<unsigned*>(at) = product_of_pairs(float16{}, pack(float16{}, factor), x.pair[i]);
  };
  gates.rows(reach.before, [&](int i, float2 f) {
    write(ChunkWorkspace::k_in, i, f, k);
    write(ChunkWorkspace::qg, i, make_float2(scale * f.x, scale * f.y), q);
  });
  gates.columns(reach.after, [&](int j, float2 f) { write(ChunkWorkspace::kg, j, f, k); });
}

// q, k: [rows, H, D] Element. v: [rows, H, D] Value. g: [rows, H, D], beta: [rows, H] float32. workspaces: [chunks, H] ChunkWorkspace,
// result. amax: [chunks, H] float32, the largest |v|, result of the helpers. An item is one chunk of one head, items = chunks x H. A
// block takes item blockIdx.x, then every gridDim.x-th, and reads the inputs of the next one while it computes.
extern "C" __global__ void __launch_bounds__(THREADS + HELPERS, RESIDENT) kda_intra_chunk_fwd(
    const Element* q, const Element* k, const Value* v, const float* g, const float* beta, char* workspaces, float* amax, const int4* spans, int items, int length, int heads, float scale) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  char* shared = reinterpret_cast<char*>(shared_memory);
  auto workspace_of = [&](int item) { return workspaces + static_cast<long long>(item) * ChunkWorkspace::bytes; };
  float* const betas = reinterpret_cast<float*>(shared + Shared::beta);
  auto beta_of = [&](int token, const Span& span, int item) { return token < span.tokens ? beta[static_cast<long long>(span.start + token) * heads + item % heads] : 0.f; };

#if LEAF_PRODUCTS
  const int warp = warp_number();
#else
  const int warp = 0;  // not used
#endif
  if (HELPERS > 0 && warp >= WARPS) {
    int turn = 0;
#pragma unroll 1
    for (int item = blockIdx.x; item < items; item += gridDim.x, turn ^= 1) {
      const Span span = span_of(item / heads, length, spans);
      if (span.tokens <= 0) continue;
      arrive_at_barrier(FREE, THREADS + HELPERS);
      if constexpr (FINDS_AMAX) find_amax(shared, v, span, heads, item % heads, turn, amax + item);
#pragma unroll
      for (int first = 0; first < C; first += HELPERS) {
        const int token = first + team_thread();
        const float x = beta_of(token, span, item);
        betas[token] = x;
        reinterpret_cast<float*>(workspace_of(item) + ChunkWorkspace::beta)[token] = x;
      }
      wait_at_barrier(FILLED, THREADS + HELPERS);
      invert(shared, betas, workspace_of(item));
    }
    return;
  }

#if !LEAF_PRODUCTS
  const int channel = threadIdx.x % (D / 2) * 2, leaf = threadIdx.x / (D / 2);
#endif

  bool exists = false;
  Leaf<float> nats;
  Leaf<Element> qs, ks;
  float own_beta = 0.f;  // of token threadIdx.x
  auto ask = [&](int item, Leaf<Element>& qs, Leaf<Element>& ks) {
#if LEAF_PRODUCTS
    int channel, leaf;
    place(warp, channel, leaf);
#else
    const int channel = opaque(threadIdx.x) % (D / 2) * 2, leaf = opaque(threadIdx.x) / (D / 2);
#endif
#if LEAF_PRODUCTS  // without signs, which would take registers
    const int chunk = static_cast<unsigned>(item) / static_cast<unsigned>(heads), head = item - chunk * heads;
#else
    const int chunk = item / heads, head = item % heads;
#endif
    const Span span = span_of(chunk, length, spans);
    exists = span.tokens > 0;
    if (!exists) return;
    nats.read(g, span, heads, head, leaf, channel);
    qs.read(q, span, heads, head, leaf, channel);
    ks.read(k, span, heads, head, leaf, channel);
    if (HELPERS == 0 && threadIdx.x < C) own_beta = threadIdx.x < span.tokens ? beta[static_cast<long long>(span.start + threadIdx.x) * heads + head] : 0.f;
  };
  ask(blockIdx.x, qs, ks);
#if LEAF_PRODUCTS
  Leaf<float16> queries = in_float16(qs), keys = in_float16(ks);
#endif
#pragma unroll 1
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    if (!exists) {
#if LEAF_PRODUCTS
      Leaf<Element> qs{}, ks{};  // not those outside the loop, which would be kept in registers beside the rounded ones
#endif
      if (item + gridDim.x < items) ask(item + gridDim.x, qs, ks);
#if LEAF_PRODUCTS
      queries = in_float16(qs), keys = in_float16(ks);
#endif
      continue;
    }
#if LEAF_PRODUCTS
    int channel = 0, leaf = 0;
    place(warp, channel, leaf);
#endif
    auto workspace_of = [&](int item) { return workspaces + static_cast<long long>(item) * ChunkWorkspace::bytes; };
    char* workspace = workspace_of(item);
    if (HELPERS == 0 && threadIdx.x < C) {
      betas[threadIdx.x] = own_beta;
      reinterpret_cast<float*>(workspace + ChunkWorkspace::beta)[threadIdx.x] = own_beta;
    }
    Gates gates;
    gates.set(nats);
    Gates::share(nats, reinterpret_cast<float*>(shared + Shared::leaf_logs), leaf, channel);
    wait_for_workers();  // they have computed the products of the item before, and without helpers copied its pairs

#if LEAF_PRODUCTS
    place(warp, channel, leaf);
#endif
    const float* leaf_logs = reinterpret_cast<const float*>(shared + Shared::leaf_logs);
    Reach reach;
    float2 near[LEVELS];  // the reach on each level
    unsigned near_halves[LEVELS];
#pragma unroll
    for (int level = 0; level < LEVELS; ++level) {
      near[level] = reach.at(level, leaf);
#if LEAF_PRODUCTS
      near_halves[level] = pack(float16{}, near[level]);
#endif
#if LEAF_PRODUCTS
      reach.widen_both(leaf_logs, level, leaf, channel);
#elif __CUDA_ARCH__ < 900  // for fewer registers; the compiler for later architectures does better without it
      reach.widen(leaf_logs, level, opaque(leaf), channel);
#else
      reach.widen(leaf_logs, level, leaf, channel);
#endif
    }
    reach.before = exp2_fast(reach.before);
    reach.after = exp2_fast(reach.after);
#if LEAF_PRODUCTS
    __syncwarp();
    write_workspace(workspace, warp, gates, reach, queries, keys, scale);
    __syncwarp();
    Leaf<Element> qs{}, ks{};
    nats = {};  // so that those of this item need no registers any more, whether there is a next one or not
    if (item + gridDim.x < items) ask(item + gridDim.x, qs, ks);
    write_levels(shared + Shared::tree, warp, gates, near_halves, queries, keys);
    __syncwarp();
#else
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
#endif
#if LEAF_PRODUCTS
    multiply_leaf(shared, warp, gates, queries, keys);
#else
    leaf_pairs(shared, leaf, gates, qs, ks, scale);
    workspace = workspace_of(opaque(item));  // computed again, to save registers
    if (item + gridDim.x < items) ask(item + gridDim.x, qs, ks);
#endif
    if constexpr (HELPERS > 0) whole_decay(shared, workspace);
    if constexpr (HELPERS == 0) {
      __syncthreads();
    } else {
      wait_at_barrier(FREE, THREADS + HELPERS);  // the helpers have read the matrices of the item before
    }
    tree_pairs(shared, LEAF_PRODUCTS ? warp : opaque(threadIdx.x / 32), LEAF_PRODUCTS ? scale : 1.f);
#if LEAF_PRODUCTS
    store_leaf_pairs(shared, warp, scale);
    queries = in_float16(qs), keys = in_float16(ks);
#endif
    if constexpr (HELPERS == 0) {
      __syncthreads();  // T and T~ take the place of the level tiles
      invert(shared, betas, workspace);
    } else {
      arrive_at_barrier(FILLED, THREADS + HELPERS);
    }
  }
}
