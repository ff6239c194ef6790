// Every gradient of a chunk, from the state it was entered with, the gradient of the state it left, N~ and Y; one block a
// chunk and head, all chunks at once. S0, dS1, N~, Y and dO are products' operands; q, k and the gates enter in float32.
//
//   dP_ij = s beta_j dO_i . N~_j (j <= i)     dM_ij = -beta_j Y_i . N~_j (j < i; of row i of M, its beta_i left out)
//   dqg = s dO S0^T     dkg = -Y S0^T (likewise)     dkd_j = beta_j (N~ dS1^T)_j     dv = B Y
//   on each level, I = rows, J = columns:  a_I = f (dP k^)   b_I = f (dM k^)   c_J = f (dP^T q^ + dM^T (B k^))
//   dq = pre dqg + sum a + dP_ii k_i      dk = B (pre dkg + sum b) + suf dkd + sum c + dP_ii q_i
//   dbeta_i = Y_i . v_i + k_i . (pre dkg + sum b)_i      whose first term is the reverse scan's
//
// dg_t is the sum of all terms whose decay contains E_t, so that nothing cancels: of rows' terms (q a + k b) those of
// tokens from t on in the same half, of columns' terms (k c) those before t; and Gam rowsum(S0 dS1), straight through.
#include "kda_tree.cuh"

constexpr int THREADS = D * LEAVES / 2;  // a thread holds two channels of one leaf
constexpr int WARPS = THREADS / 32;
constexpr int RESIDENT = sizeof(Operand) == 4 ? 1 : D == 32 ? 3 : 512 / THREADS;  // blocks of a multiprocessor: 128 registers a thread
constexpr int SLICE = D == 32 ? 32 : sizeof(Operand) == 2 ? 64 : 32;  // of V in shared memory at a time
constexpr int LOWER = BLOCKS * (BLOCKS + 1) / 2;                      // 16x16 blocks on and below the diagonal
constexpr int ROUNDS = (LOWER + WARPS - 1) / WARPS;
constexpr int LANES = D / 2 < 32 ? D / 2 : 32;  // of a warp that share a leaf
constexpr int PARTS = D / 2 > 32 ? D / 64 : 1;  // warps that share a leaf
constexpr int STRIDE = D + 8;  // floats of a row of the exchange: eight rows of a block start in different banks

using StateSlice = Tile<Operand, SLICE, D, true>;
using ColumnsSlice = Tile<Operand, SLICE, C, true>;
using OutputSlice = Tile<Element, C, SLICE>;
using Pairs = Tile<Operand, C, C / 2>;  // of a level: rows as Level::rows (dM first, then dP), columns modulo max(half, 16)

struct Shared {
  static constexpr int leaf_decay = 0;                                  // float [LEAVES][D]
  static constexpr int straight = leaf_decay + LEAVES * D * 4;          // float [LEAVES][D]: partial sums of S0 dS1
  static constexpr int totals = straight + LEAVES * D * 4;              // float [LEVELS + 1][LEAVES][D]
  static constexpr int beta = totals + (LEVELS + 1) * LEAVES * D * 4;   // float [C]
  static constexpr int place = beta + C * 4;                            // Span and head: read again after each barrier, as q and k
  static constexpr int leaf_p = place + 32;                           // float [LEAVES][8][8]
  static constexpr int leaf_m = leaf_p + LEAVES * 64 * 4;
  static constexpr int pairs = (leaf_m + LEAVES * 64 * 4 + 127) / 128 * 128;  // LEVELS x Pairs
  static constexpr int work = pairs + LEVELS * Pairs::bytes;            // the slices, a level's operands, the exchange
  static constexpr int state = work;
  static constexpr int d_state = state + StateSlice::bytes;
  static constexpr int correction = d_state + StateSlice::bytes;
  static constexpr int d_correction = correction + ColumnsSlice::bytes;
  static constexpr int d_output = d_correction + ColumnsSlice::bytes;
  static constexpr int slices = 2 * StateSlice::bytes + 2 * ColumnsSlice::bytes + OutputSlice::bytes;
  static constexpr int exchange = (C + C / 2) * STRIDE * 4;
  static constexpr int bytes = work + (slices > exchange ? slices : exchange);
};
static_assert(Level::bytes <= Shared::exchange, "a level's operands lie where its results will");
static_assert(Shared::bytes == SHARED_BYTES, "cuda.py allocates what this kernel uses");

