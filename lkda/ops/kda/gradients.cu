// Every gradient of a chunk, from the state it was entered with, the gradient of the state it left, N~ and Y; one block a
// chunk and head, all chunks at once. S0, dS1, N~, Y and dO are products' operands; q, k and the gates enter in float32.
//
//   dP_ij = s beta_j dO_i . N~_j (j <= i)     dM_ij = -beta_i beta_j Y_i . N~_j (j < i)
//   dqg = s dO S0^T     dkg_i = -beta_i (Y S0^T)_i     dkd_j = beta_j (N~ dS1^T)_j     dv = B Y     dbeta_i = Y_i . N~_i
//   on each level, I = rows, J = columns:  a_I = f (dP k^)   b_I = f (dM k^)   c_J = f (dP^T q^ + dM^T k^)
//   dq = pre dqg + sum a + dP_ii k_i      dk = pre dkg + suf dkd + sum b + sum c + dP_ii q_i
//
// dg_t is the sum of all terms whose decay contains E_t, so that nothing cancels: of rows' terms (q a + k b) those of
// tokens from t on in the same half, of columns' terms (k c) those before t; and Gam rowsum(S0 dS1), straight through.
#include "kda_tree.cuh"

constexpr int THREADS = D * LEAVES / 2;  // a thread holds two channels of one leaf
constexpr int WARPS = THREADS / 32;
constexpr int SLICE = D == 32 ? 32 : sizeof(Operand) == 2 ? 64 : 32;  // of V in shared memory at a time
constexpr int LOWER = BLOCKS * (BLOCKS + 1) / 2;                      // 16x16 blocks on and below the diagonal
constexpr int ROUNDS = (LOWER + WARPS - 1) / WARPS;
constexpr int STRIDE = D + 8;  // floats of a row of the exchange: eight rows of a block start in different banks

using StateSlice = Tile<Operand, SLICE, D>;
using ColumnsSlice = Tile<Operand, SLICE, C>;
using OutputSlice = Tile<Element, C, SLICE>;
using Pairs = Tile<Operand, C, C / 2>;  // of a level: rows as Level::rows (dM first, then dP), columns modulo max(half, 16)

