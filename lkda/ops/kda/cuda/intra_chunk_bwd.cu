// Backward inside each chunk: all gradients, from h, dh', v~, Y and do. One block per chunk and head, all chunks in parallel. h, dh',
// v~, Y and do are operands of products; q, k and the gates enter in float32.
//
//   dAqk_ij = s beta_j do_i . v~_j (j <= i)     dAkk_ij = -beta_j Y_i . v~_j (j < i; the beta_i of row i is left out)
//   dqg = s do h^T     dk_in = -Y h^T (beta left out)     dkg_j = beta_j (v~ dh'^T)_j     dv = B Y
//   on each level, I = rows, J = columns:  a_I = f (dAqk k^)   b_I = f (dAkk k^)   c_J = f (dAqk^T q^ + dAkk^T (B k^))
//   dq = pre dqg + sum a + dAqk_ii k_i      dk = B (pre dk_in + sum b) + suf dkg + sum c + dAqk_ii q_i
//   dbeta_i = Y_i . v_i + k_i . (pre dk_in + sum b)_i      the first term comes from inter_chunk_bwd.cu
//
// with pre = exp(G) and suf = exp(G_C - G). dg_t is the sum of all terms whose decay contains E_t: of the rows' terms (q a + k b)
// those of tokens from t on in the same half, of the columns' terms (k c) those before t, and exp(G_C) rowsum(h dh'). The sum has
// no subtraction, so nothing cancels.
//
// A factor f is a product inside the leaf times a reach, which is one number per leaf and channel. A warp has 32 channels x 16
// tokens of a, b and c. It adds up all levels, each times its reach, in the layout in which products leave them. The product
// inside the leaf is applied at the end, by threads that have two channels of a leaf. The sums are exchanged through shared
// memory only then.
//
// A PERSISTENT block works on one item (a chunk of a head) after another. It copies an item's first slices of V, do and beta while
// it computes the leaves of the item before, in the place of that one's operands of the levels. At the start of an item it copies
// the second slices, g, q and k, which arrive while the first slices are multiplied.
#include "kda_tree.cuh"
#include "kda_scale.cuh"

constexpr int THREADS = D * LEAVES / 2;  // a thread holds two channels of one leaf
constexpr int WARPS = THREADS / 32;
constexpr int SLICE = D == 32 ? 32 : sizeof(Operand) == 2 ? 64 : 32;  // columns of V that are in shared memory at a time
static_assert(!PERSISTENT || (ROOMY && D == 2 * SLICE && sizeof(Operand) == 2), "the shared memory is laid out for that");
constexpr int LOWER = BLOCKS * (BLOCKS + 1) / 2;                      // 16x16 blocks on and below the diagonal
constexpr int ROUNDS = (2 * LOWER + WARPS - 1) / WARPS;               // rounds of tasks; a task is a block of dAqk or of dAkk
constexpr int FINDER = THREADS - 32;  // the thread that finds a persistent block's next item: its warp has no task in the last round
constexpr int LANES = D / 2 < 32 ? D / 2 : 32;  // lanes of a warp that share a leaf
constexpr int PARTS = D / 2 > 32 ? D / 64 : 1;  // warps that share a leaf
constexpr int STEPS = PERSISTENT ? SLICE / 16 : 1;  // of 16 columns of V whose operands are loaded at once
static_assert(WARPS == BLOCKS * (D / 32), "a warp has 16 tokens x 32 channels");
static_assert(!PERSISTENT || SLICE / 16 == D / 32, "each warp stores dv of 16 columns of a slice");

using Query = QUERY;  // type of q and k in memory: Element, or float16 where `lkda::kda_forward` normalised half-precision inputs

using StateSlice = Tile<Operand, SLICE, D, true>;
using ColumnsSlice = Tile<Operand, SLICE, C, true>;
using OutputSlice = Tile<Element, C, SLICE>;    // do in memory's type
using OutputOperand = Tile<Operand, C, SLICE>;  // and, for half-precision inputs, as it is multiplied
using Pairs = Tile<Operand, C, C / 2>;  // of a level: rows as in Level::rows (dAkk first, then dAqk), columns modulo max(half, 16)

// A float32 matrix that warps write as blocks of [channels, tokens] and threads read as two channels of a leaf. Pieces of four
// tokens are permuted by the channel against bank conflicts: a read of one piece in eight channels, two apart, touches different
// banks, and a write of a leaf's two pieces in four neighbouring channels has at most two-way conflicts.
struct HandOver {
  static constexpr int bytes = D * C * 4;

  static __device__ __forceinline__ int offset(int channel, int token) {
    const int other = (channel & 2) << 1 | (channel & 4) >> 1 | (channel & 8) >> 3;
    return (channel * C + ((token >> 2 ^ other) << 2) + (token & 3)) * 4;
  }
  static __device__ __forceinline__ void give(char* to, const Sum (&sum)[2], int tokens, int channels) {
    const int lane = opaque(lane_id()), row = lane / 4, column = lane % 4 * 2;
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int q = 0; q < 4; ++q)
        *reinterpret_cast<float2*>(to + offset(channels + c * 16 + (q & 1) * 8 + row, tokens + (q >> 1) * 8 + column)) = sum[c].pair[q];
  }
  static __device__ __forceinline__ void take_four(float2* x, const char* from, int leaf, int channel, int i) {
    from += offset(channel, leaf * LEAF + i);
    const float4 first = *reinterpret_cast<const float4*>(from), second = *reinterpret_cast<const float4*>(from + C * 4);
    x[0] = make_float2(first.x, second.x);
    x[1] = make_float2(first.y, second.y);
    x[2] = make_float2(first.z, second.z);
    x[3] = make_float2(first.w, second.w);
  }
  // Stores one number per token in the place of what was taken.
  static __device__ __forceinline__ void put_one(char* to, int leaf, int channel, int i, float x) {
    *reinterpret_cast<float*>(to + offset(channel, leaf * LEAF + (i & 4)) + (i & 3) * 4) = x;
  }
  static __device__ __forceinline__ void take_ones(float (&x)[LEAF], const char* from, int leaf, int channel) {
#pragma unroll
    for (int i = 0; i < LEAF; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + offset(channel, leaf * LEAF + i));
      x[i] = four.x;
      x[i + 1] = four.y;
      x[i + 2] = four.z;
      x[i + 3] = four.w;
    }
  }
  static __device__ __forceinline__ void take_two(float2 (&x)[2], const char* from, int leaf, int channel, int i) {
    from += offset(channel, leaf * LEAF + (i & 4)) + (i & 2) * 4;
    const float2 first = *reinterpret_cast<const float2*>(from), second = *reinterpret_cast<const float2*>(from + C * 4);
    x[0] = make_float2(first.x, second.x);
    x[1] = make_float2(first.y, second.y);
  }
};

