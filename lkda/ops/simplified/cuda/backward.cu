// Simplified linear attention, backward, from the states that enter the chunks. scan.cuh explains how the work is divided.
//
// With r = 1 / (den + 1e-30), y = num r, and the gradients N, D of the loss by num_t, den_t:
//     dq = do y        N_t = do q r + b_{t+1} N_{t+1}        D_t = -do q r y + b_{t+1} D_{t+1}
//     dv = s N         dk = (v N + D) s (1 - s)              db_t = sum over channels of N_t num_{t-1} + D_t den_{t-1}
// where s = sigmoid(k). From the last chunk to the first, b_t (N_t, D_t) is carried: the gradient of the state before token t.
#include "scan.cuh"

constexpr int WARPS_A_STRIP = LANES > 32 ? LANES / 32 : 1;
constexpr int LANES_IN_WARP = LANES / WARPS_A_STRIP;

struct Item {
  Place place;
  const Element *k, *v, *q, *grad_o;
  const float* decay;
};

struct Stage {
  unsigned char k[TILE_BYTES], v[TILE_BYTES], q[TILE_BYTES], grad_o[TILE_BYTES];
  State enters[LANES];
  alignas(16) float decays[CHUNK];
  alignas(16) int marks[PACKED ? CHUNK : 4];
  Place place;
};

struct Shared {
  Stage stages[STAGES];
  union {
    Exchange<false> strips, partial;
  };
  Exchange<true> strips_back[2];
  float grad_decays[WARPS_A_STRIP][WARPS_A_STRIP > 1 ? CHUNK : 1];
  Item drawn;
};

static_assert(sizeof(Shared) <= SHARED_BYTES, "core.py allots less");

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
  State grad;  // gradient of the state after the token, through the token's own output alone
};