// Rows first .. first + SLICE of a tiled image: consecutive bytes.
template <class Slice>
__device__ __forceinline__ void fetch_rows(char* to, const char* image, int first) {
  image += Slice::bytes / SLICE * first;
#pragma unroll 1
  for (int at = threadIdx.x * 16; at < Slice::bytes; at += THREADS * 16) copy_async(to + at, image + at);
}

__device__ __forceinline__ float2 scaled(float a, float2 x) { return make_float2(a * x.x, a * x.y); }
__device__ __forceinline__ float2 fused(float a, float2 x, float2 y) { return make_float2(a * x.x + y.x, a * x.y + y.y); }

// A 16x16 block of dP and dM, on or below the diagonal, to where its pairs are used: their leaf, or their level.
__device__ __forceinline__ void store_pairs(char* shared, int block_row, int block_column, const Sum& dp, const Sum& dm) {
  if (block_row != block_column) {
    const int level = (block_row ^ block_column) >= 2 ? 2 : 1, bits = LEAF_BITS + level, half = 1 << bits, i = block_row * 16;
    const int row = (i >> (bits + 1) << (bits + 1)) + (i & (half - 1)), column = block_column * 16 & (half - 1);
    char* pairs = shared + Shared::pairs + level * Pairs::bytes;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      store_pair(Pairs::at(pairs, row + quadrant_row(q), column + quadrant_column(q)), dm.pair[q]);
      store_pair(Pairs::at(pairs, row + half + quadrant_row(q), column + quadrant_column(q)), dp.pair[q]);
    }
    return;
  }
#pragma unroll
  for (int q = 0; q < 4; q += 3) {
    const int at = ((block_row * 2 + q / 3) * LEAF + lane_row()) * LEAF + lane_column();
    *reinterpret_cast<float2*>(shared + Shared::leaf_p + at * 4) = dp.pair[q];
    *reinterpret_cast<float2*>(shared + Shared::leaf_m + at * 4) = dm.pair[q];
  }
  const int row = block_row * 16 + lane_row(), column = block_row % 2 * LEAF + lane_column();
  char* pairs = shared + Shared::pairs;
  store_pair(Pairs::at(pairs, row, column), dm.pair[1]);
  store_pair(Pairs::at(pairs, row + LEAF, column), dp.pair[1]);
  // The other group that shares these 16 columns.
  store_pair(Pairs::at(pairs, row, column ^ LEAF), make_float2(0.f, 0.f));
  store_pair(Pairs::at(pairs, row + LEAF, column ^ LEAF), make_float2(0.f, 0.f));
}

// What a thread gathers for its two channels and eight tokens: dq, and dk in the parts that have the token as a row (its
// beta left out) and as a column.
struct Gathered {
  float2 dq[LEAF], row[LEAF], column[LEAF];
};

