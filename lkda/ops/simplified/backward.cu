// Simplified linear attention, backward, from the states that entered each chunk; scan.cuh has the plan.
//
// With r = 1 / (den + 1e-30), y = num r, and the gradients N, D of the loss by num_t, den_t:
//     dq = do y        N_t = do q r + b_{t+1} N_{t+1}        D_t = -do q r y + b_{t+1} D_{t+1}
//     dv = s N         dk = (v N + D) s (1 - s)              db_t = sum over channels of N_t num_{t-1} + D_t den_{t-1}
// where s = sigmoid(k). What walks from chunk to chunk, last to first, is b_t (N_t, D_t): the gradient of the state before t.
#include "scan.cuh"

constexpr int STAGES = sizeof(Element) == 2 ? 2 : 1;
constexpr int WARPS_A_STRIP = LANES > 32 ? LANES / 32 : 1;
constexpr int LANES_IN_WARP = LANES / WARPS_A_STRIP;

struct Stage {
  unsigned char k[TILE_BYTES], v[TILE_BYTES], q[TILE_BYTES], grad_o[TILE_BYTES];
  State enters[LANES];
  alignas(16) float decays[CHUNK];
  int2 marks[PACKED ? CHUNK : 2];
  Place place;
};

struct Shared {
  Stage stages[STAGES];
  Exchange strips, strips_back;  // the first also carries the summaries from other chunks
  float grad_decays[WARPS_A_STRIP][WARPS_A_STRIP > 1 ? CHUNK : 1];
  Place drawn;
};

static_assert(sizeof(Shared) <= SHARED_BYTES, "cuda.py allots less");

// Sum x[i] over the lanes of a row, for all TOKENS values of i at once; a lane gets the sum for i = lane / (LANES / TOKENS).
__device__ __forceinline__ float sum_over_lanes(float (&x)[TOKENS]) {
  int offset = LANES_IN_WARP / 2;
#pragma unroll
  for (int n = TOKENS / 2; n >= 1; n /= 2, offset /= 2) {
    const bool upper = threadIdx.x & offset;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const float kept = upper ? x[j + n] : x[j], sent = upper ? x[j] : x[j + n];
      x[j] = kept + __shfl_xor_sync(0xffffffffu, sent, offset);
    }
  }
#pragma unroll
  for (; offset >= 1; offset /= 2) x[0] += __shfl_xor_sync(0xffffffffu, x[0], offset);
  return x[0];
}

struct Local {
  float2 y;    // num / (den + 1e-30)
  State grad;  // of the state after the token, by its own output alone
};

__device__ __forceinline__ Local local_gradient(State x, float2 q, float2 grad_o) {
  const float2 r = make_float2(reciprocal(x.z + 1e-30f), reciprocal(x.w + 1e-30f));
  const float2 y = make_float2(x.x * r.x, x.y * r.y);
  const float2 n = make_float2(grad_o.x * q.x * r.x, grad_o.y * q.y * r.y);
  return {y, make_float4(n.x, n.y, -n.x * y.x, -n.y * y.y)};
}

__device__ __forceinline__ State times(float b, State x) { return make_float4(b * x.x, b * x.y, b * x.z, b * x.w); }

