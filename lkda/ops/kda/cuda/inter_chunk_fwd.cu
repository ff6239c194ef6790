// Forward from chunk to chunk: the state and the output. One block for each WIDTH columns of V of a head of a sequence.
//
//   r = v - k_in h     v~ = r + T~ (B r)     v_new = B v~     o = qg h + Aqk v_new     h' = exp(G_C) h + kg^T v_new
//
// where qg and Aqk include the attention scale.
//
// A warp has 16 columns of V, and everything is transposed: r^T and v_new^T are [16, C], h^T is [16, K]. The float32 sum of one
// product, rounded, is the left operand of the next, so warps exchange nothing.
//
// Where there are too few heads to fill the GPU, a sequence is cut into segments that run in parallel. A segment maps the state
// that enters it to S -> A S + Z. With SUMMARY the kernel computes Z, starting from a state of zeros, and A in D further columns:
// column j starts from the unit vector e_j, with v = 0. segments.cu then computes the state that enters each segment.
//
// If a chunk of the segment forgets the state that enters it (kda_forgetting.cuh), A is 0, and Z is what this chunk and those after
// it make of a state of zeros. So the earlier chunks are left out, and A is not written. No bit of the result depends on that.
//
// Segments may be *optional*, where the pass that computes A would cost more than it gains. Then nothing is computed for a segment in
// which no chunk forgets, and in the second pass the block of the segment before goes on through the next.
//
// With WARPGROUPS four warps multiply by k_in, qg and kg together (wgmma), in the background, and o is computed transposed.
constexpr int STREAMS = 1;                                  // tensors that are fetched beside the workspace: v
constexpr int COLUMNS = SUMMARY ? 2 * HEAD_DIM : HEAD_DIM;  // columns per head: of Z and A, or of o
#include "kda_forgetting.cuh"
#include "kda_solve.cuh"
#include "kda_warp_state.cuh"