struct Shared {
  static constexpr int leaf_decay = 0;                                  // float [LEAVES][D]
  static constexpr int straight = leaf_decay + LEAVES * D * 4;          // float [LEAVES][D]: partial sums of S0 dS1
  static constexpr int totals = straight + LEAVES * D * 4;              // float [LEVELS + 1][LEAVES][D]
  static constexpr int beta = totals + (LEVELS + 1) * LEAVES * D * 4;   // float [C]
  static constexpr int leaf_p = beta + C * 4;                           // float [LEAVES][8][8]
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

// Rows first .. first + ROWS of the image of a Tile<Operand, ALL, COLUMNS>.
template <int ALL, int ROWS, int COLUMNS>
__device__ __forceinline__ void fetch_rows(char* to, const char* image, int first) {
  constexpr int WIDE = COLUMNS * sizeof(Operand) < 128 ? COLUMNS * sizeof(Operand) : 128;  // bytes of a panel's row
  constexpr int PANEL = ROWS * WIDE;
  for (int at = threadIdx.x * 16; at < ROWS * COLUMNS * static_cast<int>(sizeof(Operand)); at += THREADS * 16)
    copy_async(to + at, image + at / PANEL * (ALL * WIDE) + first * WIDE + at % PANEL);
}

__device__ __forceinline__ float2 scaled(float a, float2 x) { return make_float2(a * x.x, a * x.y); }
__device__ __forceinline__ float2 fused(float a, float2 x, float2 y) { return make_float2(a * x.x + y.x, a * x.y + y.y); }

// A pair of dP or dM (columns j, j + 1 of row i >= j) to where it is used: its leaf, or its level.
__device__ __forceinline__ void store_pairs(char* shared, int i, int j, float2 dp, float2 dm) {
  const int apart = i / LEAF ^ j / LEAF;
  if (apart == 0) {
    const int at = ((i / LEAF) * LEAF + i % LEAF) * LEAF + j % LEAF;
    *reinterpret_cast<float2*>(shared + Shared::leaf_p + at * 4) = dp;
    *reinterpret_cast<float2*>(shared + Shared::leaf_m + at * 4) = dm;
    return;
  }
  const int level = apart >= 4 ? 2 : apart >= 2 ? 1 : 0, half = LEAF << level;
  const int group = i / (2 * half), row = 2 * half * group + i % half;
  const int column = (half * group + j % half) % (half < 16 ? 16 : half);
  char* pairs = shared + Shared::pairs + level * Pairs::bytes;
  store_pair(Pairs::at(pairs, row, column), dm);
  store_pair(Pairs::at(pairs, row + half, column), dp);
  if (level == 0) {  // the other group that shares these 16 columns
    store_pair(Pairs::at(pairs, row, column ^ LEAF), make_float2(0.f, 0.f));
    store_pair(Pairs::at(pairs, row + half, column ^ LEAF), make_float2(0.f, 0.f));
  }
}

// What a thread gathers for its two channels and eight tokens.
struct Gathered {
  float2 dq[LEAF], dk[LEAF], dg[LEAF];
};

// Terms of rows (or of columns) of this leaf into dg: each counts for the tokens up to its own (after its own).
// Returns the whole leaf's sum, for the leaves before (after) it.
template <class Term>
__device__ __forceinline__ float2 spread_rows(Gathered& out, Term term) {
  float2 sum = make_float2(0.f, 0.f);
#pragma unroll
  for (int i = LEAF - 1; i >= 0; --i) {
    add_to(sum, term(i));
    add_to(out.dg[i], sum);
  }
  return sum;
}
template <class Term>
__device__ __forceinline__ float2 spread_columns(Gathered& out, Term term) {
  float2 sum = make_float2(0.f, 0.f);
#pragma unroll
  for (int j = 0; j < LEAF; ++j) {
    add_to(out.dg[j], sum);
    add_to(sum, term(j));
  }
  return sum;
}

// Pairs inside the leaf, j < i, w = decay(j..i):
//   a_i += dP w k_j    b_i += dM w k_j    c_j += w (dP q_i + dM k_i)    dg_t += w k_j (dP q_i + dM k_i), j < t <= i
__device__ __forceinline__ void leaf_gradients(const char* shared, int leaf, const Gates& gates, const Leaf<Element>& q, const Leaf<Element>& k, Gathered& out) {
  const float* dp = reinterpret_cast<const float*>(shared + Shared::leaf_p) + leaf * LEAF * LEAF;
  const float* dm = reinterpret_cast<const float*>(shared + Shared::leaf_m) + leaf * LEAF * LEAF;
  float2 w[LEAF];
#pragma unroll
  for (int i = 0; i < LEAF; ++i) {
    const float2 qi = q[i], ki = k[i];
    float2 sum = make_float2(0.f, 0.f);
#pragma unroll
    for (int j = 0; j < i; ++j) {
      w[j] = times(w[j], gates.e[i]);
      const float p = dp[i * LEAF + j], m = dm[i * LEAF + j];
      const float2 column = times(w[j], k[j]), row = fused(p, qi, scaled(m, ki));
      out.dq[i] = fused(p, column, out.dq[i]);
      out.dk[i] = fused(m, column, out.dk[i]);
      add_to(out.dk[j], times(w[j], row));
      add_to(sum, times(column, row));
      add_to(out.dg[j + 1], sum);
    }
    const float p = dp[i * LEAF + i];
    out.dq[i] = fused(p, ki, out.dq[i]);
    out.dk[i] = fused(p, qi, out.dk[i]);
    w[i] = make_float2(1.f, 1.f);
  }
}

// q, k, d_o, d_q, d_k, d_v: [rows, H, D] Element. g, d_g: [rows, H, D], beta, d_beta: [rows, H] float32.
// states, d_states: [chunks, H] State. corrections, d_corrections: [chunks, H] Columns. Grid: chunks x H.
extern "C" __global__ void __launch_bounds__(THREADS, 65536 / 128 / THREADS) kda_gradients(
    const Element* q, const Element* k, const float* g, const float* beta, const Element* d_o, const char* states, const char* corrections,
    const char* d_states, const char* d_corrections, Element* d_q, Element* d_k, Element* d_v, float* d_g, float* d_beta,
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
  float2 straight = make_float2(0.f, 0.f);
  float along[2] = {0.f, 0.f};  // Y . N~ of this warp's rows lane / 4 and 8 + lane / 4
  for (int first = 0; first < D; first += SLICE) {
    if (first > 0) __syncthreads();
    fetch_rows<D, SLICE, D>(shared + Shared::state, states + slot * State::bytes, first);
    fetch_rows<D, SLICE, D>(shared + Shared::d_state, d_states + slot * State::bytes, first);
    fetch_rows<D, SLICE, C>(shared + Shared::correction, corrections + slot * Columns::bytes, first);
    fetch_rows<D, SLICE, C>(shared + Shared::d_correction, d_corrections + slot * Columns::bytes, first);
    constexpr int PIECE = 16 / sizeof(Element), PIECES = SLICE / PIECE;
    for (int n = threadIdx.x; n < C * PIECES; n += THREADS) {
      const int t = n / PIECES, column = n % PIECES * PIECE;
      const long long row = span.start + min(t, span.tokens - 1);
      copy_async(OutputSlice::at(shared + Shared::d_output, t, column), d_o + (row * heads + head) * D + first + column, t < span.tokens);
    }
    close_copies();
    wait_copies<0>();
    __syncthreads();
    for (int v = leaf; v < SLICE; v += LEAVES)
      add_to(straight, times(load_pair(StateSlice::at(shared + Shared::state, v, channel)), load_pair(StateSlice::at(shared + Shared::d_state, v, channel))));
#pragma unroll 1
    for (int v = 0; v < SLICE; v += 16) {
      const Block<Operand> out = convert<Operand>(OutputSlice::load(shared + Shared::d_output, tokens, v));
      const Block<Operand> y = ColumnsSlice::load_transposed(shared + Shared::d_correction, v, tokens);
      const Block<Operand> n = ColumnsSlice::load_transposed(shared + Shared::correction, v, tokens);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const Block<Operand> s0 = StateSlice::load_transposed(shared + Shared::state, v, channels + c * 16);
        product(dqg[c], out, s0);
        product(dkg[c], y, s0);
        product(dkd[c], n, StateSlice::load_transposed(shared + Shared::d_state, v, channels + c * 16));
      }
      if (warp / BLOCKS == v / 16 % (D / 32)) {  // a share of dv and dbeta for each of the warps with these tokens
#pragma unroll
        for (int q4 = 0; q4 < 4; ++q4) {
          const float2 yy = get_pair(y, q4), nn = get_pair(n, q4);
          along[q4 & 1] += yy.x * nn.x + yy.y * nn.y;
          const int t = tokens + quadrant_row(q4);
          if (t < span.tokens)
            store_pair(d_v + (static_cast<long long>(span.start + t) * heads + head) * D + first + v + quadrant_column(q4), scaled(betas[t], yy));
        }
      }
    }
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
      const int task = round * WARPS + warp;
      if (task >= LOWER) continue;
      const int i = task < 1 ? 0 : task < 3 ? 1 : task < 6 ? 2 : 3, j = task - i * (i + 1) / 2;
#pragma unroll
      for (int v = 0; v < SLICE; v += 16) {
        const Block<Operand> n = ColumnsSlice::load_transposed(shared + Shared::correction, v, j * 16);
        product(dp[round], convert<Operand>(OutputSlice::load(shared + Shared::d_output, i * 16, v)), n);
        product(dm[round], ColumnsSlice::load_transposed(shared + Shared::d_correction, v, i * 16), n);
      }
    }
  }
  __syncthreads();  // the slices give way to the exchange

  *reinterpret_cast<float2*>(shared + Shared::straight + (leaf * D + channel) * 4) = straight;
  float* partial = reinterpret_cast<float*>(shared + Shared::totals);  // [D / 32][C], until the totals are written
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    along[h] += __shfl_xor_sync(0xffffffffu, along[h], 1);
    along[h] += __shfl_xor_sync(0xffffffffu, along[h], 2);
    if (lane_id() % 4 == 0) partial[warp / BLOCKS * C + tokens + h * 8 + lane_row()] = along[h];
  }
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    const int task = round * WARPS + warp;
    if (task >= LOWER) continue;
    const int bi = task < 1 ? 0 : task < 3 ? 1 : task < 6 ? 2 : 3, bj = task - bi * (bi + 1) / 2;
