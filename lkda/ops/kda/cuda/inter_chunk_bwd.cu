// Backward from chunk to chunk, from the last to the first: the gradient of the state. Laid out as inter_chunk_fwd.cu. dh' is the
// gradient of the state that leaves the chunk, dh that of the state that enters it.
//
//   dv_new = Aqk^T do + kg dh'     Y = dv_new + T~^T (B dv_new)     dh = exp(G_C) dh' + qg^T do - k_in^T (B Y)
//
// where qg and Aqk include the attention scale. Y is the gradient of B r. With SUMMARY the kernel computes for each segment the
// gradient that it passes on when it receives zeros. It starts at the chunk nearest to the segment's start that forgets its state, if
// one does: then the result does not depend on the later chunks, nor on what the segment receives.
constexpr int STREAMS = SUMMARY ? 1 : 2;  // tensors that are fetched beside the workspace: do and v
constexpr int COLUMNS = HEAD_DIM;
#include "kda_forgetting.cuh"
#include "kda_warp_state.cuh"

// Writes parts[C]: factor * (Y_i . v_i) over a warp's 16 columns of V, in float32. intra_chunk_bwd.cu adds the rest of dbeta.
__device__ __forceinline__ void beta_part(float* parts, const Sum (&y)[BLOCKS], const char* values, int mine, float factor) {
  float sum[4 * BLOCKS];  // sum[2 i + {0, 1}] belongs to token 8 i + lane_column() + {0, 1}
#pragma unroll
  for (int t = 0; t < BLOCKS; ++t) {
    pace();
    const Block<Element> v = Values::load_transposed(values, t * 16, recomputed(mine));
#pragma unroll
    for (int q = 0; q < 4; q += 2) {
      const float2 top = get_pair(v, q), bottom = get_pair(v, q + 1);
      sum[4 * t + q] = y[t].pair[q].x * top.x + y[t].pair[q + 1].x * bottom.x;
      sum[4 * t + q + 1] = y[t].pair[q].y * top.y + y[t].pair[q + 1].y * bottom.y;
    }
  }
  int count = 4 * BLOCKS;  // sum over the eight rows: each step halves the sums that a lane has, down to a pair
#pragma unroll
  for (int step = 16; step >= 4; step /= 2) {
    if (count > 2) {
      count /= 2;
      const bool upper = lane_id() & step;
#pragma unroll
      for (int i = 0; i < 2 * BLOCKS; ++i)
        if (i < count) sum[i] = (upper ? sum[i + count] : sum[i]) + __shfl_xor_sync(0xffffffffu, upper ? sum[i] : sum[i + count], step);
    } else {
      sum[0] += __shfl_xor_sync(0xffffffffu, sum[0], step);
      sum[1] += __shfl_xor_sync(0xffffffffu, sum[1], step);
    }
  }
  *reinterpret_cast<float2*>(parts + lane_row() * (2 * BLOCKS) / 8 * 8 + lane_column()) = make_float2(factor * sum[0], factor * sum[1]);
}

