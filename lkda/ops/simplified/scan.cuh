// What the forward and the backward kernel share: how a chunk lies on a block, and the scan over the chunks.
//
// A block of 256 threads takes one chunk of one head at a time. Two neighbouring channels make a lane; the LANES threads of
// a token's row form a strip, and a strip owns TOKENS consecutive tokens, which its threads walk one after another.
//
// Walking a run of tokens maps the state x that enters it to decay * x + state: a Summary. Summaries of neighbouring runs
// combine into one. Chunks are ranked in the order of the walk (from the last chunk to the first in the backward), and every
// chunk publishes its Summary; FAN_OUT of them make a group, whose last chunk publishes the group's; FAN_OUT groups make a
// span, whose last chunk publishes the state that leaves it. The state that enters a chunk is then
//     the state entering its span, through the groups before it in the span, through the chunks before it in the group,
// in that order whatever the timing, so that results do not change from run to run. Nobody waits for a summary of a chunk
// that no block has begun: blocks draw chunks from a counter, in rank order.
#pragma once
#include "async_copy.cuh"
#include "numeric.cuh"

using Element = ELEMENT;

constexpr int THREADS = 256;
constexpr int TOKENS = 8;
constexpr int LANES = HEAD_DIM / 2;
constexpr int STRIPS = THREADS / LANES;
constexpr int CHUNK = STRIPS * TOKENS;
constexpr int FAN_OUT = 8;

constexpr int ROW_BYTES = HEAD_DIM * sizeof(Element);
// With rows of 64 bytes two strips share a warp; the padding puts their rows into different banks.
constexpr int STRIP_BYTES = TOKENS * ROW_BYTES + (ROW_BYTES == 64 ? 64 : 0);
constexpr int TILE_BYTES = STRIPS * STRIP_BYTES;

// The state of two channels: num, num, den, den.
using State = float4;

__device__ __forceinline__ State through(float decay, State x, State plus) {
  return make_float4(fmaf(decay, x.x, plus.x), fmaf(decay, x.y, plus.y), fmaf(decay, x.z, plus.z), fmaf(decay, x.w, plus.w));
}

struct Summary {
  float decay;
  State state;
};

constexpr State ZERO = {0.f, 0.f, 0.f, 0.f};

__device__ __forceinline__ Summary then(Summary first, Summary second) {
  return {second.decay * first.decay, through(second.decay, first.state, second.state)};
}

// A chunk to be done: its rank, its head, and the head's row = batch * heads + head.
struct alignas(16) Place {
  int rank, row, batch, head;
};

// The next chunk that nobody has: a number that counts heads first, then ranks.
__device__ __forceinline__ unsigned draw(unsigned* counter) {
  return atomicAdd(counter, 1u) + 1;  // it starts as UNWRITTEN, which is -1
}

__device__ __forceinline__ Place place_of(unsigned item, int batch, int heads) {
  const unsigned rows = batch * heads, row = item % rows;
  return {static_cast<int>(item / rows), static_cast<int>(row), static_cast<int>(row / heads), static_cast<int>(row % heads)};
}

// A tensor [B, T, H, D] with D contiguous, seen from one head: rows of D elements, `token` elements apart.
struct Rows {
  const Element* data;
  long long token;
};

// The compiler may not move memory accesses across: fetching a whole strip ahead would cost it too many registers.
__device__ __forceinline__ void keep_order() { asm volatile("" ::: "memory"); }

__device__ __forceinline__ int strip_of_thread() { return threadIdx.x / LANES; }
__device__ __forceinline__ int lane_of_thread() { return threadIdx.x % LANES; }

// Where this thread's pair of channels of token `i` of its strip lies in a tile.
__device__ __forceinline__ const Element* in_tile(const unsigned char* tile, int i) {
  return reinterpret_cast<const Element*>(tile + strip_of_thread() * STRIP_BYTES + i * ROW_BYTES) + 2 * lane_of_thread();
}

// threadIdx.x, hidden from the compiler: else it keeps what it derives from it in registers through the kernel.
__device__ __forceinline__ int forgotten_thread() {
  int thread = threadIdx.x;
  asm volatile("" : "+r"(thread));
  return thread;
}