struct Shared {
  static constexpr int leaf_logs = 0;                                   // float [LEAVES][D]
  static constexpr int straight = leaf_logs + LEAVES * D * 4;          // float [BLOCKS][D]: partial sums of h dh' 
  static constexpr int totals = straight + BLOCKS * D * 4;              // float [LEVELS + 1][LEAVES][D]: reaches, then sums over a leaf
  static constexpr int beta = totals + (LEVELS + 1) * LEAVES * D * 4;   // float [C]
  static constexpr int place = beta + C * 4;                            // Span, head, scales of v and do, item: read again after each barrier, as q and k
  static constexpr int state_scales = place + 32;                           // of h and of dh', 128 bytes each, as in SavedState
  static constexpr int leaf_daqk = state_scales + 256;                         // float [LEAVES][8][8]
  static constexpr int leaf_dakk = leaf_daqk + LEAVES * 64 * 4;
  static constexpr int pairs = (leaf_dakk + LEAVES * 64 * 4 + 127) / 128 * 128;  // LEVELS x Pairs
  static constexpr int work = pairs + LEVELS * Pairs::bytes;            // the slices; later the operands of the levels and the exchanges
  static constexpr int state = work;
  static constexpr int d_state = state + StateSlice::bytes;
  static constexpr int v_tilde = d_state + StateSlice::bytes;
  static constexpr int d_residual = v_tilde + ColumnsSlice::bytes;
  static constexpr int d_output = d_residual + ColumnsSlice::bytes;
  static constexpr int slices = 2 * StateSlice::bytes + 2 * ColumnsSlice::bytes + OutputSlice::bytes;
  static constexpr int exchange = ROOMY ? work + LEVELS * Level::bytes : work;  // HandOver: three at once, or one
  static constexpr int last_exchange = ROOMY ? exchange : pairs;                // of dq and of the rows' part of dk
  static constexpr int columns_exchange = ROOMY ? exchange + 2 * HandOver::bytes : work;
  static constexpr int end_of_operands = ROOMY ? exchange + 3 * HandOver::bytes : work + Level::bytes;
  static constexpr int end_of_slices = work + slices;
  static constexpr int not_persistent = end_of_operands > end_of_slices ? end_of_operands : end_of_slices;
  // For persistent blocks. First slices and all of do are copied to the place of the operands of the levels, which the leaves do not
  // need; second slices, g and q to that of the exchanges. k stays until the leaves read it.
  static constexpr int from_first_to_second = slices + OutputSlice::bytes;  // of h, dh', v~ and Y; do of the second slice follows that of the first
  static constexpr int end_of_first = work + slices + OutputSlice::bytes;
  static constexpr int g = work + 2 * slices;                        // float2 [LEAF][THREADS]: each thread copies and reads its own
  static constexpr int q = g + C * D * 4;                            // Query [C][D]
  static constexpr int k = end_of_operands;                          // likewise
  static constexpr int beta_parts = k + C * D * static_cast<int>(sizeof(Query));  // float [D / 16][C]
  static constexpr int next_beta = beta_parts + D / 16 * C * 4;      // float [C], of the next item
  static constexpr int next_place = next_beta + C * 4;               // as `place`, of the next item
  static constexpr int bytes = PERSISTENT ? next_place + 32 : not_persistent;
};
static_assert(!PERSISTENT || Shared::end_of_first <= Shared::exchange, "the first slices fit where the leaves need nothing");
static_assert(!PERSISTENT || Shared::q + C * D * static_cast<int>(sizeof(Query)) <= Shared::end_of_operands, "the second slices, g and q fit before k");
static_assert(Shared::last_exchange + 2 * HandOver::bytes <= Shared::bytes && Shared::columns_exchange + HandOver::bytes <= Shared::bytes, "the exchanges fit");
static_assert(Shared::bytes == SHARED_BYTES, "variants.py allocates what this kernel uses");

// The number of a thread that copies. A persistent block computes it again for each copy, so that no address is kept in registers.
__device__ __forceinline__ unsigned copier() { return PERSISTENT ? opaque(threadIdx.x) : threadIdx.x; }

// Starts copying rows first .. first + SLICE of a tiled image, which are consecutive bytes.
template <class Slice>
__device__ __forceinline__ void fetch_rows(char* to, const char* image, int first) {
  image += Slice::bytes / SLICE * first + copier() * 16;
  to += copier() * 16;
#pragma unroll
  for (int n = 0; n < Slice::bytes / 16; n += THREADS)
    // with the size argument (`true`), because the compiler spills for the instruction without it
    if (n + THREADS <= Slice::bytes / 16 || n + threadIdx.x < Slice::bytes / 16) copy_16_async(to + n * 16, image + n * 16, true);
}

__device__ __forceinline__ float2 scaled(float a, float2 x) { return make_float2(a * x.x, a * x.y); }
__device__ __forceinline__ float2 fused(float a, float2 x, float2 y) { return make_float2(a * x.x + y.x, a * x.y + y.y); }

__device__ __forceinline__ Block<Operand> output_of(const char* output, int token, int column) {
  if constexpr (HALVES) return OutputOperand::load(output, token, column);
  else return convert<Operand>(OutputSlice::load(output, token, column));
}

// A warp's task: a 16x16 block of dAqk or dAkk, on or below the diagonal.
struct Task {
  bool exists, of_aqk;
  int row, column;  // in blocks

  __device__ __forceinline__ explicit Task(int n) : exists(n < 2 * LOWER), of_aqk(n < LOWER) {
    const int of = of_aqk ? n : n - LOWER;
    row = of < 1 ? 0 : of < 3 ? 1 : of < 6 ? 2 : 3;
    column = of - row * (row + 1) / 2;
  }
};

// Adds the part of a task's block that a slice of V contributes. left_at(v): the left operand of 16 columns of V. A persistent block has the
// registers to load all operands at once. It matters, since in the last round only some of its warps have a task.
template <class LeftAt>
__device__ __forceinline__ void add_task(Sum& sum, const char* slice, int column, LeftAt left_at) {
#pragma unroll(STEPS)
  for (int v = 0; v < SLICE; v += 16) {
    const Right<Operand> n = ColumnsSlice::load_right_transposed(ColumnsSlice::from(slice + Shared::v_tilde, v), 0, column * 16);
    product(sum, left_at(v), n);
  }
}

// Stores a task's block where its pairs are used: in their leaf, or in their level.
__device__ __forceinline__ void store_pairs(char* shared, const Task& task, const Sum& sum) {
  if (task.row != task.column) {
    const int level = (task.row ^ task.column) >= 2 ? 2 : 1, bits = LEAF_BITS + level, half = 1 << bits, i = task.row * 16;
    const int row = (i >> (bits + 1) << (bits + 1)) + (i & (half - 1)) + (task.of_aqk ? half : 0), column = task.column * 16 & (half - 1);
    char* pairs = shared + Shared::pairs + level * Pairs::bytes;
#pragma unroll
    for (int q = 0; q < 4; ++q) store_pair(Pairs::at(pairs, row + quadrant_row(q), column + quadrant_column(q)), sum.pair[q]);
    return;
  }
#pragma unroll
  for (int q = 0; q < 4; q += 3) {
    const int at = ((task.row * 2 + q / 3) * LEAF + lane_row()) * LEAF + lane_column();
    *reinterpret_cast<float2*>(shared + (task.of_aqk ? Shared::leaf_daqk : Shared::leaf_dakk) + at * 4) = sum.pair[q];
  }
  const int row = task.row * 16 + lane_row() + (task.of_aqk ? LEAF : 0), column = task.row % 2 * LEAF + lane_column();
  char* pairs = shared + Shared::pairs;
  store_pair(Pairs::at(pairs, row, column), sum.pair[1]);
  store_pair(Pairs::at(pairs, row, column ^ LEAF), make_float2(0.f, 0.f));  // the other group has these 16 columns too
}