// Pairs inside the leaf, j < i, w = decay(j..i), x = dP q_i + beta_i dM k_i:
//   a_i += dP w k_j    b_i += dM w k_j    c_j += w x    dg_t += w k_j x, j < t <= i
// done(i, a_i, b_i) when row i has met all j < i.
template <class Done>
__device__ __forceinline__ void leaf_gradients(
    const char* shared, int leaf, const Gates& gates, const Leaf<Element>& q, const Leaf<Element>& k, const float* beta,
    float2 (&column)[LEAF], float2 (&dg)[LEAF], Done done) {
  const float* dp = reinterpret_cast<const float*>(shared + Shared::leaf_p) + leaf * LEAF * LEAF;
  const float* dm = reinterpret_cast<const float*>(shared + Shared::leaf_m) + leaf * LEAF * LEAF;
  float2 w[LEAF];
#pragma unroll
  for (int i = 0; i < LEAF; ++i) {
    const float2 qi = q[i], weighted = scaled(beta[i], k[i]);
    float2 a = make_float2(0.f, 0.f), b = a, sum = a;
#pragma unroll
    for (int j = 0; j < i; ++j) {
      w[j] = times(w[j], gates.e[i]);
      const float p = dp[i * LEAF + j], m = dm[i * LEAF + j];
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

// x[i] summed over the lanes that share a leaf, to out[i].
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

// q, k, d_o, d_q, d_k, d_v: [rows, H, D] Element. g, d_g: [rows, H, D], beta, d_beta: [rows, H] float32.
// initial_state, d_final (each may be null): [N, H, K, V] float32. beta_parts: [chunks, H, D / 16, C] float32.
// states, d_states: [chunks, H] State. corrections, d_corrections: [chunks, H] Columns. Grid: chunks x H.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) kda_gradients(
    const Element* q, const Element* k, const float* g, const float* beta, const Element* d_o, const char* states, const char* corrections,
    const char* d_states, const char* d_corrections, const float* beta_parts, const float* initial_state, const float* d_final, Element* d_q, Element* d_k, Element* d_v, float* d_g, float* d_beta,
    const int4* spans, int length, int heads, float scale) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  char* shared = reinterpret_cast<char*>(shared_memory);
  const long long slot = blockIdx.x;
  const int chunk = blockIdx.x / heads, head = blockIdx.x % heads;
  const Span span = span_of(chunk, length, spans);
  if (span.tokens <= 0) return;
  const int channel = threadIdx.x % (D / 2) * 2, leaf = threadIdx.x / (D / 2);
  const int warp = threadIdx.x / 32, tokens = warp % BLOCKS * 16, channels = warp / BLOCKS * 32;  // of a warp's sums
  float* betas = reinterpret_cast<float*>(shared + Shared::beta);
  if (threadIdx.x == 0) {
    *reinterpret_cast<Span*>(shared + Shared::place) = span;
    *reinterpret_cast<int*>(shared + Shared::place + 16) = head;
  }
  if (threadIdx.x < C) betas[threadIdx.x] = threadIdx.x < span.tokens ? beta[static_cast<long long>(span.start + threadIdx.x) * heads + head] : 0.f;

  // Products with the states, summed over slices of V.
  Sum dqg[2], dkg[2], dkd[2], dp[ROUNDS], dm[ROUNDS];
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    clear(dqg[n]);
    clear(dkg[n]);
    clear(dkd[n]);
  }
#pragma unroll
  for (int n = 0; n < ROUNDS; ++n) {
    clear(dp[n]);
    clear(dm[n]);
  }
  // S0 . dS1 of this thread's channels and every LEAVES-th of V; a sequence's own ends unrounded: a short one is made of them.
  float2 straight = make_float2(0.f, 0.f);
  const long long ends_at = ((static_cast<long long>(span.sequence) * heads + head) * D + channel) * D;
  const float* exact_initial = span.first && initial_state != nullptr ? initial_state + ends_at : nullptr;
  const float* exact_final = span.last && d_final != nullptr ? d_final + ends_at : nullptr;
  for (int first = 0; first < D; first += SLICE) {
    if (first > 0) __syncthreads();
    fetch_rows<StateSlice>(shared + Shared::state, states + slot * State::bytes, first);
    fetch_rows<StateSlice>(shared + Shared::d_state, d_states + slot * State::bytes, first);
    fetch_rows<ColumnsSlice>(shared + Shared::correction, corrections + slot * Columns::bytes, first);
    fetch_rows<ColumnsSlice>(shared + Shared::d_correction, d_corrections + slot * Columns::bytes, first);
    constexpr int PIECE = 16 / sizeof(Element), PIECES = SLICE / PIECE;
#pragma unroll 1
    for (int n = threadIdx.x; n < C * PIECES; n += THREADS) {
      const int t = n / PIECES, column = n % PIECES * PIECE;
      const long long row = span.start + min(t, span.tokens - 1);
      copy_async(OutputSlice::at(shared + Shared::d_output, t, column), d_o + (row * heads + head) * D + first + column, t < span.tokens);
    }
    close_copies();
    wait_copies<0>();
    __syncthreads();
#pragma unroll 1
    for (int n = leaf; n < SLICE; n += LEAVES) {
      const int v = (n & ~7) | ((n + channel / 8) & 7);  // each square's row from another thread: other banks
      const float2 s0 = exact_initial != nullptr ? make_float2(exact_initial[first + v], exact_initial[first + v + D])
                                                 : load_pair(StateSlice::at(shared + Shared::state, v, channel));
      const float2 ds1 = exact_final != nullptr ? make_float2(exact_final[first + v], exact_final[first + v + D])
                                                : load_pair(StateSlice::at(shared + Shared::d_state, v, channel));
      add_to(straight, times(s0, ds1));
    }
#pragma unroll 1
    for (int v = 0; v < SLICE; v += 16) {
      const Block<Operand> out = convert<Operand>(OutputSlice::load(shared + Shared::d_output, tokens, v));
      const Block<Operand> y = ColumnsSlice::load_transposed(shared + Shared::d_correction, v, tokens);
      const Block<Operand> n = ColumnsSlice::load_transposed(shared + Shared::correction, v, tokens);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const Right<Operand> s0 = StateSlice::load_right_transposed(shared + Shared::state, v, channels + c * 16);
        product(dqg[c], out, s0);
        product(dkg[c], y, s0);
        product(dkd[c], n, StateSlice::load_right_transposed(shared + Shared::d_state, v, channels + c * 16));
      }
      if (warp / BLOCKS == v / 16 % (D / 32)) {  // a share of dv for each of the warps with these tokens
#pragma unroll
        for (int q4 = 0; q4 < 4; ++q4) {
          const int t = tokens + quadrant_row(q4);
          if (t < span.tokens)
            store_pair(d_v + (static_cast<long long>(span.start + t) * heads + head) * D + first + v + quadrant_column(q4), scaled(betas[t], get_pair(y, q4)));
        }
      }
    }
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
      const int task = round * WARPS + warp;
      if (task >= LOWER) continue;
      const int i = task < 1 ? 0 : task < 3 ? 1 : task < 6 ? 2 : 3, j = task - i * (i + 1) / 2;
#pragma unroll 1
      for (int v = 0; v < SLICE; v += 16) {
        const Right<Operand> n = ColumnsSlice::load_right_transposed(shared + Shared::correction, v, j * 16);
        product(dp[round], convert<Operand>(OutputSlice::load(shared + Shared::d_output, i * 16, v)), n);
        product(dm[round], ColumnsSlice::load_transposed(shared + Shared::d_correction, v, i * 16), n);
      }
    }
  }
  __syncthreads();  // the slices give way to the exchange

  *reinterpret_cast<float2*>(shared + Shared::straight + (leaf * D + channel) * 4) = straight;
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    const int task = round * WARPS + warp;
    if (task >= LOWER) continue;
    const int bi = task < 1 ? 0 : task < 3 ? 1 : task < 6 ? 2 : 3, bj = task - bi * (bi + 1) / 2;