#pragma unroll
    for (int q4 = 0; q4 < 4; ++q4) {
      const int i = bi * 16 + quadrant_row(q4), j = bj * 16 + quadrant_column(q4);
      if (i / LEAF < j / LEAF) continue;
      const float2 b = make_float2(betas[j], betas[j + 1]);
      store_pairs(shared, i, j, scaled(scale, times(b, dp[round].pair[q4])), scaled(-betas[i], times(b, dm[round].pair[q4])));
    }
  }

  Gates gates;
  Leaf<Element> qs, ks;
  gates.read(g, span, heads, head, leaf, channel);
  qs.read(q, span, heads, head, leaf, channel);
  ks.read(k, span, heads, head, leaf, channel);
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

  // The past's and the future's part, one after another through the exchange.
  Gathered out;
#pragma unroll
  for (int i = 0; i < LEAF; ++i) out.dg[i] = out.dk[i] = make_float2(0.f, 0.f);
  hand_over(dqg[0], tokens, channels);
  hand_over(dqg[1], tokens, channels + 16);
  __syncthreads();
  if (threadIdx.x < span.tokens) {
    float sum = 0.f;
#pragma unroll
    for (int n = 0; n < D / 32; ++n) sum += partial[n * C + threadIdx.x];
    d_beta[static_cast<long long>(span.start + threadIdx.x) * heads + head] = sum;
  }
  Reach reach;