// workspaces: [chunks, H] ChunkWorkspace. v, o: [rows, H, D]. amax: [chunks, H] float32, of v.
// entering (may be null, zeros): [N, H, K, V] float32, the state that enters each sequence; its scale depends on it.
// initial_state (may be null, zeros): [N, segments, H, K, V] float32, the state that enters each segment. With optional segments: the
// state that leaves each, and the first is entered by `entering`.
// final_state: [N, H, K, V] float32. scales (may be null): [N, H] float32, those of v.
// states, v_tilde (null where no backward follows): [chunks, H] SavedState, the h of each chunk; [chunks, H] Columns, v~^T.
// With SUMMARY: initial_state, o, states, v_tilde and scales are null; final_state is Z, [N, segments, H, K, V]; transposed and
// transitions (may be null) are A^T and A, [N, segments, H, K, K]. Z and A^T of the last segment may stay unwritten. forgotten:
// [N, H, segments], 1 where A is 0 and not written, else 0; null for float32 inputs. optional: whether the segments are; then the
// second pass reads `forgotten`, and transposed and transitions are null.
// Grid: N x segments x H x SPLITS.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) kda_inter_chunk_fwd(
    const char* workspaces, const Element* v, const float* amax, const float* entering, const float* initial_state, Element* o, float* final_state,
    char* states, char* v_tilde, float* scales, float* transposed, float* transitions, int* forgotten, const int* bounds, int sequences, int length, int heads, int segments, int optional) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  char* shared = reinterpret_cast<char*>(shared_memory);
  const int split = blockIdx.x % SPLITS, head = blockIdx.x / SPLITS % heads, run = blockIdx.x / SPLITS / heads;
  const int n = run / segments, segment = run % segments;
  const Sequence whole = sequence_of(n, sequences, length, bounds);
  Sequence sequence = segment_of(whole, segment, segments);
  int last = segment;  // the last segment that this block goes through
  if (OPTIONAL && optional) {
    const int* of_head = forgotten + (static_cast<long long>(n) * heads + head) * segments;
    if (segment > 0 && of_head[segment - 1] == 0) return;
    while (last < segments - 1 && of_head[last] == 0) ++last;
    const Sequence end = segment_of(whole, last, segments);
    sequence.length = end.start + end.length - sequence.start;
  }
  int chunks = (sequence.length + C - 1) / C;
  const int columns = split * WIDTH, mine = threadIdx.x / 32 * 16;  // the block's first column, and the warp's counted from it
  // No segment follows the last one, so its Z is not needed. Its A is, in the backward.
  if (SUMMARY && segment == segments - 1 && (transitions == nullptr || columns + WIDTH <= D)) return;
  if constexpr (SUMMARY && HALVES) {
    const int first = last_forgetting(shared, chunks, [&](int m) {
      return workspaces + (static_cast<long long>(sequence.first_chunk + m) * heads + head) * ChunkWorkspace::bytes;
    });
    if (split == 0 && threadIdx.x == 0) forgotten[(static_cast<long long>(n) * heads + head) * segments + segment] = first >= 0;
    if (first < 0 && optional) return;
    if (first >= 0) {
      if (columns >= D) return;
      sequence = {sequence.start + first * C, sequence.length - first * C, sequence.first_chunk + first};
      chunks -= first;
    }
  }

  const SharedScale scale = {shared};
  if constexpr (HALVES) scale.find<value_scale>(n, whole, heads, head, amax, entering, scales);

  auto fetch = [&](int m) {
    char* stage = shared + m % STAGES * Stage::bytes;
    fetch_workspace(stage, workspaces + (static_cast<long long>(sequence.first_chunk + m) * heads + head) * ChunkWorkspace::bytes);
    if (columns < D) fetch_values(stage + Stage::values, v, sequence.start + m * C, min(C, sequence.length - m * C), heads, head, columns);
    commit_copies();
  };
  fill_pipeline(chunks, fetch);

  Sum state[STEPS];
  const bool of_transition = SUMMARY && columns + mine >= D;
  const long long state_at = (static_cast<long long>(run) * heads + head) * D * D;
  const float* states_in = initial_state;
  int from = run;
  if (OPTIONAL && optional) {
    states_in = segment > 0 ? initial_state : entering;
    from = segment > 0 ? run - 1 : n;
  }
  if (states_in != nullptr) {
    read_state(state, states_in + (static_cast<long long>(from) * heads + head) * D * D + columns + mine, scale.get());
  } else {
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      clear(state[i]);
      if (of_transition && columns + mine - D == i * 16) unit_diagonal(state[i]);
    }
  }

  for (int m = 0; m < chunks; ++m) {
    advance_pipeline(m, chunks, fetch);
    char* stage = shared + m % STAGES * Stage::bytes;
    const char* workspace = stage + Stage::workspace;
    const char* pairs = workspace + ChunkWorkspace::pairs;
    const float* beta = reinterpret_cast<const float*>(workspace + ChunkWorkspace::beta);
    const long long slot = static_cast<long long>(sequence.first_chunk + m) * heads + head;

    Sum x[BLOCKS];  // -r^T, then -v~^T, then v~^T
#pragma unroll
    for (int t = 0; t < BLOCKS; ++t) {
      clear(x[t]);
      if (of_transition) continue;
      const Block<Element> value = Values::load_transposed(stage + Stage::values, t * 16, mine);
      const float of_one = scale.get();
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const float2 pair = get_pair(value, q);
        x[t].pair[q] = make_float2(-of_one * pair.x, -of_one * pair.y);
      }
    }
    Sum out[BLOCKS];  // [tokens, 16 of V]; transposed with WARPGROUPS
#pragma unroll
    for (int t = 0; t < BLOCKS; ++t) clear(out[t]);
#if WARPGROUPS
    Block<Operand> entry[STEPS];
#pragma unroll
    for (int i = 0; i < STEPS; ++i) entry[i] = round_to<Operand>(state[i]);
    settle(x);
    if (!SUMMARY) settle(out);
    open_products();
    products_over_channels(x, entry, workspace + ChunkWorkspace::k_in);
    close_products();
    if (!SUMMARY) {
      products_over_channels(out, entry, workspace + ChunkWorkspace::qg);
      close_products();
    }
    if constexpr (!SUMMARY) {
      if (states != nullptr) save_state(states + slot * SavedState::bytes, columns + mine, state);
    }
    wait_products<SUMMARY ? 0 : 1>();
    settle(x);
#else
    if constexpr (HALVES && !SUMMARY) {
      if (states != nullptr) save_state(states + slot * SavedState::bytes, columns + mine, state);
    }
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      pace();
      const Block<Operand> entry = round_to<Operand>(state[i]);
      if (!HALVES && !SUMMARY && states != nullptr) write_block<State>(states + slot * SavedState::bytes, columns + mine, i * 16, entry);