#pragma unroll
    for (int q4 = 0; q4 < 4; ++q4) {
      const float2 b = *reinterpret_cast<const float2*>(betas + bj * 16 + quadrant_column(q4));
      dp[round].pair[q4] = scaled(scale, times(b, dp[round].pair[q4]));
      dm[round].pair[q4] = scaled(-1.f, times(b, dm[round].pair[q4]));
    }
    store_pairs(shared, bi, bj, dp[round], dm[round]);
  }

  auto place_head = [&] { return *reinterpret_cast<const int*>(shared + Shared::place + 16); };
  auto place = [&] { return *reinterpret_cast<const Span*>(shared + Shared::place); };
  Gates gates;
  Leaf<Element> qs, ks;  // read again after each barrier instead of held across it: registers are short
  auto read_rows = [&] {
    qs.read(q, place(), heads, place_head(), leaf, channel);
    ks.read(k, place(), heads, place_head(), leaf, channel);
  };
  gates.read(g, place(), heads, place_head(), leaf, channel);
  const float* leaf_decay = reinterpret_cast<const float*>(shared + Shared::leaf_decay);
  gates.share(reinterpret_cast<float*>(shared + Shared::leaf_decay), leaf, channel);

  float* exchange = reinterpret_cast<float*>(shared + Shared::work);
  auto hand_over = [&](const Sum& sum, int row, int column) {
#pragma unroll
    for (int q4 = 0; q4 < 4; ++q4) *reinterpret_cast<float2*>(exchange + (row + quadrant_row(q4)) * STRIDE + column + quadrant_column(q4)) = sum.pair[q4];
  };
  auto received = [&](int row) { return *reinterpret_cast<const float2*>(exchange + row * STRIDE + channel); };
  float* totals = reinterpret_cast<float*>(shared + Shared::totals);  // [LEVELS + 1][LEAVES][D]; 0, 1: the chunk's rows, columns
  auto total = [&](int which, int of) { return reinterpret_cast<float2*>(totals + (which * LEAVES + of) * D + channel); };

  // The past's and the future's part, one after another through the exchange. The sum of a leaf's terms of dg goes to the
  // other leaves; within the leaf the terms follow from what was gathered.
  Gathered out;
  float2 sum = make_float2(0.f, 0.f);
  hand_over(dqg[0], tokens, channels);
  hand_over(dqg[1], tokens, channels + 16);
  __syncthreads();
  Reach reach;