extern "C" __global__ void __launch_bounds__(THREADS, PACKED || sizeof(Element) == 4 ? 2 : 3)
    simplified_backward(const Element* q, long long q_batch, long long q_token, long long q_head,
                        const Element* k, long long k_batch, long long k_token, long long k_head,
                        const Element* v, long long v_batch, long long v_token, long long v_head,
                        const float* decay, long long decay_batch, long long decay_token, long long decay_head,
                        const Element* grad_o, long long o_batch, long long o_token, long long o_head,
                        const float* initial, const float* grad_final, const State* entering, const int2* marks,
                        unsigned* workspace, Element* grad_q, Element* grad_k, Element* grad_v, float* grad_decay,
                        float* grad_initial, int batch, int length, int heads) {
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int strip = strip_of_thread(), lane = lane_of_thread();
  const int rows = batch * heads;
  const int chunks = (length + CHUNK - 1) / CHUNK;

  const auto begin_load = [&](Stage& stage) {
    const Place place = shared.drawn;
    if (threadIdx.x == 0) stage.place = place;
    if (place.rank < chunks) {
      const int chunk = chunks - 1 - place.rank, start = chunk * CHUNK;
      const long long n = place.batch, h = place.head;
      const int thread = forgotten_thread();
      load_tile(stage.k, {k + n * k_batch + h * k_head, k_token}, thread, start, length, minus_infinity(Element{}));
      load_tile(stage.v, {v + n * v_batch + h * v_head, v_token}, thread, start, length, 0);
      load_tile(stage.q, {q + n * q_batch + h * q_head, q_token}, thread, start, length, 0);
      load_tile(stage.grad_o, {grad_o + n * o_batch + h * o_head, o_token}, thread, start, length, 0);
      load_decays(stage.decays, decay + n * decay_batch + h * decay_head, decay_token, start, length);
      if (PACKED) load_marks(stage.marks, marks, start, length);
      if (thread < LANES) {
        copy_16_async(stage.enters + thread, entering + (static_cast<long long>(place.row) * chunks + chunk) * LANES + thread);
      }
    }
    commit_copies();
  };

  if (threadIdx.x == 0) shared.drawn = place_of(draw(workspace), batch, heads);
  __syncthreads();
  begin_load(shared.stages[0]);
  if (STAGES == 2) {
    __syncthreads();
    if (threadIdx.x == 0) shared.drawn = place_of(draw(workspace), batch, heads);
  }

  for (int turn = 0;; ++turn) {
    Stage& stage = shared.stages[turn % STAGES];
    wait_copies<0>();
    __syncthreads();  // the chunk is here, and the work on the one before is done
    if (stage.place.rank >= chunks) break;
    if (STAGES == 2) begin_load(shared.stages[(turn + 1) % STAGES]);

    // Forward along the strip from a zero state; then from the state that enters it.
    State states[TOKENS];
    Summary total = walk_strip(stage, initial, heads, states);
    shared.strips.put(total);
    __syncthreads();
    const unsigned item = threadIdx.x == 0 ? draw(workspace) : 0;
    State enters = stage.enters[lane];
#pragma unroll 2
    for (int s = 0; s < strip; ++s) {
      const Summary earlier = shared.strips.get(s);
      enters = through(earlier.decay, enters, earlier.state);
    }
    State carried = enters;
#pragma unroll
    for (int i = 0; i < TOKENS; ++i) {
      if (PACKED && stage.marks[strip * TOKENS + i].x >= 0) carried = ZERO;
      carried = times(stage.decays[strip * TOKENS + i], carried);
      states[i] = through(1.f, carried, states[i]);
    }

    // Backward along the strip from a zero gradient.
    total = {1.f, ZERO};
#pragma unroll
    for (int i = TOKENS - 1; i >= 0; --i) {
      const float b = stage.decays[strip * TOKENS + i];
      if (PACKED) {
        const int ends = stage.marks[strip * TOKENS + i].y;
        if (ends >= 0) total = {0.f, load_state(grad_final, ends * heads + stage.place.head)};
      }
      const Local local = local_gradient(states[i], load_pair(in_tile(stage.q, i)), load_pair(in_tile(stage.grad_o, i)));
      total = {b * total.decay, times(b, through(1.f, total.state, local.grad))};
      if (i % 4 == 0) keep_order();
    }
    shared.strips_back.put(total);
    __syncthreads();

    Summary own = {1.f, ZERO};
    if (strip == STRIPS - 1) {
#pragma unroll 1
      for (int s = STRIPS - 1; s >= 0; --s) own = then(own, shared.strips_back.get(s));
    }
    State back = enter_chunk({workspace, rows, stage.place.row, chunks}, stage.place.rank, own,
                             PACKED ? nullptr : grad_final, stage.place.row, shared.strips);
#pragma unroll 2
    for (int s = STRIPS - 1; s > strip; --s) {
      const Summary later = shared.strips_back.get(s);
      back = through(later.decay, back, later.state);
    }

    // Backward along the strip once more, from the gradient that enters it.
    const Place at = stage.place;
    const int start = (chunks - 1 - at.rank) * CHUNK + strip * TOKENS;
    long long out = ((static_cast<long long>(at.batch) * length + start + TOKENS - 1) * heads + at.head) * HEAD_DIM + 2 * lane;
    float grad_b[TOKENS];
#pragma unroll
    for (int i = TOKENS - 1; i >= 0; --i) {
      const float b = stage.decays[strip * TOKENS + i];
      State before = i > 0 ? states[i > 0 ? i - 1 : 0] : enters;
      int2 mark = make_int2(-1, -1);
      if (PACKED) mark = stage.marks[strip * TOKENS + i];
      if (mark.x >= 0) before = load_state(initial, mark.x * heads + at.head);
      if (mark.y >= 0) back = load_state(grad_final, mark.y * heads + at.head);
      const float2 x = load_pair(in_tile(stage.k, i)), y = load_pair(in_tile(stage.v, i));
      const float2 r = load_pair(in_tile(stage.q, i)), g = load_pair(in_tile(stage.grad_o, i));
      const Local local = local_gradient(states[i], r, g);
      const State grad = through(1.f, back, local.grad);
      const float2 s = make_float2(sigmoid(x.x), sigmoid(x.y));
      if (start + i < length) {
        store_pair(grad_q + out, make_float2(g.x * local.y.x, g.y * local.y.y));
        store_pair(grad_v + out, make_float2(s.x * grad.x, s.y * grad.y));
        store_pair(grad_k + out, make_float2(fmaf(y.x, grad.x, grad.z) * (s.x * (1.f - s.x)),
                                             fmaf(y.y, grad.y, grad.w) * (s.y * (1.f - s.y))));
      }
      grad_b[i] = fmaf(grad.x, before.x, fmaf(grad.y, before.y, fmaf(grad.z, before.z, grad.w * before.w)));
      back = times(b, grad);
      if (mark.x >= 0) store_state(grad_initial, mark.x * heads + at.head, back);
      if (!PACKED && i == 0 && strip == 0 && at.rank == chunks - 1) store_state(grad_initial, at.row, back);
      out -= heads * HEAD_DIM;
      if (i % 2 == 0) keep_order();
    }

    // The gradients of the strip's decays, summed over its channels.
    float sum = sum_over_lanes(grad_b);
    constexpr int SHARED_BY = LANES_IN_WARP / TOKENS;
    const int token = lane % LANES_IN_WARP / SHARED_BY;
    if (WARPS_A_STRIP > 1) {
      if (lane % SHARED_BY == 0) shared.grad_decays[lane / LANES_IN_WARP][strip * TOKENS + token] = sum;
      __syncthreads();
      sum = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS_A_STRIP; ++w) sum += shared.grad_decays[w][strip * TOKENS + token];
    }
    if (lane < LANES_IN_WARP && lane % SHARED_BY == 0 && start + token < length) {
      grad_decay[(static_cast<long long>(at.batch) * length + start + token) * heads + at.head] = sum;
    }
    if (threadIdx.x == 0) shared.drawn = place_of(item, batch, heads);
    if (STAGES == 1) {
      __syncthreads();
      begin_load(shared.stages[0]);
    }
  }
}