// Pairs inside the leaf, j < i, w = decay(j..i), x = dAqk q_i + beta_i dAkk k_i:
//   a_i += dAqk w k_j    b_i += dAkk w k_j    c_j += w x    dg_t += w k_j x, j < t <= i
// Calls done(i, a_i, b_i) when row i is complete.
template <class Done>
__device__ __forceinline__ void leaf_gradients(
    const char* shared, int leaf, const Gates& gates, const Leaf<Query>& q, const Leaf<Query>& k, const float* beta,
    float2 (&column)[LEAF], float2 (&dg)[LEAF], Done done) {
  const float* daqk = reinterpret_cast<const float*>(shared + Shared::leaf_daqk) + leaf * LEAF * LEAF;
  const float* dakk = reinterpret_cast<const float*>(shared + Shared::leaf_dakk) + leaf * LEAF * LEAF;
  float2 w[LEAF];
#pragma unroll
  for (int i = 0; i < LEAF; ++i) {
    if constexpr (HALVES) __syncwarp();  // no load moves up past this: there are no registers for it
    const float2 qi = q[i], weighted = scaled(beta[i], k[i]);
    float2 a = make_float2(0.f, 0.f), b = a, sum = a;
#pragma unroll
    for (int j = 0; j < i; ++j) {
      w[j] = times(w[j], gates.e[i]);
      const float p = daqk[i * LEAF + j], m = dakk[i * LEAF + j];
      const float2 decayed = times(w[j], k[j]), x = fused(p, qi, scaled(m, weighted));
      a = fused(p, decayed, a);
      b = fused(m, decayed, b);
      add_to(column[j], times(w[j], x));
      add_to(sum, times(decayed, x));
      add_to(dg[j + 1], sum);
    }
    done(i, a, b);
    w[i] = make_float2(1.f, 1.f);
  }
}

// Sums x[i] over the lanes that share a leaf, into out[i].
__device__ __forceinline__ void sum_over_channels(float (&x)[LEAF], float* out) {
  int count = LEAF;
#pragma unroll
  for (int step = LANES / 2; step >= 1; step /= 2) {
    if (count > 1) {
      count /= 2;
      const bool upper = lane_id() & step;
#pragma unroll
      for (int i = 0; i < LEAF / 2; ++i)
        if (i < count) x[i] = (upper ? x[i + count] : x[i]) + __shfl_xor_sync(0xffffffffu, upper ? x[i] : x[i + count], step);
    } else {
      x[0] += __shfl_xor_sync(0xffffffffu, x[0], step);
    }
  }
  if (lane_id() % (LANES / LEAF) == 0) out[lane_id() % LANES / (LANES / LEAF)] = x[0];
}

// The power-of-two scales of v and do (kda_scale.cuh), in shared memory.
struct Scales {
  static constexpr int values = Shared::place + 20, gradients = Shared::place + 24;

  static __device__ __forceinline__ float of_v(const char* shared) { return HALVES ? *reinterpret_cast<const float*>(shared + values) : 1.f; }
  static __device__ __forceinline__ float of_do(const char* shared) { return HALVES ? *reinterpret_cast<const float*>(shared + gradients) : 1.f; }
  // The factors that undo the scales: dv is multiplied by the first, other gradients by the second. Where the second exceeds
  // float32's range, it is float32's largest number.
  static __device__ __forceinline__ float inverse_of_do(const char* shared) { return inverse_of(of_do(shared)); }
  static __device__ __forceinline__ float inverse_of_both(const char* shared) {
    return fminf(inverse_of(of_v(shared)) * inverse_of(of_do(shared)), 3.4028234e38f);
  }
};

// Converts a thread's share of SLICES slices of do from memory's type to scaled operands, in place.
template <class Half, int SLICES>
__device__ __forceinline__ void make_operands(char* output, float factor) {
  static_assert(OutputSlice::bytes % (THREADS * 16) == 0, "each thread has whole pieces");
#pragma unroll
  for (int at = threadIdx.x * 16; at < SLICES * OutputSlice::bytes; at += THREADS * 16) {
    uint4& piece = *reinterpret_cast<uint4*>(output + at);
    uint4 word = piece;
    auto converted = [&](unsigned pair) {
      const float2 x = unpack(Half{}, pair);
      return pack(Operand{}, make_float2(factor * x.x, factor * x.y));
    };
    word.x = converted(word.x);
    word.y = converted(word.y);
    word.z = converted(word.z);
    word.w = converted(word.w);
    piece = word;
  }
}

// h . dh' of each channel, summed over V, into straight [BLOCKS][D]: a warp has 32 channels, and shares V with the other warps of
// these. In float16 it is the diagonal of a product of the numbers as they were saved, with all their digits. They are each read here
// once, and are turned into operands in place. The states at a sequence's ends are read unrounded in float32, since in a short sequence
// they are all there is; these and float32 inputs are summed on ordinary cores, eight rows of V at a time.
struct Straight {
  // A power of two as two factors, since float16 does not hold the smallest ones. The second is 1 but for factors below 2^-14.
  struct Factor {
    unsigned first, second;

    __device__ __forceinline__ explicit Factor(float x) : first(both(fminf(fmaxf(x, SMALL), 32768.f))), second(both(fminf(x / SMALL, 1.f))) {}
    __device__ __forceinline__ void scale(unsigned& word) const { word = product_of_pairs(float16{}, product_of_pairs(float16{}, word, first), second); }

   private:
    static constexpr float SMALL = 1.f / 16384;
    static __device__ __forceinline__ unsigned both(float x) { return pack(float16{}, make_float2(x, x)); }
  };
  // Turns the warp's 16 rows of V, from `rows` on, into operands.
  static __device__ __forceinline__ void make_operands_of(char* rows, const Factor& factor) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      uint4& piece = *reinterpret_cast<uint4*>(StateSlice::from(rows, n * 8) + lane_id() * 16);  // a lane has one row of a square
      uint4 word = piece;
      factor.scale(word.x);
      factor.scale(word.y);
      factor.scale(word.z);
      factor.scale(word.w);
      piece = word;
    }
  }
  // The diagonal's element of this lane, which only every fourth lane has.
  static __device__ __forceinline__ float diagonal(float2 x) { return lane_row() % 2 == 0 ? x.x : x.y; }
  static __device__ __forceinline__ void add_products(char* shared, char* slice, int block, int channels, int first) {
    static_assert(SLICE <= BLOCKS * 16, "a warp has at most 16 rows of V");
    float sum[4] = {};  // of eight channels each
    if (block * 16 < SLICE) {
      char* h_rows = StateSlice::from(slice + Shared::state, block * 16, channels);
      char* dh_rows = StateSlice::from(slice + Shared::d_state, block * 16, channels);
      const float* scales = reinterpret_cast<const float*>(shared + Shared::state_scales) + (first / 16 + block) * SavedState::REPEATS;
      const float of_h = scales[0], of_dh = scales[32];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const Block<Operand> h = StateSlice::load_transposed(h_rows, 0, c * 16), dh = StateSlice::load_transposed(dh_rows, 0, c * 16);
        Sum x;
        clear(x);
        product(x, h, as_right(dh));
        sum[2 * c] = of_h * (of_dh * diagonal(x.pair[0]));
        sum[2 * c + 1] = of_h * (of_dh * diagonal(x.pair[3]));
      }
      __syncwarp();  // all lanes have read the numbers as they were saved
      make_operands_of(h_rows, Factor(of_h));
      make_operands_of(dh_rows, Factor(of_dh));
    }
    if (lane_id() % 4 != lane_row() / 2) return;
    float* to = reinterpret_cast<float*>(shared + Shared::straight) + block * D + channels + lane_row();