#pragma unroll
  for (int level = 0; level < LEVELS; ++level) reach.widen(leaf_decay, level, leaf, channel);
  gates.rows(reach.before, [&](int i, float2 pre) { out.dq[i] = times(pre, scaled(scale, received(leaf * LEAF + i))); });
  __syncthreads();
  hand_over(dkg[0], tokens, channels);
  hand_over(dkg[1], tokens, channels + 16);
  __syncthreads();
  gates.rows(reach.before, [&](int i, float2 pre) { out.dk[i] = times(pre, scaled(-betas[leaf * LEAF + i], received(leaf * LEAF + i))); });
  *total(0, leaf) = spread_rows(out, [&](int i) {
    float2 term = times(qs[i], out.dq[i]);
    add_to(term, times(ks[i], out.dk[i]));
    return term;
  });
  __syncthreads();
  hand_over(dkd[0], tokens, channels);
  hand_over(dkd[1], tokens, channels + 16);
  __syncthreads();
  {
    float2 c[LEAF];
    gates.columns(reach.after, [&](int j, float2 suf) {
      const float2 d = times(suf, scaled(betas[leaf * LEAF + j], received(leaf * LEAF + j)));
      add_to(out.dk[j], d);
      c[j] = times(ks[j], d);
    });
    *total(1, leaf) = spread_columns(out, [&](int j) { return c[j]; });
  }

  // The levels of the tree.
  Reach near;