#pragma unroll
  for (int level = 0; level < LEVELS; ++level) reach.widen(leaf_decay, level, leaf, channel);
  read_rows();
  gates.rows(reach.before, [&](int i, float2 pre) {
    out.dq[i] = times(pre, scaled(scale, received(leaf * LEAF + i)));
    add_to(sum, times(qs[i], out.dq[i]));
  });
  __syncthreads();
  hand_over(dkg[0], tokens, channels);
  hand_over(dkg[1], tokens, channels + 16);
  __syncthreads();
  gates.rows(reach.before, [&](int i, float2 pre) {
    out.row[i] = times(pre, scaled(-1.f, received(leaf * LEAF + i)));
    add_to(sum, times(ks[i], scaled(betas[leaf * LEAF + i], out.row[i])));
  });
  *total(0, leaf) = sum;
  __syncthreads();
  hand_over(dkd[0], tokens, channels);
  hand_over(dkd[1], tokens, channels + 16);
  __syncthreads();
  sum = make_float2(0.f, 0.f);
  gates.columns(reach.after, [&](int j, float2 suf) {
    out.column[j] = times(suf, scaled(betas[leaf * LEAF + j], received(leaf * LEAF + j)));
    add_to(sum, times(ks[j], out.column[j]));
  });
  *total(1, leaf) = sum;

  // The levels of the tree.
  Reach near;
#pragma unroll 1
  for (int level = 0; level < LEVELS; ++level) {
    const int channel = opaque(threadIdx.x % (D / 2) * 2), warp = opaque(threadIdx.x / 32);
    const int tokens = warp % BLOCKS * 16, channels = warp / BLOCKS * 32;
    auto received = [&](int row) { return *reinterpret_cast<const float2*>(exchange + row * STRIDE + channel); };
    auto total = [&](int which, int of) { return reinterpret_cast<float2*>(totals + (which * LEAVES + of) * D + channel); };
    const int bits = LEAF_BITS + level, half = 1 << bits, group = leaf >> (level + 1), within = (leaf & ((1 << level) - 1)) * LEAF;
    __syncthreads();  // the last results have been read
    read_rows();
    Level::write(shared + Shared::work, level, leaf, channel, gates, near, qs, ks, 1.f, [&](int i) { return betas[leaf * LEAF + i]; });
    __syncthreads();
    const char* tile = shared + Shared::work;
    const char* pairs = shared + Shared::pairs + level * Pairs::bytes;
    const int width = half < 16 ? 16 : half;
    Sum rows[2], columns;
    clear(rows[0]);
    clear(rows[1]);
    clear(columns);
    const int met = tokens >> (bits + 1) << bits & ~15;  // the first of the columns that these rows meet
#pragma unroll 1
    for (int j = 0; j < width; j += 16) {
      const Block<Operand> a = Pairs::load(pairs, tokens, j);
#pragma unroll
      for (int c = 0; c < 2; ++c) product(rows[c], a, Level::Columns::load_right_transposed(tile + Level::columns, met + j, channels + c * 16));
    }
    const int column = warp % (BLOCKS / 2) * 16, column_channels = warp / (BLOCKS / 2) * 16;
    const int first = half <= 16 ? 2 * column : 0, count = half <= 16 ? 32 : 2 * half;  // the rows that these columns meet
#pragma unroll 1
    for (int i = first; i < first + count; i += 16)
      product(columns, Pairs::load_transposed(pairs, i, column & (width - 1)), Level::Rows::load_right_transposed(tile + Level::rows, i, column_channels));
    __syncthreads();  // the operands give way to the results
    hand_over(rows[0], tokens, channels);
    hand_over(rows[1], tokens, channels + 16);
    hand_over(columns, C + column, column_channels);
    __syncthreads();
    sum = make_float2(0.f, 0.f);
    read_rows();
    if (leaf >> level & 1) {
      gates.rows(near.before, [&](int i, float2 f) {
        const int row = 2 * half * group + within + i;
        const float2 b = times(f, received(row)), a = times(f, received(row + half));
        add_to(out.dq[i], a);
        add_to(out.row[i], b);
        add_to(sum, times(qs[i], a));
        add_to(sum, times(ks[i], scaled(betas[leaf * LEAF + i], b)));
      });
    } else {
      gates.columns(near.after, [&](int j, float2 f) {
        const float2 c = times(f, received(C + half * group + within + j));
        add_to(out.column[j], c);
        add_to(sum, times(ks[j], c));
      });
    }
    if (level > 0) *total(1 + level, leaf) = sum;
    near.widen(leaf_decay, level, leaf, channel);
  }
  __syncthreads();

  // dg of every token of this leaf: other leaves' terms, the state's own path, then this leaf's terms.
  float2 rest = make_float2(0.f, 0.f), gamma = make_float2(1.f, 1.f);