#pragma unroll
    for (int n = 0; n < 4; ++n) to[n * 8] = first == 0 ? sum[n] : to[n * 8] + sum[n];
  }
  static __device__ __forceinline__ float2 halves(unsigned& word, float scale) {
    float2 x = unpack(float16{}, word);
    x = make_float2(scale * x.x, scale * x.y);
    word = pack(float16{}, x);
    return x;
  }
  template <class T>
  static __device__ __forceinline__ void eight(float2 (&x)[4], T* row, float scale) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int n = 0; n < 4; ++n) x[n] = load_pair(row + 2 * n);
    } else {
      uint4 word = *reinterpret_cast<const uint4*>(row);
      x[0] = halves(word.x, scale);
      x[1] = halves(word.y, scale);
      x[2] = halves(word.z, scale);
      x[3] = halves(word.w, scale);
      *reinterpret_cast<uint4*>(row) = word;
    }
  }
  static __device__ __forceinline__ void replace(float2 (&x)[4], const float* exact, float factor) {
#pragma unroll
    for (int n = 0; n < 4; ++n) x[n] = make_float2(factor * exact[2 * n * D], factor * exact[(2 * n + 1) * D]);
  }
  template <bool AT_AN_END>
  static __device__ __forceinline__ void sums(float (&sum)[8], char* shared, char* slice, int block, int channel, int first, const float* exact_initial, const float* exact_final, const char* placed) {
#pragma unroll 1
    for (int v = block * 8 + lane_id() % 8; v < SLICE; v += BLOCKS * 8) {
      float2 h[4], dh[4];
      const float* scales = reinterpret_cast<const float*>(shared + Shared::state_scales) + (first + v) / 16 * SavedState::REPEATS;
      eight(h, StateSlice::at(slice + Shared::state, v, channel), scales[0]);
      eight(dh, StateSlice::at(slice + Shared::d_state, v, channel), scales[32]);
      if constexpr (AT_AN_END) {
        if (exact_initial != nullptr) replace(h, exact_initial + channel * D + v, Scales::of_v(placed));
        if (exact_final != nullptr) replace(dh, exact_final + channel * D + v, Scales::of_do(placed));
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        sum[2 * n] += h[n].x * dh[n].x;
        sum[2 * n + 1] += h[n].y * dh[n].y;
      }
    }
  }
  // exact_initial, exact_final (may be null): [K, V], from this slice's first column of V on. placed: from where `Scales` are read.
  static __device__ __forceinline__ void add(char* shared, char* slice, int block, int channels, int first, const float* exact_initial, const float* exact_final, const char* placed) {
    if constexpr (HALVES) {
      if (exact_initial == nullptr && exact_final == nullptr) {
        add_products(shared, slice, block, channels, first);
        return;
      }
    }
    const int channel = channels + lane_id() / 8 * 8;
    float sum[8] = {};
    if (HALVES || exact_initial != nullptr || exact_final != nullptr) {
      sums<true>(sum, shared, slice, block, channel, first, exact_initial, exact_final, placed);
    } else {
      sums<false>(sum, shared, slice, block, channel, first, nullptr, nullptr, placed);
    }
    int count = 8;  // sum over eight lanes: each step halves the sums that a lane has
#pragma unroll
    for (int step = 4; step >= 1; step /= 2) {
      count /= 2;
      const bool upper = lane_id() & step;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (i < count) sum[i] = (upper ? sum[i + count] : sum[i]) + __shfl_xor_sync(0xffffffffu, upper ? sum[i] : sum[i + count], step);
    }
    float* to = reinterpret_cast<float*>(shared + Shared::straight) + block * D + channel + lane_id() % 8;
    *to = first == 0 ? sum[0] : *to + sum[0];
  }
};

// What a warp sums up for its 16 tokens and 32 channels, [channels, tokens]: dq, and the parts of dk in which the token is a row
// (its beta left out) and a column. The products inside the leaf are not yet applied.
struct Gathered {
  Sum dq[2], row[2], column[2];
};

// sum += reach * x, for one level or for the chunk. reach: [LEAVES][D].
__device__ __forceinline__ void gather(Sum& sum, const Sum& x, const float* reach, int leaf, int channel) {
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const float r = reach[(leaf + (q >> 1)) * D + channel + (q & 1) * 8 + lane_row()];
    sum.pair[q] = fused(r, x.pair[q], sum.pair[q]);
  }
}

// Overwrites the reach with each quadrant's sum over its eight tokens.
__device__ __forceinline__ void store_totals(float* total, const float (&sum)[4], int leaf, int channel) {
  const int lane = lane_id();
  float two[2];
#pragma unroll
  for (int n = 0; n < 2; ++n) two[n] = (lane & 1 ? sum[n + 2] : sum[n]) + __shfl_xor_sync(0xffffffffu, lane & 1 ? sum[n] : sum[n + 2], 1);
  const float one = (lane & 2 ? two[1] : two[0]) + __shfl_xor_sync(0xffffffffu, lane & 2 ? two[0] : two[1], 2);
  __syncwarp();  // every lane has read the reaches
  total[(leaf + (lane & 1)) * D + channel + (lane & 2) * 4 + lane_row()] = one;
}

__device__ __forceinline__ float dot(float2 a, float2 b) { return a.x * b.x + a.y * b.y; }

// The lowest level, with halves of 8 tokens: a block's first leaf has the columns, the second the rows. All reaches are 1, and no
// other leaf's dg needs the sums.
__device__ __forceinline__ void lowest_level(Gathered& out, const char* tile, const char* pairs, int block, int channels) {
  const Right<Operand> of_rows = Pairs::load_right(pairs, block * 16, 0), of_columns = Pairs::load_right_transposed(pairs, block * 16, 0);
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    Sum x;
    clear(x);
    product(x, Level::Columns::load_transposed(tile + Level::columns, block / 2 * 16, channels + c * 16), of_rows);
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      add_to(out.row[c].pair[2 + q], x.pair[q]);
      add_to(out.dq[c].pair[2 + q], x.pair[2 + q]);
    }
    clear(x);
    product(x, Level::Rows::load_transposed(tile + Level::rows, block * 16, channels + c * 16), of_columns);
#pragma unroll
    for (int q = 0; q < 2; ++q) add_to(out.column[c].pair[q], block % 2 == 0 ? x.pair[q] : x.pair[2 + q]);
  }
}

// Level LEVEL >= 1. totals: [LEAVES][D], its reaches, replaced by its sums.
template <int LEVEL>
__device__ __forceinline__ void level_gradients(Gathered& out, const char* tile, const char* pairs, float* totals, int block, int channels) {
  constexpr int half = LEAF << LEVEL;
  const int group = block >> LEVEL, within = block * 16 & (half - 1), leaf = 2 * block;
  const char* rows = Level::Rows::from(tile + Level::rows, group * 2 * half);
  const char* columns = Level::Columns::from(tile + Level::columns, group * half);
  pairs = Pairs::from(pairs, group * 2 * half);
  if (block * 16 & half) {
    rows = Level::Rows::from(rows, within);
    pairs = Pairs::from(pairs, within);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int channel = channels + c * 16;
      Sum a, b;
      clear(a);
      clear(b);
#pragma unroll
      for (int j = 0; j < half; j += 16) {
        const Block<Operand> k = Level::Columns::load_transposed(Level::Columns::from(columns, j), 0, channel);
        product(b, k, Pairs::load_right(pairs, 0, j));
        product(a, k, Pairs::load_right(Pairs::from(pairs, half), 0, j));
      }
      gather(out.dq[c], a, totals, leaf, channel);
      gather(out.row[c], b, totals, leaf, channel);
      const Block<Operand> k = Level::Rows::load_transposed(rows, 0, channel);
      const Block<Operand> q = Level::Rows::load_transposed(Level::Rows::from(rows, half), 0, channel);
      float sum[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) sum[n] = dot(get_pair(q, n), a.pair[n]) + dot(get_pair(k, n), b.pair[n]);
      store_totals(totals, sum, leaf, channel);
    }
  } else {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int channel = channels + c * 16;
      Sum x;
      clear(x);
#pragma unroll
      for (int i = 0; i < 2 * half; i += 16)
        product(x, Level::Rows::load_transposed(Level::Rows::from(rows, i), 0, channel), Pairs::load_right_transposed(Pairs::from(pairs, i), 0, within));
      gather(out.column[c], x, totals, leaf, channel);
      const Block<Operand> k = Level::Columns::load_transposed(Level::Columns::from(columns, within), 0, channel);
      float sum[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) sum[n] = dot(get_pair(k, n), x.pair[n]);
      store_totals(totals, sum, leaf, channel);
    }
  }
}

