// What a block of intra_chunk_bwd.cu keeps in shared memory, and how it gets there.
//
// Macros, besides those of kda_chunk.cuh: QUERY, ROOMY and PERSISTENT (variants.py).
#pragma once
#include "kda_tree.cuh"

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