#pragma unroll
      for (int t = 0; t < BLOCKS; ++t) product(x[t], entry, Rows::load_right(workspace + ChunkWorkspace::k_in, t * 16, i * 16));
      if constexpr (!SUMMARY) {
#pragma unroll
        for (int t = 0; t < BLOCKS; ++t) product(out[t], Rows::load(workspace + ChunkWorkspace::qg, t * 16, i * 16), as_right(entry));
      }
    }
#endif
    __syncwarp();  // no load moves up past this or past the next: there are no registers for it
    solve(x, pairs, beta);
    __syncwarp();
    Block<Operand> written[BLOCKS];  // v_new^T
#pragma unroll
    for (int t = 0; t < BLOCKS; ++t) {
#pragma unroll
      for (int q = 0; q < 4; ++q) x[t].pair[q] = make_float2(-x[t].pair[q].x, -x[t].pair[q].y);
      if (!WARPGROUPS && !SUMMARY && v_tilde != nullptr)
        write_block<Columns>(v_tilde + slot * Columns::bytes, columns + mine, t * 16, round_to<Operand>(x[t]));
      Sum weighted = x[t];
      scale_columns(weighted, beta + t * 16);
      written[t] = round_to<Operand>(weighted);
    }

    const float* decay = reinterpret_cast<const float*>(workspace + ChunkWorkspace::decay);
#pragma unroll
    for (int i = 0; i < STEPS; ++i) scale_columns(state[i], decay + i * 16);
#if WARPGROUPS
    settle(state);
    open_products();
    products_over_tokens(state, written, workspace + ChunkWorkspace::kg);
    close_products();
    if (!SUMMARY && v_tilde != nullptr) {
#pragma unroll
      for (int t = 0; t < BLOCKS; ++t) write_block<Columns>(v_tilde + slot * Columns::bytes, columns + mine, t * 16, round_to<Operand>(x[t]));
    }
    wait_products<SUMMARY ? 0 : 1>();
    if constexpr (SUMMARY) {
      settle(state);
      continue;
    }
    settle(out);
    add_within_chunk(out, written, pairs);
#else
#pragma unroll
    for (int t = 0; t < BLOCKS; ++t)
#pragma unroll
      for (int i = 0; i < STEPS; ++i) product(state[i], written[t], Rows::load_right_transposed(workspace + ChunkWorkspace::kg, t * 16, i * 16));
    if constexpr (SUMMARY) continue;

#pragma unroll
    for (int j = 0; j < BLOCKS; ++j)
#pragma unroll
      for (int t = j; t < BLOCKS; ++t) {
        Block<Operand> p = Square::load(pairs, t * 16, j * 16);
        if (j == t) keep<Triangle::lower, true>(p);
        product(out[t], p, as_right(written[j]));
      }
#endif
    const int tokens = min(C, sequence.length - m * C);
#pragma unroll
    for (int t = 0; t < BLOCKS; ++t) {
      if constexpr (HALVES) scale_all(out[t], scale.inverse());
#if WARPGROUPS
      Block<Element> rows = round_to<Element>(out[t]);
      rows = {{transpose(rows.word[0]), transpose(rows.word[2]), transpose(rows.word[1]), transpose(rows.word[3])}};
#else
      const Sum& rows = out[t];
#endif
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int token = t * 16 + quadrant_row(q);
        if (token < tokens) {
          const long long row = static_cast<long long>(sequence.start + m * C + token) * heads + head;
          store_quadrant(o + row * D + columns + mine + quadrant_column(q), rows, q);
        }
      }
    }
#if WARPGROUPS
    wait_products<0>();
    settle(state);
#endif
  }
  if (of_transition) {
    if (transposed == nullptr) return;
    write_transposed(state, transposed + state_at + (columns + mine - D) * D);
    if (transitions != nullptr) write_state(state, transitions + state_at + columns + mine - D, 1.f);
  } else if (SUMMARY) {
    write_state(state, final_state + state_at + columns + mine, scale.inverse());
  } else if (last == segments - 1) {
    write_state(state, final_state + (static_cast<long long>(n) * heads + head) * D * D + columns + mine, scale.inverse());
  }
}