// workspaces: [chunks, H] ChunkWorkspace. v, d_o: [rows, H, D]. amax: [chunks, H] float32, of do.
// leaving (may be null, zeros): [N, H, K, V] float32, the gradient of each sequence's last state; the scale depends on it.
// d_final (may be null, zeros): [N, segments, H, K, V] float32, the gradient of the state that leaves each segment. With optional
// segments: of the state that enters each, and the last one receives `leaving`.
// d_initial (may be null): [N, H, K, V] float32. scales: [N, H] float32, those of do. d_states: [chunks, H] SavedState, dh'^T.
// d_residual: [chunks, H] Columns, Y^T. beta_parts: [chunks, H, D / 16, C] float32, Y . v over 16 columns of V.
// With SUMMARY: the last three, scales and d_final are null, and d_initial is [N, segments, H, K, V]. forgotten and
// optional: as in inter_chunk_fwd.cu.
// Grid: N x segments x H x SPLITS.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) kda_inter_chunk_bwd(
    const char* workspaces, const Element* v, const Element* d_o, const float* amax, const float* leaving, const float* d_final, float* d_initial,
    char* d_states, char* d_residual, float* scales, float* beta_parts, int* forgotten, const int* bounds, int sequences, int length, int heads, int segments, int optional) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  char* shared = reinterpret_cast<char*>(shared_memory);
  const int split = blockIdx.x % SPLITS, head = blockIdx.x / SPLITS % heads, run = blockIdx.x / SPLITS / heads;
  const int n = run / segments, segment = run % segments;
  const Sequence whole = sequence_of(n, sequences, length, bounds);
  Sequence sequence = segment_of(whole, segment, segments);
  int first_segment = segment;  // the first segment that this block goes through
  if (OPTIONAL && optional) {
    const int* of_head = forgotten + (static_cast<long long>(n) * heads + head) * segments;
    if (segment < segments - 1 && of_head[segment + 1] == 0) return;
    while (first_segment > 0 && of_head[first_segment] == 0) --first_segment;
    const Sequence begin = segment_of(whole, first_segment, segments);
    sequence = {begin.start, sequence.start + sequence.length - begin.start, begin.first_chunk};
  }
  int chunks = (sequence.length + C - 1) / C;
  const int columns = split * WIDTH, mine = threadIdx.x / 32 * 16;  // the block's first column, and the warp's counted from it
  if (SUMMARY && segment == 0) return;  // no segment precedes it
  if constexpr (SUMMARY && HALVES) {
    const int first = last_forgetting(shared, chunks, [&](int step) {
      return workspaces + (static_cast<long long>(sequence.first_chunk + chunks - 1 - step) * heads + head) * ChunkWorkspace::bytes;
    });
    if (split == 0 && threadIdx.x == 0) forgotten[(static_cast<long long>(n) * heads + head) * segments + segment] = first >= 0;
    if (first < 0 && optional) return;
    if (first >= 0) {
      chunks -= first;
      sequence.length = min(sequence.length, chunks * C);
    }
  }

  auto fetch = [&](int step) {  // step 0 is the last chunk
    const int m = chunks - 1 - step;
    const long long slot = static_cast<long long>(sequence.first_chunk + m) * heads + head;
    char* stage = shared + step % STAGES * Stage::bytes;
    const int start = sequence.start + m * C, tokens = min(C, sequence.length - m * C);
    fetch_workspace(stage, workspaces + slot * ChunkWorkspace::bytes);
    fetch_values(stage + Stage::values, d_o, start, tokens, heads, head, columns);
    if (!SUMMARY) fetch_values(stage + Stage::values + Values::bytes, v, start, tokens, heads, head, columns);
    commit_copies();
  };
  fill_pipeline(chunks, fetch);

  const SharedScale scale = {shared};
  if constexpr (HALVES) scale.find<gradient_scale>(n, whole, heads, head, amax, leaving, scales);

  Sum state[STEPS];  // dh'^T, then dh^T
  const float* states_in = d_final;
  int from = run;
  if (OPTIONAL && optional) {
    states_in = segment < segments - 1 ? d_final : leaving;
    from = segment < segments - 1 ? run + 1 : n;
  }
  if (states_in != nullptr) {
    read_state(state, states_in + (static_cast<long long>(from) * heads + head) * D * D + columns + mine, scale.get());
  } else {
#pragma unroll
    for (int i = 0; i < STEPS; ++i) clear(state[i]);
  }

  for (int step = 0; step < chunks; ++step) {
    advance_pipeline(step, chunks, fetch);
    char* stage = shared + opaque(step % STAGES * Stage::bytes);
    const char* workspace = stage + Stage::workspace;
    const char* pairs = workspace + ChunkWorkspace::pairs;
    const float* beta = reinterpret_cast<const float*>(workspace + ChunkWorkspace::beta);
    const long long slot = static_cast<long long>(opaque(sequence.first_chunk + chunks - 1) - step) * heads + head;

    auto d_out = [&](int t) {  // do^T
      const Block<Element> values = Values::load_transposed(stage + Stage::values, t * 16, mine);
      if constexpr (!HALVES) return convert<Operand>(values);
      Sum y;
#pragma unroll
      for (int q = 0; q < 4; ++q) y.pair[q] = get_pair(values, q);
      scale_all(y, scale.get());
      return round_to<Operand>(y);
    };

    const float* decay = reinterpret_cast<const float*>(workspace + ChunkWorkspace::decay);
#if WARPGROUPS
    Block<Operand> entry[STEPS], out[BLOCKS];
#pragma unroll
    for (int i = 0; i < STEPS; ++i) entry[i] = round_to<Operand>(state[i]);
    Sum x[BLOCKS], from_state[BLOCKS];  // dv_new^T, then Y^T
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j) {
      out[j] = d_out(j);
      clear(x[j]);
      clear(from_state[j]);
    }
    settle(from_state);
    open_products();
    products_over_channels(from_state, entry, workspace + ChunkWorkspace::kg);
    close_products();
    if constexpr (!SUMMARY) save_state(d_states + slot * SavedState::bytes, columns + mine, state);
#pragma unroll
    for (int i = 0; i < STEPS; ++i) scale_columns(state[i], decay + i * 16);
    settle(state);
    open_products();
    products_over_tokens(state, out, workspace + ChunkWorkspace::qg);
    close_products();
#pragma unroll
    for (int i = 0; i < BLOCKS; ++i)
#pragma unroll
      for (int j = 0; j <= i; ++j) {
        Right<Operand> p = Square::load_right_transposed(pairs, i * 16, j * 16);
        if (i == j) keep<Triangle::upper, true>(p);
        product(x[j], out[i], p);
      }
    wait_products<1>();
    settle(from_state);
    Block<Operand> weighted[BLOCKS];  // dv_new^T B, then -dr^T = -Y^T B