// The kernel's arguments, and what a block does with an item, which is one chunk of one head.
struct Arguments {
  const Query *q, *k;
  const float *g, *beta;
  const Element* d_o;
  const char *states, *v_tilde, *d_states, *d_residual;
  const float *beta_parts, *v_scales, *do_scales, *initial_state, *d_final;
  Element *d_q, *d_k, *d_v;
  float *d_g, *d_beta;
  const int4* spans;
  int items, length, heads;
  float scale;

  // Starts copying columns first .. first + SLICE of V of h, dh', v~ and Y to `slice`.
  __device__ __forceinline__ void copy_slices(char* slice, long long item, int first) const {
    fetch_rows<StateSlice>(slice + Shared::state, states + item * SavedState::bytes, first);
    fetch_rows<StateSlice>(slice + Shared::d_state, d_states + item * SavedState::bytes, first);
    fetch_rows<ColumnsSlice>(slice + Shared::v_tilde, v_tilde + item * Columns::bytes, first);
    fetch_rows<ColumnsSlice>(slice + Shared::d_residual, d_residual + item * Columns::bytes, first);
  }
  __device__ __forceinline__ void copy_state_scales(char* shared, long long item) const {
    if (!HALVES || threadIdx.x >= 16) return;
    const char* saved = (threadIdx.x < 8 ? states : d_states) + item * SavedState::bytes;
    copy_16_async(shared + Shared::state_scales + threadIdx.x * 16, saved + SavedState::scales + threadIdx.x % 8 * 16, true);
  }
  // Starts copying COLUMNS columns, from `first` on, of a chunk's rows of a tensor [rows, H, D]. Rows past the last token become zeros.
  // to(token, column): where a piece of 16 bytes goes.
  template <int COLUMNS, class T, class To>
  __device__ __forceinline__ void copy_rows(const T* from, const Span& span, int head, int first, To to) const {
    constexpr int PIECE = 16 / sizeof(T), PIECES = COLUMNS / PIECE, TOKENS = THREADS / PIECES;
    static_assert(C % TOKENS == 0, "each thread has whole pieces, always of the same columns");
    const int n = copier() / PIECES, column = copier() % PIECES * PIECE, stride = heads * D;
    from += (static_cast<long long>(span.start) * heads + head) * D + first + column;
#pragma unroll
    for (int t = 0; t < C; t += TOKENS) copy_16_async(to(t + n, column), from + min(t + n, span.tokens - 1) * stride, t + n < span.tokens);
  }
  __device__ __forceinline__ void copy_output(char* output, const Span& span, int head, int first) const {
    copy_rows<SLICE>(d_o, span, head, first, [&](int t, int column) { return OutputSlice::at(output, t, column); });
  }

  // The rest of this struct's copies are for persistent blocks.

  static __device__ __forceinline__ const Span& next_span(const char* shared) { return *reinterpret_cast<const Span*>(shared + Shared::next_place); }
  static __device__ __forceinline__ int& next_head(char* shared) { return *reinterpret_cast<int*>(shared + Shared::next_place + 16); }
  static __device__ __forceinline__ int& next_item(char* shared) { return *reinterpret_cast<int*>(shared + Shared::next_place + 28); }

  // One thread writes the place of the first item from `item` on, in this block's steps, that has tokens. Item -1 stands for none.
  // The thread has to wait for its copies before the barrier after which the place is read.
  __device__ __forceinline__ void find_next(char* shared, int item) const {
    Span span = {};
    for (; item < items; item += gridDim.x) {
      span = span_of(item / heads, length, spans);
      if (span.tokens > 0) break;
    }
    next_item(shared) = item < items ? item : -1;
    if (item >= items) return;
    *reinterpret_cast<Span*>(shared + Shared::next_place) = span;
    next_head(shared) = item % heads;
    const long long of = static_cast<long long>(span.sequence) * heads + item % heads;
    constexpr int from_place = Shared::next_place - Shared::place;
    copy_4_async(shared + from_place + Scales::values, v_scales + of);
    copy_4_async(shared + from_place + Scales::gradients, do_scales + of);
    commit_copies();
  }
  // What the next item, if there is one, needs at its start.
  __device__ __forceinline__ void copy_first(char* shared) const {
    const int item = next_item(shared);
    if (item < 0) return;
    copy_slices(shared, item, 0);
    copy_state_scales(shared, item);
    const Span span = next_span(shared);
    const int head = next_head(shared);
    copy_rows<D>(d_o, span, head, 0, [&](int t, int column) {
      return OutputSlice::at(shared + Shared::d_output + column / SLICE * OutputSlice::bytes, t, column % SLICE);
    });
    if (threadIdx.x < C) {
      float* to = reinterpret_cast<float*>(shared + Shared::next_beta) + threadIdx.x;
      if (threadIdx.x < span.tokens) copy_4_async(to, beta + static_cast<long long>(span.start + threadIdx.x) * heads + head);
      else *to = 0.f;
    }
    commit_copies();
  }
  // What an item needs later.
  __device__ __forceinline__ void copy_second(char* shared, long long item, const Span& span, int head) const {
    copy_slices(shared + Shared::from_first_to_second, item, SLICE);
    const int channel = copier() % (D / 2) * 2, t = copier() / (D / 2) * LEAF, stride = heads * D;
    const float* from = g + (static_cast<long long>(span.start) * heads + head) * D + channel;
#pragma unroll
    for (int i = 0; i < LEAF; ++i) copy_8_async(own_g(shared, i), from + min(t + i, span.tokens - 1) * stride, t + i < span.tokens);
    auto in_rows = [&](int offset) { return [=](int t, int column) { return reinterpret_cast<Query*>(shared + offset) + t * D + column; }; };
    copy_rows<D>(q, span, head, 0, in_rows(Shared::q));
    copy_rows<D>(k, span, head, 0, in_rows(Shared::k));
    commit_copies();
  }
  static __device__ __forceinline__ char* own_g(char* shared, int i) { return shared + Shared::g + (i * THREADS + copier()) * 8; }
  static __device__ __forceinline__ Leaf<float> copied_g(char* shared) {
    Leaf<float> nats;
#pragma unroll
    for (int i = 0; i < LEAF; ++i) nats.pair[i] = *reinterpret_cast<const float2*>(own_g(shared, i));
    return nats;
  }
  static __device__ __forceinline__ void read_copied(Leaf<Query>& x, const char* rows, int leaf, int channel) {
#pragma unroll
    for (int i = 0; i < LEAF; ++i) x.pair[i] = *reinterpret_cast<const typename Leaf<Query>::Pair*>(reinterpret_cast<const Query*>(rows) + (leaf * LEAF + i) * D + channel);
  }
  __device__ __forceinline__ void copy_beta_parts(char* shared, long long item) const {
    constexpr int pieces = D / 16 * C / 4;
    if (threadIdx.x < pieces) copy_16_async(shared + Shared::beta_parts + threadIdx.x * 16, beta_parts + item * (D / 16 * C) + threadIdx.x * 4);
  }

  __device__ __forceinline__ void work(char* shared, int item, Span span, int head) const;
};