#pragma unroll
  for (int l = 0; l < LEAVES; ++l) {
    add_to(rest, *reinterpret_cast<const float2*>(shared + Shared::straight + (l * D + channel) * 4));
    gamma = times(gamma, *reinterpret_cast<const float2*>(leaf_decay + l * D + channel));
  }
  rest = times(gamma, rest);
#pragma unroll
  for (int l = 0; l < LEAVES; ++l) {
    if (l > leaf) add_to(rest, *total(0, l));
    if (l < leaf) add_to(rest, *total(1, l));
#pragma unroll
    for (int level = 1; level < LEVELS; ++level) {
      const bool same_half = l >> level == leaf >> level;
      if (same_half && (leaf >> level & 1 ? l > leaf : l < leaf)) add_to(rest, *total(1 + level, l));
    }
  }
  read_rows();
  float2 dg[LEAF];
  float2 after = rest;  // rows count for the tokens up to their own
#pragma unroll
  for (int i = LEAF - 1; i >= 0; --i) {
    add_to(after, times(qs[i], out.dq[i]));
    add_to(after, times(ks[i], scaled(betas[leaf * LEAF + i], out.row[i])));
    dg[i] = after;
  }
  float2 before = make_float2(0.f, 0.f);  // columns for those after their own
#pragma unroll
  for (int j = 0; j < LEAF; ++j) {
    add_to(dg[j], before);
    add_to(before, times(ks[j], out.column[j]));
  }
  float share[LEAF];  // of dbeta
  auto waiting = [&](int row) { return reinterpret_cast<float2*>(exchange + row * STRIDE + channel); };  // for their turn
  const Span here = place();
  const int stride = heads * D, left = here.tokens - leaf * LEAF;
  const long long first_row = (static_cast<long long>(here.start + leaf * LEAF) * heads + place_head()) * D + channel;
#pragma unroll
  for (int i = 0; i < LEAF; ++i) *waiting(leaf * LEAF + i) = out.dq[i];
#pragma unroll
  for (int i = LEAF / 2; i < LEAF; ++i) *waiting(C + leaf * LEAF / 2 + i - LEAF / 2) = out.row[i];
  leaf_gradients(shared, leaf, gates, qs, ks, betas + leaf * LEAF, out.column, dg, [&](int i, float2 a, float2 b) {
    const float p = reinterpret_cast<const float*>(shared + Shared::leaf_p)[(leaf * LEAF + i) * LEAF + i];  // dP_ii
    add_to(a, *waiting(leaf * LEAF + i));
    add_to(b, i < LEAF / 2 ? out.row[i] : *waiting(C + leaf * LEAF / 2 + i - LEAF / 2));
    if (i < left) store_pair(d_q + first_row + i * stride, fused(p, ks[i], a));
    share[i] = ks[i].x * b.x + ks[i].y * b.y;
    add_to(out.column[i], fused(p, qs[i], scaled(betas[leaf * LEAF + i], b)));
  });
#pragma unroll
  for (int i = 0; i < LEAF; ++i) {
    if (i < left) {
      store_pair(d_k + first_row + i * stride, out.column[i]);
      store_pair(d_g + first_row + i * stride, dg[i]);
    }
  }
  __syncthreads();  // dq has left the exchange
  float* shares = reinterpret_cast<float*>(shared + Shared::work);  // [PARTS][C]: dbeta of 64 channels
  sum_over_channels(share, shares + (PARTS > 1 ? warp % PARTS * C : 0) + leaf * LEAF);
  __syncthreads();
  if (threadIdx.x < here.tokens) {
    float d = 0.f;
#pragma unroll
    for (int n = 0; n < D / 16; ++n) d += beta_parts[(static_cast<long long>(blockIdx.x) * (D / 16) + n) * C + threadIdx.x];
#pragma unroll
    for (int n = 0; n < PARTS; ++n) d += shares[n * C + threadIdx.x];
    d_beta[static_cast<long long>(here.start + threadIdx.x) * heads + place_head()] = d;
  }
}
