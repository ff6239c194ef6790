// Simplified linear attention, forward. Each tensor is read or written once. scan.cuh explains how the work is divided.
//
//     num_t = b_t num_{t-1} + sigmoid(k_t) v_t,   den_t = b_t den_{t-1} + sigmoid(k_t),   o_t = q_t num_t / (den_t + 1e-30)
//
// k and v are copied to shared memory and gone through twice: from a zero state for the summary, then from the state that enters, for
// the outputs. q is loaded directly into the registers of the thread that needs it.
#include "scan.cuh"

// The backward has twice as many tensors in shared memory, so its chunks are half as long.
constexpr int BACKWARD_CHUNK = CHUNK / 2;

struct Item {
  Place place;
  const Element *k, *v, *q;
  const float* decay;
};

struct Stage {
  unsigned char k[TILE_BYTES], v[TILE_BYTES];
  alignas(16) float decays[CHUNK];
  alignas(16) int marks[PACKED ? CHUNK : 4];
  Place place;
  const Element* q;
};

struct Shared {
  Stage stages[STAGES];
  Exchange<false> strips[2], partial;
  Item drawn;
};

static_assert(sizeof(Shared) <= SHARED_BYTES, "core.py allots less");

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    simplified_forward(Tensor<Element> q, Tensor<Element> k, Tensor<Element> v, Tensor<float> decay, const float* initial,
                       const int* marks, unsigned* workspace, Element* o, float* final, State* entering, int batch,
                       int length, int heads) {
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int strip = strip_of_thread(), lane = lane_of_thread();
  const int rows = batch * heads;
  const int chunks = (length + CHUNK - 1) / CHUNK;

  const auto item_of = [&](unsigned number) {
    const Place place = place_of(number, batch, heads);
    return Item{place, k.at(place), v.at(place), q.at(place), decay.at(place)};
  };

  const auto begin_load = [&](Stage& stage) {
    const Item& item = shared.drawn;
    const int rank = item.place.rank, start = rank * CHUNK;
    if (threadIdx.x == 0) {
      stage.place = item.place;
      stage.q = item.q;
    }
    if (rank < chunks) {
      load_tile(stage.k, item.k, k.token, start, length, minus_infinity(Element{}));
      load_tile(stage.v, item.v, v.token, start, length, 0);
      load_words(stage.decays, item.decay, decay.token, start, length, ONE);
      if (PACKED) load_words(stage.marks, marks, 1, start, length, 0);
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

  for (int iteration = 0;; ++iteration) {
    const Stage& ahead = shared.stages[iteration % STAGES];
    const Stage& stage = shared.stages[(iteration + STAGES - 1) % STAGES];
    Exchange<false>& strips_ahead = shared.strips[iteration % 2];
    const Exchange<false>& strips = shared.strips[(iteration + 1) % 2];
    wait_copies<0>();
    __syncthreads();  // the next chunk has arrived, and the outputs of the iteration before are written
    const bool more = ahead.place.rank < chunks;
    const Place at = iteration > 0 ? stage.place : Place{0, 0, 0, 0};
    if (at.rank >= chunks) break;
    if (STAGES == 3) begin_load(shared.stages[(iteration + 1) % STAGES]);

    // Start loading what the outputs need.
    const int start = at.rank * CHUNK + strip * TOKENS;
    Pair<Element> query[TOKENS];
    if (iteration > 0) {
      const int bytes = q.token * static_cast<int>(sizeof(Element));
      const Element* from = further(stage.q, start, bytes) + 2 * lane;
#pragma unroll
      for (int i = 0; i < TOKENS; ++i) {
        if (i < length - start) query[i] = __ldcs(reinterpret_cast<const Pair<Element>*>(further(from, i, bytes)));
      }
    }
    const Published published(workspace, rows, at.row, chunks);
    PendingSummaries pending = load_summaries(published, at.rank);

    // The summary of the next chunk.
    if (more) {
      Product through_strip;
      const State leaves = walk_strip(ahead, initial, heads, ZERO, through_strip, [](int, float2, State) {});
      strips_ahead.put({through_strip, leaves});
    }
    __syncthreads();
    const unsigned number = threadIdx.x == 0 ? draw(workspace) : 0;
    if (more && strip == STRIPS - 1) {
      Published(workspace, rows, ahead.place.row, chunks).write(ahead.place.rank, strips_ahead.all());
    }

    if (iteration > 0) {
      const State enters = enter_chunk(published, at.rank, pending, [&] { return strips.all(); }, PACKED ? nullptr : initial,
                                       at.row, shared.partial);
      const State x = strips.entering_strip(enters);
      if (entering != nullptr && strip * TOKENS % BACKWARD_CHUNK == 0 && start < length) {
        const int count = (length + BACKWARD_CHUNK - 1) / BACKWARD_CHUNK;
        entering[(static_cast<long long>(at.row) * count + start / BACKWARD_CHUNK) * LANES + lane] = x;
      }
      Element* out = o + ((static_cast<long long>(at.batch) * length + start) * heads + at.head) * HEAD_DIM + 2 * lane;
      Product unused;
      const State last = walk_strip(stage, initial, heads, x, unused, [&](int i, float2, State x) {
        const float2 r = unpack(Element{}, query[i]);
        const float2 y = make_float2(r.x * (x.x * reciprocal(x.z + 1e-30f)), r.y * (x.y * reciprocal(x.w + 1e-30f)));
        stream_pair_if(i < length - start, further(out, i, heads * ROW_BYTES), y);
        const Mark mark = mark_of(stage, i);
        if (mark.ends()) store_state(final, mark.sequence() * heads + at.head, x);
      });
      // Tokens past the end do not change the state, so the state after the last token of the chunk is the final state.
      if (!PACKED && at.rank == chunks - 1 && strip == STRIPS - 1) store_state(final, at.row, last);
    }
    if (threadIdx.x == 0) shared.drawn = item_of(number);
    if (STAGES == 2) {
      __syncthreads();
      begin_load(shared.stages[(iteration + 1) % STAGES]);
    }
  }
}