#pragma unroll
    for (int i = 0; i < BLOCKS; ++i) {
#pragma unroll
      for (int q = 0; q < 4; ++q) x[i].pair[q] = make_float2(x[i].pair[q].x + from_state[i].pair[q].x, x[i].pair[q].y + from_state[i].pair[q].y);
      Sum y = x[i];
      scale_columns(y, beta + i * 16);
      weighted[i] = round_to<Operand>(y);
    }
#pragma unroll
    for (int i = 0; i < BLOCKS; ++i)
#pragma unroll
      for (int j = 0; j <= i; ++j) {
        Right<Operand> t = Square::load_right(pairs, j * 16, i * 16);
        if (i == j) keep<Triangle::upper, false>(t);
        product(x[j], weighted[i], t);
      }
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j) {
      Sum y = x[j];
      scale_columns(y, beta + j * 16);
#pragma unroll
      for (int q = 0; q < 4; ++q) y.pair[q] = make_float2(-y.pair[q].x, -y.pair[q].y);
      weighted[j] = round_to<Operand>(y);
    }
    open_products();
    products_over_tokens(state, weighted, workspace + ChunkWorkspace::k_in);
    close_products();
    if constexpr (!SUMMARY) {
      beta_part(beta_parts + (slot * STEPS + (columns + mine) / 16) * C, x, stage + Stage::values + Values::bytes, mine, scale.inverse());
#pragma unroll
      for (int j = 0; j < BLOCKS; ++j) write_block<Columns>(d_residual + slot * Columns::bytes, columns + mine, j * 16, round_to<Operand>(x[j]));
    }
    wait_products<0>();
    settle(state);
#else
    if constexpr (HALVES && !SUMMARY) save_state(d_states + slot * SavedState::bytes, columns + mine, state);
    Sum x[BLOCKS];  // dv_new^T, then Y^T
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j) clear(x[j]);
#pragma unroll
    for (int i = 0; i < BLOCKS; ++i) {
      pace();
      if (D == 128) __syncwarp();  // registers are short
      const Block<Operand> out = d_out(i);
#pragma unroll
      for (int j = 0; j <= i; ++j) {
        pace();
        Right<Operand> p = Square::load_right_transposed(pairs, i * 16, j * 16);
        if (i == j) keep<Triangle::upper, true>(p);
        product(x[j], out, p);
      }
    }
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      pace();
      const Block<Operand> entry = round_to<Operand>(state[i]);
      if (!HALVES && !SUMMARY) write_block<State>(d_states + slot * SavedState::bytes, recomputed(columns + mine), i * 16, entry);
#pragma unroll
      for (int j = 0; j < BLOCKS; ++j) {
        pace();
        product(x[j], entry, Rows::load_right(workspace + ChunkWorkspace::kg, j * 16, i * 16));
      }
    }
    Block<Operand> weighted[BLOCKS];  // dv_new^T B, then -dr^T = -Y^T B
#pragma unroll
    for (int i = 0; i < BLOCKS; ++i) {
      Sum y = x[i];
      scale_columns(y, beta + i * 16);
      weighted[i] = round_to<Operand>(y);
    }
#pragma unroll
    for (int i = 0; i < BLOCKS; ++i)
#pragma unroll
      for (int j = 0; j <= i; ++j) {
        pace();
        Right<Operand> t = Square::load_right(pairs, j * 16, i * 16);
        if (i == j) keep<Triangle::upper, false>(t);
        product(x[j], weighted[i], t);
      }
    pace();
    if constexpr (!SUMMARY) beta_part(beta_parts + (slot * STEPS + (columns + mine) / 16) * C, x, stage + Stage::values + Values::bytes, mine, scale.inverse());
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j) {
      if (!SUMMARY) write_block<Columns>(d_residual + slot * Columns::bytes, opaque(columns + mine), j * 16, round_to<Operand>(x[j]));
      scale_columns(x[j], beta + j * 16);
#pragma unroll
      for (int q = 0; q < 4; ++q) x[j].pair[q] = make_float2(-x[j].pair[q].x, -x[j].pair[q].y);
      weighted[j] = round_to<Operand>(x[j]);
    }

#pragma unroll
    for (int i = 0; i < STEPS; ++i) scale_columns(state[i], decay + i * 16);
#pragma unroll
    for (int t = 0; t < BLOCKS; ++t) {
      const Block<Operand> out = d_out(t);
#pragma unroll
      for (int i = 0; i < STEPS; ++i) {
        pace();
        product(state[i], out, Rows::load_right_transposed(workspace + ChunkWorkspace::qg, t * 16, i * 16));
      }
#pragma unroll
      for (int i = 0; i < STEPS; ++i) {
        pace();
        product(state[i], weighted[t], Rows::load_right_transposed(workspace + ChunkWorkspace::k_in, t * 16, i * 16));
      }
    }
#endif
  }
  if (SUMMARY) {
    write_state(state, d_initial + (static_cast<long long>(recomputed(run)) * heads + recomputed(head)) * D * D + columns + mine, scale.inverse());
  } else if (first_segment == 0 && d_initial != nullptr) {
    write_state(state, d_initial + (static_cast<long long>(n) * heads + head) * D * D + columns + mine, scale.inverse());
  }
}