#pragma unroll 1
  for (int level = 0; level < LEVELS; ++level) {
    const int half = LEAF << level, group = leaf >> (level + 1), within = (leaf & ((1 << level) - 1)) * LEAF;
    __syncthreads();  // the last results have been read
    Level::write(shared + Shared::work, level, leaf, channel, gates, near, qs, ks, 1.f);
    __syncthreads();
    const char* tile = shared + Shared::work;
    const char* pairs = shared + Shared::pairs + level * Pairs::bytes;
    const int width = half < 16 ? 16 : half;
    Sum rows[2], columns;
    clear(rows[0]);
    clear(rows[1]);
    clear(columns);
    {
      const int first = tokens / (2 * half) * half / 16 * 16;  // of the columns that these rows meet
      for (int j = 0; j < width; j += 16) {
        const Block<Operand> a = Pairs::load(pairs, tokens, j);
#pragma unroll
        for (int c = 0; c < 2; ++c) product(rows[c], a, Level::Columns::load_transposed(tile + Level::columns, first + j, channels + c * 16));
      }
    }
    const int column = warp % (BLOCKS / 2) * 16, column_channels = warp / (BLOCKS / 2) * 16;
    {
      const int first = half <= 16 ? 2 * column : 0, count = half <= 16 ? 32 : 2 * half;
      for (int i = first; i < first + count; i += 16)
        product(columns, Pairs::load_transposed(pairs, i, column % width), Level::Rows::load_transposed(tile + Level::rows, i, column_channels));
    }
    __syncthreads();  // the operands give way to the results
    hand_over(rows[0], tokens, channels);
    hand_over(rows[1], tokens, channels + 16);
    hand_over(columns, C + column, column_channels);
    __syncthreads();
    float2 sum;
    if (leaf >> level & 1) {
      float2 r[LEAF];
      gates.rows(near.before, [&](int i, float2 f) {
        const int row = 2 * half * group + within + i;
        const float2 b = times(f, received(row)), a = times(f, received(row + half));
        add_to(out.dq[i], a);
        add_to(out.dk[i], b);
        r[i] = times(qs[i], a);
        add_to(r[i], times(ks[i], b));
      });
      sum = spread_rows(out, [&](int i) { return r[i]; });
    } else {
      float2 c[LEAF];
      gates.columns(near.after, [&](int j, float2 f) {
        const float2 d = times(f, received(C + half * group + within + j));
        add_to(out.dk[j], d);
        c[j] = times(ks[j], d);
      });
      sum = spread_columns(out, [&](int j) { return c[j]; });
    }
    if (level > 0) *total(1 + level, leaf) = sum;
    near.widen(leaf_decay, level, leaf, channel);
  }
  leaf_gradients(shared, leaf, gates, qs, ks, out);
  __syncthreads();

  // What other leaves' terms and the state's own path add to every token of this leaf.
  float2 rest = make_float2(0.f, 0.f);
#pragma unroll
  for (int l = 0; l < LEAVES; ++l) {
    if (l > leaf) add_to(rest, *total(0, l));
    if (l < leaf) add_to(rest, *total(1, l));
#pragma unroll
    for (int level = 1; level < LEVELS; ++level) {
      const bool mine = l >> level == leaf >> level;
      if (mine && (leaf >> level & 1 ? l > leaf : l < leaf)) add_to(rest, *total(1 + level, l));
    }
  }
  float2 along_state = make_float2(0.f, 0.f), gamma = make_float2(1.f, 1.f);
#pragma unroll
  for (int l = 0; l < LEAVES; ++l) {
    add_to(along_state, *reinterpret_cast<const float2*>(shared + Shared::straight + (l * D + channel) * 4));
    gamma = times(gamma, *reinterpret_cast<const float2*>(leaf_decay + l * D + channel));
  }
  add_to(rest, times(gamma, along_state));
#pragma unroll
  for (int i = 0; i < LEAF; ++i) {
    const int t = leaf * LEAF + i;
    if (t < span.tokens) {
      const long long at = (static_cast<long long>(span.start + t) * heads + head) * D + channel;
      store_pair(d_q + at, out.dq[i]);
      store_pair(d_k + at, out.dk[i]);
      add_to(out.dg[i], rest);
      store_pair(d_g + at, out.dg[i]);
    }
  }
}