// Begin to copy tokens [start, start + CHUNK) to a tile; tokens from `end` on are filled with a word instead.
__device__ __forceinline__ void load_tile(unsigned char* tile, Rows from, int thread, int start, int end, unsigned fill) {
  constexpr int PIECES_A_ROW = ROW_BYTES / 16;
#pragma unroll
  for (int n = 0; n < CHUNK * PIECES_A_ROW / THREADS; ++n) {
    const int piece = n * THREADS + thread;
    const int row = piece / PIECES_A_ROW, column = piece % PIECES_A_ROW;
    unsigned char* to = tile + row / TOKENS * STRIP_BYTES + row % TOKENS * ROW_BYTES + column * 16;
    const int t = start + row;
    if (t < end) {
      copy_16_async(to, reinterpret_cast<const unsigned char*>(from.data + t * from.token) + column * 16);
    } else {
      *reinterpret_cast<uint4*>(to) = make_uint4(fill, fill, fill, fill);
    }
  }
}

// The same for the decays, filled with 1.
__device__ __forceinline__ void load_decays(float* tile, const float* from, long long token, int start, int end) {
  if (threadIdx.x < CHUNK) {
    const int t = start + threadIdx.x;
    if (t < end) {
      copy_4_async(tile + threadIdx.x, from + t * token);
    } else {
      tile[threadIdx.x] = 1.f;
    }
  }
}

// For packed rows: which sequence begins (x) and which ends (y) at a token; -1 where none does.
__device__ __forceinline__ void load_marks(int2* tile, const int2* marks, int start, int end) {
  if (threadIdx.x < CHUNK) {
    const int t = start + threadIdx.x;
    if (t < end) {
      copy_8_async(tile + threadIdx.x, marks + t);
    } else {
      tile[threadIdx.x] = make_int2(-1, -1);
    }
  }
}

// Two channels of a state tensor [N, H, 2, D], row = n * H + h.
__device__ __forceinline__ State load_state(const float* states, int row) {
  if (states == nullptr) return ZERO;
  const float* at = states + row * (2ll * HEAD_DIM) + 2 * lane_of_thread();
  const float2 num = load_pair(at), den = load_pair(at + HEAD_DIM);
  return make_float4(num.x, num.y, den.x, den.y);
}

__device__ __forceinline__ void store_state(float* states, int row, State x) {
  float* at = states + row * (2ll * HEAD_DIM) + 2 * lane_of_thread();
  store_pair(at, make_float2(x.x, x.y));
  store_pair(at + HEAD_DIM, make_float2(x.z, x.w));
}

// Walk this thread's strip from a zero state, keeping the state after every token. Where a packed sequence begins, the walk
// goes on from that sequence's initial state.
template <class Stage>
__device__ __forceinline__ Summary walk_strip(const Stage& stage, const float* initial, int heads, State (&states)[TOKENS]) {
  Summary x = {1.f, ZERO};
#pragma unroll
  for (int i = 0; i < TOKENS; ++i) {
    const float b = stage.decays[strip_of_thread() * TOKENS + i];
    if (PACKED) {
      const int begins = stage.marks[strip_of_thread() * TOKENS + i].x;
      if (begins >= 0) x = {0.f, load_state(initial, begins * heads + stage.place.head)};
    }
    const float2 k = load_pair(in_tile(stage.k, i)), v = load_pair(in_tile(stage.v, i));
    const float2 s = make_float2(sigmoid(k.x), sigmoid(k.y));
    x = {b * x.decay, through(b, x.state, make_float4(s.x * v.x, s.y * v.y, s.x, s.y))};
    states[i] = x.state;
    if (i % 4 == 3) keep_order();
  }
  return x;
}

// ---- Publishing between blocks. Every word is its own flag: the host fills the workspace with UNWRITTEN, and a word that
// is something else has arrived. So readers need no fence, and one trip to memory.
constexpr unsigned UNWRITTEN = 0xffffffffu;

__device__ __forceinline__ float as_written(float x) {
  return __float_as_uint(x) == UNWRITTEN ? __uint_as_float(0x7fffffffu) : x;  // that pattern is a NaN: pass on another
}

__device__ __forceinline__ bool is_written(float x) { return __float_as_uint(x) != UNWRITTEN; }

__device__ __forceinline__ bool is_written(State x) {
  return is_written(x.x) && is_written(x.y) && is_written(x.z) && is_written(x.w);
}

__device__ __forceinline__ void publish(float* at, float x) {
  asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(at), "f"(as_written(x)) : "memory");
}

__device__ __forceinline__ void publish(State* at, State x) {
  asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(at), "f"(as_written(x.x)),
               "f"(as_written(x.y)), "f"(as_written(x.z)), "f"(as_written(x.w))
               : "memory");
}

__device__ __forceinline__ float peek(const float* at) {
  float x;
  asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(x) : "l"(at) : "memory");
  return x;
}

__device__ __forceinline__ State peek(const State* at) {
  State x;
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "l"(at)
               : "memory");
  return x;
}