__device__ __forceinline__ Local local_gradient(State x, float2 q, float2 grad_o) {
  const float2 r = make_float2(reciprocal(x.z + 1e-30f), reciprocal(x.w + 1e-30f));
  const float2 y = make_float2(x.x * r.x, x.y * r.y);
  const float2 n = make_float2(grad_o.x * q.x * r.x, grad_o.y * q.y * r.y);
  return {y, make_float4(n.x, n.y, -n.x * y.x, -n.y * y.y)};
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    simplified_backward(Tensor<Element> q, Tensor<Element> k, Tensor<Element> v, Tensor<float> decay,
                        Tensor<Element> grad_o, const float* initial, const float* grad_final, const State* entering,
                        const int* marks, unsigned* workspace, Element* grad_q, Element* grad_k, Element* grad_v,
                        float* grad_decay, float* grad_initial, int batch, int length, int heads) {
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int strip = strip_of_thread(), lane = lane_of_thread();
  const int rows = batch * heads;
  const int chunks = (length + CHUNK - 1) / CHUNK;

  const auto item_of = [&](unsigned number) {
    const Place place = place_of(number, batch, heads);
    return Item{place, k.at(place), v.at(place), q.at(place), grad_o.at(place), decay.at(place)};
  };

  const auto begin_load = [&](Stage& stage) {
    const Item& item = shared.drawn;
    const int chunk = chunks - 1 - item.place.rank, start = chunk * CHUNK;
    if (threadIdx.x == 0) stage.place = item.place;
    if (chunk >= 0) {
      load_tile(stage.k, item.k, k.token, start, length, minus_infinity(Element{}));
      load_tile(stage.v, item.v, v.token, start, length, 0);
      load_tile(stage.q, item.q, q.token, start, length, 0);
      load_tile(stage.grad_o, item.grad_o, grad_o.token, start, length, 0);
      load_words(stage.decays, item.decay, decay.token, start, length, ONE);
      if (PACKED) load_words(stage.marks, marks, 1, start, length, 0);
      if (threadIdx.x < LANES) {
        const State* from = entering + static_cast<unsigned>(item.place.row * chunks + chunk) * LANES;
        copy_16_async(stage.enters + threadIdx.x, from + threadIdx.x);
      }
    }
    commit_copies();
  };

  if (threadIdx.x == 0) shared.drawn = item_of(draw(workspace));
  __syncthreads();
  begin_load(shared.stages[0]);
  if (STAGES == 3) {
    __syncthreads();
    if (threadIdx.x == 0) shared.drawn = item_of(draw(workspace));
  }

  State entered = ZERO;  // the state that enters this thread's strip of the current chunk
  for (int iteration = 0;; ++iteration) {
    const Stage& ahead = shared.stages[iteration % STAGES];
    const Stage& stage = shared.stages[(iteration + STAGES - 1) % STAGES];
    Exchange<true>& back_ahead = shared.strips_back[iteration % 2];
    const Exchange<true>& back = shared.strips_back[(iteration + 1) % 2];
    wait_copies<0>();
    __syncthreads();  // the next chunk has arrived, and the outputs of the iteration before are written
    const bool more = ahead.place.rank < chunks;
    if (iteration > 0 && stage.place.rank >= chunks) break;
    if (STAGES == 3) begin_load(shared.stages[(iteration + 1) % STAGES]);
    PendingSummaries pending;
    if (iteration > 0) pending = load_summaries({workspace, rows, stage.place.row, chunks}, stage.place.rank);

    // The next chunk: twice along the strip, from a zero state and from the state that enters it. On the way from a token back to
    // the strip's first token, a gradient is multiplied by the decays between them.
    State enters = ZERO;
    float2 weights[TOKENS];
    if (more) {
      const auto keep = [&](int i, float2 s, State) { weights[i] = s; };
      Product through_strip;
      const State leaves = walk_strip(ahead, initial, heads, ZERO, through_strip, keep);
      shared.strips.put({through_strip, leaves});
    }
    __syncthreads();
    if (more) {
      enters = shared.strips.entering_strip(ahead.enters[lane]);
      State x = enters;
      State back = ZERO;
      Product decay;
      float4 decays;
#pragma unroll
      for (int i = 0; i < TOKENS; ++i) {
        const Mark mark = mark_of(ahead, i);
        if (mark.begins()) x = load_state(initial, mark.sequence() * heads + ahead.place.head);
        if (i % 4 == 0) decays = decays_of(ahead, i);
        const float b = pick(decays, i % 4);
        x = through(b, x, written(ahead, i, weights[i]));
        const Local local = local_gradient(x, load_pair(in_tile(ahead.q, i)), load_pair(in_tile(ahead.grad_o, i)));
        decay.by(b);
        back = through(decay.value, local.grad, back);
        if (mark.ends()) {
          const State after = load_state(grad_final, mark.sequence() * heads + ahead.place.head);
          back = through(decay.value, after, back);
          decay = {0.f, 0.f};
        }
      }
      decay.settle();
      back_ahead.put({decay, back});
    }
    __syncthreads();
    const unsigned number = threadIdx.x == 0 ? draw(workspace) : 0;
    if (more && strip == STRIPS - 1) {
      Published(workspace, rows, ahead.place.row, chunks).write(ahead.place.rank, back_ahead.all());
    }

    // The current chunk: forward along the strip, then back from the gradient that enters.
    if (iteration > 0) {
      const Place at = stage.place;
      State grad = enter_chunk({workspace, rows, at.row, chunks}, at.rank, pending, [&] { return back.all(); },
                               PACKED ? nullptr : grad_final, at.row, shared.partial);
      grad = back.entering_strip(grad);
      State states[TOKENS];
      const auto keep = [&](int i, float2 s, State x) {
        weights[i] = s;
        states[i] = x;
      };
      Product unused;
      walk_strip(stage, initial, heads, entered, unused, keep);
      __syncwarp();  // without this ptxas holds everything it has read of the strip in registers, and spills
      const int start = (chunks - 1 - at.rank) * CHUNK + strip * TOKENS;
      const long long token = (static_cast<long long>(at.batch) * length + start) * heads + at.head;
      const long long first = token * HEAD_DIM + 2 * lane;
      const int step = heads * ROW_BYTES;
      float grad_b[TOKENS];
      float4 decays;
#pragma unroll
      for (int i = TOKENS - 1; i >= 0; --i) {
        if (i % 4 == 3) decays = decays_of(stage, i - 3);
        const Mark mark = mark_of(stage, i);
        State before = i > 0 ? states[i > 0 ? i - 1 : 0] : entered;
        if (mark.begins()) before = load_state(initial, mark.sequence() * heads + at.head);
        if (mark.ends()) grad = load_state(grad_final, mark.sequence() * heads + at.head);
        const float2 s = weights[i], y = load_pair(in_tile(stage.v, i));
        const float2 r = load_pair(in_tile(stage.q, i)), g = load_pair(in_tile(stage.grad_o, i));
        const Local local = local_gradient(states[i], r, g);
        grad = through(1.f, grad, local.grad);
        const bool inside = i < length - start;
        stream_pair_if(inside, further(grad_q + first, i, step), make_float2(g.x * local.y.x, g.y * local.y.y));
        stream_pair_if(inside, further(grad_v + first, i, step), make_float2(s.x * grad.x, s.y * grad.y));
        stream_pair_if(inside, further(grad_k + first, i, step),
                       make_float2(fmaf(y.x, grad.x, grad.z) * (s.x * (1.f - s.x)),
                                   fmaf(y.y, grad.y, grad.w) * (s.y * (1.f - s.y))));
        grad_b[i] = fmaf(grad.x, before.x, fmaf(grad.y, before.y, fmaf(grad.z, before.z, grad.w * before.w)));
        grad = times(pick(decays, i % 4), grad);
        if (mark.begins()) store_state(grad_initial, mark.sequence() * heads + at.head, grad);
      }
      if (!PACKED && strip == 0 && at.rank == chunks - 1) store_state(grad_initial, at.row, grad);

      // The gradients of the strip's decays, summed over its channels.
      float sum = sum_over_lanes(grad_b);
      constexpr int SHARED_BY = LANES_IN_WARP / TOKENS;
      const int i = lane % LANES_IN_WARP / SHARED_BY;
      if (WARPS_A_STRIP > 1) {
        if (lane % SHARED_BY == 0) shared.grad_decays[lane / LANES_IN_WARP][strip * TOKENS + i] = sum;
        __syncthreads();
        sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS_A_STRIP; ++w) sum += shared.grad_decays[w][strip * TOKENS + i];
      }
      if (lane < LANES_IN_WARP && lane % SHARED_BY == 0 && i < length - start) {
        grad_decay[token + static_cast<long long>(i) * heads] = sum;
      }
    }
    entered = enters;
    if (threadIdx.x == 0) shared.drawn = item_of(number);
    if (STAGES == 2) {
      __syncthreads();
      begin_load(shared.stages[(iteration + 1) % STAGES]);
    }
  }
}