// The gradients of one item.
__device__ __forceinline__ void Arguments::work(char* shared, int item, Span span, int head) const {
  int channel = threadIdx.x % (D / 2) * 2, leaf = threadIdx.x / (D / 2);
  const int warp = threadIdx.x / 32, block = warp % BLOCKS, tokens = block * 16, channels = warp / BLOCKS * 32;  // of the warp's sums
  float* betas = reinterpret_cast<float*>(shared + Shared::beta);
  float* leaf_logs = reinterpret_cast<float*>(shared + Shared::leaf_logs);
  float* totals = reinterpret_cast<float*>(shared + Shared::totals);  // [0]: of rows from the chunk's start, [1]: of columns to its end, [1 + level]
  auto total = [&](int which, int of) { return reinterpret_cast<float2*>(totals + (which * LEAVES + of) * D + channel); };
  if constexpr (PERSISTENT) {
    copy_second(shared, item, span, head);
    // It is read after the next barrier. The next place is only written after that.
    if (threadIdx.x < 8) reinterpret_cast<int*>(shared + Shared::place)[threadIdx.x] = reinterpret_cast<const int*>(shared + Shared::next_place)[threadIdx.x];
    if (threadIdx.x < C) betas[threadIdx.x] = reinterpret_cast<const float*>(shared + Shared::next_beta)[threadIdx.x];
  } else {
    if (threadIdx.x == 0) {
      *reinterpret_cast<Span*>(shared + Shared::place) = span;
      *reinterpret_cast<int*>(shared + Shared::place + 16) = head;
      if (HALVES) {
        *reinterpret_cast<float*>(shared + Scales::values) = v_scales[static_cast<long long>(span.sequence) * heads + head];
        *reinterpret_cast<float*>(shared + Scales::gradients) = do_scales[static_cast<long long>(span.sequence) * heads + head];
      }
    }
    if (threadIdx.x < C) betas[threadIdx.x] = threadIdx.x < span.tokens ? beta[static_cast<long long>(span.start + threadIdx.x) * heads + head] : 0.f;
  }
  auto fetch = [&](int first) {
    copy_slices(shared, item, first);
    if (first == 0) copy_state_scales(shared, item);
    copy_output(shared + Shared::d_output, span, head, first);
    commit_copies();
  };
  if constexpr (!PERSISTENT) {
    Leaf<float> nats;
    nats.read(g, span, heads, head, leaf, channel);
    fetch(0);
    Gates::share(nats, leaf_logs, leaf, channel);
  }

  auto this_item = [&] { return *reinterpret_cast<const int*>(shared + Shared::place + 28); };  // of a persistent block

  // Products with the states, summed over slices of V.
  Gathered out;
  Sum pairs[ROUNDS];  // blocks of dAqk or dAkk
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    clear(out.dq[n]);
    clear(out.row[n]);
    clear(out.column[n]);
  }
#pragma unroll
  for (int n = 0; n < ROUNDS; ++n) clear(pairs[n]);
  const long long ends_at = (static_cast<long long>(span.sequence) * heads + head) * D * D;
  const float* exact_initial = span.first && initial_state != nullptr ? initial_state + ends_at : nullptr;
  const float* exact_final = span.last && d_final != nullptr ? d_final + ends_at : nullptr;
  for (int first = 0; first < D; first += SLICE) {
    if constexpr (PERSISTENT) {
      if (first > 0) {
        if (threadIdx.x == FINDER) find_next(shared, this_item() + gridDim.x);
        wait_copies<0>();
        Gates::share(copied_g(shared), leaf_logs, leaf, channel);
        __syncthreads();
      }
    } else {
      if (first > 0) {
        __syncthreads();
        fetch(first);
      }
      wait_copies<0>();
      __syncthreads();
    }
    char* slice = shared + (PERSISTENT && first > 0 ? Shared::from_first_to_second : 0);
    char* output = shared + Shared::d_output + (PERSISTENT && first > 0 ? OutputSlice::bytes : 0);
    if (first == (PERSISTENT ? SLICE : 0)) {
      Reach reach;
#pragma unroll
      for (int level = 0; level < LEVELS; ++level) {
        if (level > 0) *total(1 + level, leaf) = reach.at(level, leaf);
        reach.widen_both(leaf_logs, level, leaf, channel);
      }
      *total(0, leaf) = exp2_fast(reach.before);
      *total(1, leaf) = exp2_fast(reach.after);
    }
    const int warp = opaque(threadIdx.x / 32), block = warp % BLOCKS, tokens = block * 16, channels = warp / BLOCKS * 32;
    const char* placed = shared + (PERSISTENT && first == 0 ? Shared::next_place - Shared::place : 0);
    Straight::add(shared, slice, block, channels, first, exact_initial == nullptr ? nullptr : exact_initial + first,
                  exact_final == nullptr ? nullptr : exact_final + first, placed);
    if constexpr (HALVES) {
      if (!PERSISTENT || first == 0) make_operands<Element, PERSISTENT ? D / SLICE : 1>(output, Scales::of_do(placed));
      __syncthreads();  // h, dh' and do have been converted
    }
    auto load_y = [&](int v) { return ColumnsSlice::load_transposed(ColumnsSlice::from(slice + Shared::d_residual, v), 0, tokens); };
    auto store_dv = [&](int v, const Block<Operand>& y) {  // the warps that have these tokens share dv
#pragma unroll
      for (int q4 = 0; q4 < 4; ++q4) {
        const int t = tokens + quadrant_row(q4);
        stream_pair_if(t < span.tokens, d_v + (static_cast<long long>(span.start + t) * heads + head) * D + first + v + quadrant_column(q4),
                       scaled(Scales::inverse_of_do(shared) * betas[t], get_pair(y, q4)));
      }
    };
#pragma unroll(SLICE == D ? SLICE / 16 : STEPS)
    for (int v = 0; v < SLICE; v += 16) {
      const Right<Operand> d_out = as_right(output_of(output, tokens, v));
      const Block<Operand> y = load_y(v);
      const Right<Operand> n = ColumnsSlice::load_right_transposed(ColumnsSlice::from(slice + Shared::v_tilde, v), 0, tokens);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const Block<Operand> h = StateSlice::load_transposed(StateSlice::from(slice + Shared::state, v, c * 16), 0, channels);
        product(out.dq[c], h, d_out);
        product(out.row[c], h, as_right(y));
        product(out.column[c], StateSlice::load_transposed(StateSlice::from(slice + Shared::d_state, v, c * 16), 0, channels), n);
      }
      if (!PERSISTENT && warp / BLOCKS == v / 16 % (D / 32)) store_dv(v, y);
    }
    if constexpr (PERSISTENT) {  // not in the loop, where it would separate the products
      __syncwarp();  // nothing of this moves up into the loop: there are no registers for it
      store_dv(warp / BLOCKS * 16, load_y(warp / BLOCKS * 16));
    }
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
      const Task task(round * WARPS + warp);
      if (!task.exists) continue;
      if (task.of_aqk) {
        add_task(pairs[round], slice, task.column, [&](int v) { return output_of(output, task.row * 16, v); });
      } else {
        add_task(pairs[round], slice, task.column, [&](int v) { return ColumnsSlice::load_transposed(ColumnsSlice::from(slice + Shared::d_residual, v), 0, task.row * 16); });
      }
    }
  }

  if constexpr (!PERSISTENT) __syncthreads();  // the slices are no longer needed

#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    const Task task(round * WARPS + warp);
    if (!task.exists) continue;
#pragma unroll
    for (int q4 = 0; q4 < 4; ++q4) {
      const float2 b = *reinterpret_cast<const float2*>(betas + task.column * 16 + quadrant_column(q4));
      pairs[round].pair[q4] = scaled(task.of_aqk ? scale : -1.f, times(b, pairs[round].pair[q4]));
    }
    store_pairs(shared, task, pairs[round]);
  }

  Gates gates;
  Leaf<Query> qs, ks;  // read again later instead of being held, to save registers
  if constexpr (PERSISTENT) {  // before the exchanges take their place
    gates.set(copied_g(shared));
    read_copied(qs, shared + Shared::q, leaf, channel);
    __syncthreads();  // the slices are no longer needed
  }

  // The parts from the past (dq, rows) and to the future (columns).
