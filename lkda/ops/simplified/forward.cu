// Simplified linear attention, forward: every tensor crosses memory once. scan.cuh has the plan.
//
//     num_t = b_t num_{t-1} + sigmoid(k_t) v_t,   den_t = b_t den_{t-1} + sigmoid(k_t),   o_t = q_t num_t / (den_t + 1e-30)
//
// A block draws a chunk, copies it to shared memory (while it works on the one before), walks its strips from a zero state,
// combines them, learns the state that enters the chunk, adds its share to the states kept in registers, and writes o.
#include "scan.cuh"

constexpr int STAGES = sizeof(Element) == 2 ? 2 : 1;

struct Stage {
  unsigned char k[TILE_BYTES], v[TILE_BYTES], q[TILE_BYTES];
  alignas(16) float decays[CHUNK];
  int2 marks[PACKED ? CHUNK : 2];
  Place place;
};

struct Shared {
  Stage stages[STAGES];
  Exchange strips;
  Place drawn;
};

static_assert(sizeof(Shared) <= SHARED_BYTES, "cuda.py allots less");
static_assert(sizeof(Exchange) <= sizeof(Stage::k) + sizeof(Stage::v), "partial summaries lie over k and v");

extern "C" __global__ void __launch_bounds__(THREADS, PACKED || sizeof(Element) == 4 ? 3 : 4)
    simplified_forward(const Element* q, long long q_batch, long long q_token, long long q_head,
                       const Element* k, long long k_batch, long long k_token, long long k_head,
                       const Element* v, long long v_batch, long long v_token, long long v_head,
                       const float* decay, long long decay_batch, long long decay_token, long long decay_head,
                       const float* initial, const int2* marks, unsigned* workspace,
                       Element* o, float* final, State* entering, int batch, int length, int heads) {
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int strip = strip_of_thread(), lane = lane_of_thread();
  const int rows = batch * heads;
  const int chunks = (length + CHUNK - 1) / CHUNK;

  const auto begin_load = [&](Stage& stage) {
    const Place place = shared.drawn;
    if (threadIdx.x == 0) stage.place = place;
    if (place.rank < chunks) {
      const int start = place.rank * CHUNK;
      const long long n = place.batch, h = place.head;
      const int thread = forgotten_thread();
      load_tile(stage.k, {k + n * k_batch + h * k_head, k_token}, thread, start, length, minus_infinity(Element{}));
      load_tile(stage.v, {v + n * v_batch + h * v_head, v_token}, thread, start, length, 0);
      load_tile(stage.q, {q + n * q_batch + h * q_head, q_token}, thread, start, length, 0);
      load_decays(stage.decays, decay + n * decay_batch + h * decay_head, decay_token, start, length);
      if (PACKED) load_marks(stage.marks, marks, start, length);
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

    // The strip from a zero state.
    State states[TOKENS];
    shared.strips.put(walk_strip(stage, initial, heads, states));
    __syncthreads();
    const unsigned item = threadIdx.x == 0 ? draw(workspace) : 0;

    Summary own = {1.f, ZERO};
    if (strip == STRIPS - 1) {
#pragma unroll 1
      for (int s = 0; s < STRIPS; ++s) own = then(own, shared.strips.get(s));
    }
    const State enters = enter_chunk({workspace, rows, stage.place.row, chunks}, stage.place.rank, own,
                                     PACKED ? nullptr : initial, stage.place.row, *reinterpret_cast<Exchange*>(stage.k));
    const Place at = stage.place;
    if (entering != nullptr && strip == 0) entering[(static_cast<long long>(at.row) * chunks + at.rank) * LANES + lane] = enters;

    // The share of the state that enters, token by token.
    State carried = enters;
#pragma unroll 2
    for (int s = 0; s < strip; ++s) {
      const Summary earlier = shared.strips.get(s);
      carried = through(earlier.decay, carried, earlier.state);
    }
    const int start = at.rank * CHUNK + strip * TOKENS;
    Element* out = o + ((static_cast<long long>(at.batch) * length + start) * heads + at.head) * HEAD_DIM + 2 * lane;
#pragma unroll
    for (int i = 0; i < TOKENS; ++i) {
      const float b = stage.decays[strip * TOKENS + i];
      int2 mark = make_int2(-1, -1);
      if (PACKED) mark = stage.marks[strip * TOKENS + i];
      if (mark.x >= 0) carried = ZERO;
      carried = make_float4(b * carried.x, b * carried.y, b * carried.z, b * carried.w);
      const State x = through(1.f, carried, states[i]);
      const float2 r = load_pair(in_tile(stage.q, i));
      const float2 y = make_float2(r.x * (x.x * reciprocal(x.z + 1e-30f)), r.y * (x.y * reciprocal(x.w + 1e-30f)));
      if (start + i < length) store_pair(out, y);
      if (mark.y >= 0) store_state(final, mark.y * heads + at.head, x);
      // Tokens past the end change nothing, so the last one's state is the final state.
      if (!PACKED && i == TOKENS - 1 && at.rank == chunks - 1 && strip == STRIPS - 1) store_state(final, at.row, x);
      out += heads * HEAD_DIM;
      if (i % 4 == 3) keep_order();
    }
    if (threadIdx.x == 0) shared.drawn = place_of(item, batch, heads);
    if (STAGES == 1) {
      __syncthreads();
      begin_load(shared.stages[0]);
    }
  }
}