// The published summaries of one head. `entries_of` and the layout are mirrored in cuda.py.
struct Published {
  State* states;  // [entries][LANES]
  float* decays;  // [entries]
  int chunks, groups;

  static __device__ int groups_of(int chunks) { return (chunks + FAN_OUT - 1) / FAN_OUT; }
  static __device__ int entries_of(int chunks) { return chunks + groups_of(chunks) + groups_of(groups_of(chunks)); }

  // workspace: 4 words (the counter first), then the states of all heads, then their decays.
  __device__ Published(unsigned* workspace, int heads, int head, int chunks) : chunks(chunks), groups(groups_of(chunks)) {
    const long long entries = entries_of(chunks);
    State* all = reinterpret_cast<State*>(workspace + 4);
    states = all + head * entries * LANES;
    decays = reinterpret_cast<float*>(all + heads * entries * LANES) + head * entries;
  }

  __device__ void write(int entry, Summary x) const {
    publish(states + entry * LANES + lane_of_thread(), x.state);
    if (lane_of_thread() % 32 == 0) publish(decays + entry, x.decay);  // with 64 lanes both warps write the same word
  }

  // Waits until the entry is there.
  __device__ Summary read(int entry) const {
    const float* decay = decays + entry;
    const State* state = states + entry * LANES + lane_of_thread();
    Summary x;
    do {
      x = {peek(decay), peek(state)};
    } while (!is_written(x.decay) || !is_written(x.state));
    return x;
  }

  __device__ void write_span(int span, State leaving) const {
    publish(states + (chunks + groups + span) * LANES + lane_of_thread(), leaving);
  }

  __device__ State read_span(int span) const {
    const State* at = states + (chunks + groups + span) * LANES + lane_of_thread();
    State x = peek(at);
    while (!is_written(x)) x = peek(at);
    return x;
  }
};

// Shared memory for combining the strips' summaries.
struct Exchange {
  State states[THREADS];
  float decays[STRIPS];

  __device__ void put(Summary x) {
    states[threadIdx.x] = x.state;
    if (lane_of_thread() == 0) decays[strip_of_thread()] = x.decay;
  }
  __device__ Summary get(int strip) const { return {decays[strip], states[strip * LANES + lane_of_thread()]}; }
};

// The state that enters the chunk of rank `rank`, for every thread; `own` is the chunk's Summary, known to the threads of
// the last strip. Row `row` of `initial` (may be null) enters rank 0. `partial` must be free; one barrier of the block inside.
//
// The first half of the strips gathers the groups, the second half the chunks. The second half has a barrier of its own,
// so that the group is published without waiting for earlier groups.
__device__ __forceinline__ State enter_chunk(const Published& published, int rank, Summary own, const float* initial, int row,
                                             Exchange& partial) {
  constexpr int HALF = STRIPS / 2;
  constexpr int SHARE = FAN_OUT / HALF;
  const int strip = strip_of_thread();
  const int group = rank / FAN_OUT, span = group / FAN_OUT;
  const int in_group = rank % FAN_OUT, in_span = group % FAN_OUT;
  const bool ends_group = in_group == FAN_OUT - 1, ends_span = ends_group && in_span == FAN_OUT - 1;

  if (strip == STRIPS - 1 && !ends_group) published.write(rank, own);

  const bool of_groups = strip < HALF;
  const int base = of_groups ? published.chunks + span * FAN_OUT : group * FAN_OUT;
  Summary share = {1.f, ZERO};
  if (strip == 0) share.state = span == 0 ? load_state(initial, row) : published.read_span(span - 1);
#pragma unroll
  for (int n = 0; n < SHARE; ++n) {
    const int entry = strip % HALF * SHARE + n;
    if (entry < (of_groups ? in_span : in_group)) share = then(share, published.read(base + entry));
  }
  partial.put(share);
  if (!of_groups && ends_group && !ends_span) {
    asm volatile("barrier.sync 1, 128;" ::: "memory");
    if (strip == STRIPS - 1) {
      Summary whole = partial.get(HALF);
#pragma unroll 1
      for (int s = HALF + 1; s < STRIPS; ++s) whole = then(whole, partial.get(s));
      published.write(published.chunks + group, then(whole, own));
    }
  }
  __syncthreads();

  State x = partial.get(0).state;
#pragma unroll
  for (int s = 1; s < STRIPS; ++s) {
    const Summary next = partial.get(s);
    x = through(next.decay, x, next.state);
  }
  if (strip == STRIPS - 1 && ends_span) published.write_span(span, through(own.decay, x, own.state));
  return x;
}