#pragma unroll
  for (int c = 0; c < 2; ++c)
#pragma unroll
    for (int q4 = 0; q4 < 4; ++q4) {
      const float* reach = totals + (2 * block + (q4 >> 1)) * D + channels + c * 16 + (q4 & 1) * 8 + lane_row();
      const float before = reach[0], after = reach[LEAVES * D];
      const float2 b = *reinterpret_cast<const float2*>(betas + tokens + (q4 >> 1) * 8 + lane_column());
      out.dq[c].pair[q4] = scaled(scale * before, out.dq[c].pair[q4]);
      out.row[c].pair[q4] = scaled(-before, out.row[c].pair[q4]);
      out.column[c].pair[q4] = scaled(after, times(b, out.column[c].pair[q4]));
    }

  auto place_head = [&] { return *reinterpret_cast<const int*>(shared + Shared::place + 16); };
  auto place = [&] { return *reinterpret_cast<const Span*>(shared + Shared::place); };
  if constexpr (!PERSISTENT) gates.read(g, place(), heads, place_head(), leaf, channel);
  auto read_k = [&] {
    if constexpr (PERSISTENT) read_copied(ks, shared + Shared::k, leaf, channel);
    else ks.read(k, place(), heads, place_head(), leaf, channel);
  };
  auto read_rows = [&] {
    qs.read(q, place(), heads, place_head(), leaf, channel);
    read_k();
  };
  channel = opaque(threadIdx.x) % (D / 2) * 2;  // computed again, to save registers
  leaf = opaque(threadIdx.x) / (D / 2);
  float2 near[LEAF];  // q or B k, or k, times the product inside the leaf
  auto near_q = [&] { gates.rows(make_float2(1.f, 1.f), [&](int i, float2 f) { near[i] = times(f, qs[i]); }); };
  auto near_k = [&] { gates.rows(make_float2(1.f, 1.f), [&](int i, float2 f) { near[i] = scaled(betas[leaf * LEAF + i], times(f, ks[i])); }); };
  auto near_columns = [&] { gates.columns(make_float2(1.f, 1.f), [&](int j, float2 f) { near[j] = times(f, ks[j]); }); };
  auto reach_of = [&](int level) { return level == 0 ? make_float2(1.f, 1.f) : *total(1 + level, leaf); };
  auto write_rows = [&](int level, char* tile, bool of_q) {
    if (Level::is_row(level, leaf)) Level::write_rows(tile, level, leaf, channel, reach_of(level), near, of_q);
  };
  auto write_columns = [&](int level, char* tile) {
    if (!Level::is_row(level, leaf)) Level::write_columns(tile, level, leaf, channel, reach_of(level), near);
  };
  if constexpr (!PERSISTENT) qs.read(q, place(), heads, place_head(), leaf, channel);
  if constexpr (!ROOMY) read_k();

  // Their sums over a leaf are needed for the dg of the other leaves.
  char* exchange = shared + Shared::exchange;
  auto sum_of = [&](const char* from) {
    float2 sum = make_float2(0.f, 0.f);
#pragma unroll
    for (int i = 0; i < LEAF; i += 2) {
      float2 y[2];
      HandOver::take_two(y, from, leaf, channel, i);
#pragma unroll
      for (int n = 0; n < 2; ++n) add_to(sum, times(near[i + n], y[n]));
    }
    return sum;
  };
  HandOver::give(exchange, out.dq, tokens, channels);
  if constexpr (ROOMY) {
    HandOver::give(exchange + HandOver::bytes, out.row, tokens, channels);
    HandOver::give(exchange + 2 * HandOver::bytes, out.column, tokens, channels);
  }
  near_q();
  if constexpr (ROOMY) read_k();
  __syncthreads();
  constexpr bool LAID_DOWN = D == 64 || PERSISTENT;  // the first sum is held in shared memory, to save a register
  float2 sum;
  if constexpr (LAID_DOWN) {
    *total(0, leaf) = sum_of(exchange);
  } else {
    sum = sum_of(exchange);
  }
  if constexpr (ROOMY) {
#pragma unroll
    for (int level = 0; level < LEVELS; ++level) write_rows(level, shared + Shared::work + level * Level::bytes, true);
  } else {
    __syncthreads();
    HandOver::give(exchange, out.row, tokens, channels);
    __syncthreads();
  }
  near_k();
  if constexpr (LAID_DOWN) {
    add_to(*total(0, leaf), sum_of(ROOMY ? exchange + HandOver::bytes : exchange));
  } else {
    add_to(sum, sum_of(ROOMY ? exchange + HandOver::bytes : exchange));
    *total(0, leaf) = sum;
  }
  if constexpr (ROOMY) {
#pragma unroll
    for (int level = 0; level < LEVELS; ++level) write_rows(level, shared + Shared::work + level * Level::bytes, false);
  } else {
    __syncthreads();
    HandOver::give(exchange, out.column, tokens, channels);
    __syncthreads();
  }
  near_columns();
  *total(1, leaf) = sum_of(ROOMY ? exchange + 2 * HandOver::bytes : exchange);
  if constexpr (ROOMY) {
#pragma unroll
    for (int level = 0; level < LEVELS; ++level) write_columns(level, shared + Shared::work + level * Level::bytes);
  }
  __syncthreads();

  // The levels of the tree.
  auto operands = [&](int level) {  // of a level; where they do not all fit at once, they are written here
    char* tile = shared + Shared::work + (ROOMY ? level * Level::bytes : 0);
    if constexpr (!ROOMY) {
      if (level > 0) __syncthreads();  // the operands before these have been read
      gates.read(g, place(), heads, place_head(), leaf, channel);
      read_rows();
      near_q();
      write_rows(level, tile, true);
      near_k();
      write_rows(level, tile, false);
      near_columns();
      write_columns(level, tile);
      __syncthreads();
    }
    return tile;
  };
  auto of_level = [&](int level) { return shared + Shared::pairs + level * Pairs::bytes; };
  auto sums_of = [&](int level) { return totals + (1 + level) * LEAVES * D; };
  auto my_warp = [] { return opaque(threadIdx.x / 32); };
  lowest_level(out, operands(0), of_level(0), my_warp() % BLOCKS, my_warp() / BLOCKS * 32);
  level_gradients<1>(out, operands(1), of_level(1), sums_of(1), my_warp() % BLOCKS, my_warp() / BLOCKS * 32);
  if constexpr (LEVELS > 2) level_gradients<2>(out, operands(2), of_level(2), sums_of(2), my_warp() % BLOCKS, my_warp() / BLOCKS * 32);

  // From here on a thread has two channels of a leaf.
  channel = opaque(threadIdx.x) % (D / 2) * 2;
  leaf = opaque(threadIdx.x) / (D / 2);
  float2 column[LEAF];
  auto take_columns = [&] {
#pragma unroll
    for (int j = 0; j < LEAF; j += 4) HandOver::take_four(column + j, shared + Shared::columns_exchange, leaf, channel, j);
  };
  if constexpr (!ROOMY) __syncthreads();
  HandOver::give(shared + Shared::columns_exchange, out.column, tokens, channels);
  if constexpr (!ROOMY) {
    __syncthreads();
    take_columns();
    __syncthreads();
  }
  const char* dq_waits = shared + Shared::last_exchange;
  const char* row_waits = dq_waits + HandOver::bytes;
  HandOver::give(shared + Shared::last_exchange, out.dq, tokens, channels);
  HandOver::give(shared + Shared::last_exchange + HandOver::bytes, out.row, tokens, channels);
  gates.read(g, place(), heads, place_head(), leaf, channel);
  read_rows();
  __syncthreads();
  if constexpr (PERSISTENT) {
    copy_beta_parts(shared, this_item());
    copy_first(shared);
    commit_copies();
  }
  if constexpr (ROOMY) take_columns();
  gates.columns(make_float2(1.f, 1.f), [&](int j, float2 f) { column[j] = times(f, column[j]); });

  // dg of each token of this leaf: the terms of other leaves, that of h and dh', then those of this leaf.
  float2 rest = make_float2(0.f, 0.f), gamma = rest;
