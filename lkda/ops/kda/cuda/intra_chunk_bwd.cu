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
#include "kda_bwd_levels.cuh"
#include "kda_bwd_pairs.cuh"
#include "kda_bwd_states.cuh"

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