#pragma unroll
  for (int n = 0; n < BLOCKS; ++n) add_to(rest, *reinterpret_cast<const float2*>(shared + Shared::straight + (n * D + channel) * 4));
#pragma unroll
  for (int l = 0; l < LEAVES; ++l) add_to(gamma, *reinterpret_cast<const float2*>(leaf_logs + l * D + channel));
  rest = times(exp2_fast(gamma), rest);
  // Of rows in the leaves after this one, then of columns in those before it, which follow directly: totals [1] lie behind totals [0].
#pragma unroll
  for (int n = 1; n < LEAVES; ++n) add_to(rest, *total(0, leaf + n));
#pragma unroll
  for (int level = 1; level < LEVELS; ++level) {
    const int half = 1 << level, before = leaf % half;  // leaves of a half, and those before this one in its half
    const bool row = Level::is_row(level, leaf);
    const int first = row ? leaf + 1 : leaf - before, count = row ? half - 1 - before : before;
#pragma unroll
    for (int n = 0; n < half - 1; ++n)
      if (n < count) add_to(rest, *total(1 + level, first + n));
  }
  float2 dg[LEAF];
  float2 inside = make_float2(1.f, 1.f);
#pragma unroll
  for (int i = 0; i < LEAF; i += 4) {
    float2 dq[4], row[4];
    HandOver::take_four(dq, dq_waits, leaf, channel, i);
    HandOver::take_four(row, row_waits, leaf, channel, i);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      inside = times(inside, gates.e[i + n]);
      const float2 of_k = scaled(betas[leaf * LEAF + i + n], times(ks[i + n], row[n]));
      dg[i + n] = times(inside, make_float2(qs[i + n].x * dq[n].x + of_k.x, qs[i + n].y * dq[n].y + of_k.y));
    }
  }
  float2 after = rest;  // a row's term counts for all tokens up to its own
#pragma unroll
  for (int i = LEAF - 1; i >= 0; --i) {
    add_to(after, dg[i]);
    dg[i] = after;
  }
  float2 before = make_float2(0.f, 0.f);  // a column's term counts for all tokens after its own
#pragma unroll
  for (int j = 0; j < LEAF; ++j) {
    add_to(dg[j], before);
    add_to(before, times(ks[j], column[j]));
  }
  const int stride = heads * D;
  auto first_element = [&](const Span& here) {  // of this thread, in [rows, H, D]
    return (static_cast<long long>(here.start + opaque(leaf) * LEAF) * heads + place_head()) * D + opaque(channel);
  };
  Element* to_q = d_q + first_element(place());
  auto left = [&] { return place().tokens - leaf * LEAF; };
  inside = make_float2(1.f, 1.f);
  const float one = Scales::inverse_of_both(shared);
  float2 dq[2], row[2];
  leaf_gradients(shared, leaf, gates, qs, ks, betas + leaf * LEAF, column, dg, [&](int i, float2 a, float2 b) {
    const float p = reinterpret_cast<const float*>(shared + Shared::leaf_daqk)[(leaf * LEAF + i) * LEAF + i];  // dAqk_ii
    inside = times(inside, gates.e[i]);
    if (i % 2 == 0) {
      HandOver::take_two(dq, dq_waits, leaf, channel, i);
      HandOver::take_two(row, row_waits, leaf, channel, i);
    }
    add_to(a, times(inside, dq[i % 2]));
    add_to(b, times(inside, row[i % 2]));
    if (i < left()) store_pair(to_q + i * stride, scaled(one, fused(p, ks[i], a)));
    HandOver::put_one(shared + Shared::last_exchange, leaf, channel, i, ks[i].x * b.x + ks[i].y * b.y);  // of dbeta
    add_to(column[i], fused(p, qs[i], scaled(betas[leaf * LEAF + i], b)));
  });
  const Span here = place();
  const long long first = first_element(here);
#pragma unroll
  for (int i = 0; i < LEAF; ++i) {
    if (i < here.tokens - leaf * LEAF) {
      store_pair(d_k + first + i * stride, scaled(one, column[i]));
      store_pair(d_g + first + i * stride, scaled(one, dg[i]));
    }
  }
  float share[LEAF];
  HandOver::take_ones(share, shared + Shared::last_exchange, leaf, channel);
  if constexpr (!PERSISTENT) __syncthreads();  // the exchange is no longer needed
  // [PARTS][C]: parts of dbeta, of 64 channels each
  float* shares = reinterpret_cast<float*>(shared + (PERSISTENT ? Shared::pairs : Shared::last_exchange));
  sum_over_channels(share, shares + (PARTS > 1 ? my_warp() % PARTS * C : 0) + opaque(threadIdx.x) / (D / 2) * LEAF);
  const int head_here = place_head();
  if constexpr (PERSISTENT) wait_copies<0>();  // for what the next item needs at its start
  __syncthreads();
  if (threadIdx.x < here.tokens) {
    const float* parts = PERSISTENT ? reinterpret_cast<const float*>(shared + Shared::beta_parts) : beta_parts + static_cast<long long>(item) * (D / 16 * C);
    float d = 0.f;
#pragma unroll
    for (int n = 0; n < D / 16; ++n) d += parts[n * C + threadIdx.x];
#pragma unroll
    for (int n = 0; n < PARTS; ++n) d += one * shares[n * C + threadIdx.x];
    d_beta[static_cast<long long>(here.start + threadIdx.x) * heads + head_here] = d;
  }
}

// q, k: [rows, H, D] Query. d_o, d_q, d_k, d_v: likewise, Element. g, d_g: [rows, H, D], beta, d_beta: [rows, H] float32.
// initial_state, d_final (each may be null): [N, H, K, V] float32. beta_parts: [chunks, H, D / 16, C] float32.
// states, d_states: [chunks, H] SavedState. v_tilde, d_residual: [chunks, H] Columns. v_scales, do_scales: [N, H] float32.
// items = chunks x H. A block takes item blockIdx.x and, if it is persistent, every gridDim.x-th after it; else the grid is the items.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) kda_intra_chunk_bwd(
    const Query* q, const Query* k, const float* g, const float* beta, const Element* d_o, const char* states, const char* v_tilde,
    const char* d_states, const char* d_residual, const float* beta_parts, const float* v_scales, const float* do_scales, const float* initial_state, const float* d_final, Element* d_q, Element* d_k, Element* d_v, float* d_g, float* d_beta,
    const int4* spans, int items, int length, int heads, float scale) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  char* shared = reinterpret_cast<char*>(shared_memory);
  const Arguments given = {q, k, g, beta, d_o, states, v_tilde, d_states, d_residual, beta_parts, v_scales, do_scales, initial_state, d_final, d_q, d_k, d_v, d_g, d_beta, spans, items, length, heads, scale};
  if constexpr (PERSISTENT) {
    if (threadIdx.x == FINDER) {
      given.find_next(shared, blockIdx.x);
      wait_copies<0>();
    }
    __syncthreads();
    given.copy_first(shared);
    wait_copies<0>();
    __syncthreads();
#pragma unroll 1
    for (int item; (item = Arguments::next_item(shared)) >= 0;) given.work(shared, item, Arguments::next_span(shared), Arguments::next_head(shared));
  } else {
    const Span span = span_of(blockIdx.x / heads, length, spans);
    if (span.tokens > 0) given.work(shared, blockIdx.x, span, blockIdx.x % heads);
  }
}
