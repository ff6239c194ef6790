// What the forward and the backward kernel share: how a chunk is divided among the threads of a block, and the scan over chunks.
//
// A block of 256 threads takes one chunk of one head at a time. A thread has two neighbouring channels. The LANES threads of a token's
// row form a strip. A strip has TOKENS consecutive tokens, and its threads go through them one after another.
//
// A run of tokens maps the state x that enters it to decay * x + state. The pair (decay, state) is its Summary, and the Summaries of
// neighbouring runs combine into one. Chunks are ranked in the order of the scan (in the backward from the last to the first). Each
// chunk publishes its Summary. FAN_OUT chunks are a group, and the last one publishes the group's Summary. FAN_OUT groups are a
// span, and its last chunk publishes the state that leaves it. The state that enters a chunk is the state that enters its span,
// mapped by the groups before it in the span, then by the chunks before it in the group. This order does not depend on the timing, so
// results are the same in every run. Blocks take chunks from a counter in the order of their ranks, so no block waits for a chunk
// that no block has begun.
//
// In one iteration a block copies chunk i + 2 to shared memory, publishes the Summary of chunk i + 1, and writes the outputs of chunk i.
// The chunks before i have then had a whole iteration to publish theirs, so blocks seldom wait.
#pragma once
#include "async_copy.cuh"
#include "numeric.cuh"

using Element = ELEMENT;

constexpr int THREADS = 256;
constexpr int LANES = HEAD_DIM / 2;
constexpr int STRIPS = THREADS / LANES;
constexpr int CHUNK = STRIPS * TOKENS;
constexpr int FAN_OUT = 8;

constexpr int ROW_BYTES = HEAD_DIM * sizeof(Element);
constexpr int STRIP_BYTES = TOKENS * ROW_BYTES;
constexpr int TILE_BYTES = STRIPS * STRIP_BYTES;

// The state of two channels: num, num, den, den.
using State = float4;

constexpr State ZERO = {0.f, 0.f, 0.f, 0.f};

__device__ __forceinline__ State times(float b, State x) { return make_float4(b * x.x, b * x.y, b * x.z, b * x.w); }

__device__ __forceinline__ State through(float decay, State x, State plus) {
  return make_float4(fmaf(decay, x.x, plus.x), fmaf(decay, x.y, plus.y), fmaf(decay, x.z, plus.z), fmaf(decay, x.w, plus.w));
}

// A product of decays. Decays of a long memory are slightly less than 1, by a few units in the last place. The rounding errors of
// their products all have one sign and reach 1e-4 over 100,000 tokens, so the rounding error is carried along.
struct Product {
  float value, dropped;

  __device__ Product(float value = 1.f, float dropped = 0.f) : value(value), dropped(dropped) {}

  __device__ void by(float b) {
    const float next = b * value;
    dropped = fmaf(b, dropped, fmaf(b, value, -next));
    value = next;
  }
  __device__ void by(Product b) {
    const float more = value * b.dropped;
    by(b.value);
    dropped += more;
    settle();
  }
  // Makes `value` the float that is nearest to the product value + dropped.
  __device__ void settle() {
    const float nearest = value + dropped;
    dropped -= nearest - value;
    value = nearest;
  }
};

struct Summary {
  Product decay;
  State state;
};

__device__ __forceinline__ Summary then(Summary first, Summary second) {
  first.state = through(second.decay.value, first.state, second.state);
  first.decay.by(second.decay);
  return first;
}

__device__ __forceinline__ int strip_of_thread() { return threadIdx.x / LANES; }
__device__ __forceinline__ int lane_of_thread() { return threadIdx.x % LANES; }

// ---- Chunks

// A chunk to compute: its rank, its head, and the head's row = batch * heads + head.
struct alignas(16) Place {
  int rank, row, batch, head;
};

// The next chunk that no block has taken. The counter goes through the heads first, then through the ranks.
__device__ __forceinline__ unsigned draw(unsigned* counter) {
  return atomicAdd(counter, 1u) + 1;  // it starts as UNWRITTEN, which is -1
}

__device__ __forceinline__ Place place_of(unsigned item, int batch, int heads) {
  const unsigned rows = batch * heads, row = item % rows;
  return {static_cast<int>(item / rows), static_cast<int>(row), static_cast<int>(row / heads), static_cast<int>(row % heads)};
}

// A tensor [B, T, H, ...] as a kernel argument: its address, and its strides in elements.
template <class T>
struct Tensor {
  const T* data;
  long long batch, head;
  int token;

  __device__ const T* at(Place place) const { return data + place.batch * batch + place.head * head; }
};

// A row of 64 bytes covers half the banks, and two strips share a warp. So odd strips have neighbouring tokens swapped.
__device__ __forceinline__ int row_in_strip(int strip, int i) { return ROW_BYTES == 64 ? i ^ (strip & 1) : i; }

// The position in a tile of this thread's pair of channels of token `i` of its strip.
__device__ __forceinline__ const Element* in_tile(const unsigned char* tile, int i) {
  const int strip = strip_of_thread();
  return reinterpret_cast<const Element*>(tile + strip * STRIP_BYTES + row_in_strip(strip, i) * ROW_BYTES) + 2 * lane_of_thread();
}

// The element `i` steps of `bytes` further. This is one multiply-add per use; a step in elements would take three instructions.
template <class T>
__device__ __forceinline__ T* further(T* at, int i, int bytes) {
  return reinterpret_cast<T*>(reinterpret_cast<unsigned long long>(at) + static_cast<long long>(i) * bytes);
}

// Starts copying tokens [start, start + CHUNK) of one head to a tile. Tokens from `end` on are filled with a word instead.
__device__ __forceinline__ void load_tile(unsigned char* tile, const Element* head, int token, int start, int end, unsigned fill) {
  constexpr int PIECES = ROW_BYTES / 16, ROWS = THREADS / PIECES;  // of a row; copied at once
  static_assert(ROWS % TOKENS == 0, "a strip is copied at once");
  const int row = threadIdx.x / PIECES, column = threadIdx.x % PIECES, strip = row / TOKENS;
  unsigned char* to = tile + strip * STRIP_BYTES + row_in_strip(strip, row % TOKENS) * ROW_BYTES + column * 16;
  const int bytes = token * static_cast<int>(sizeof(Element));
  const Element* from = further(head, start + row, bytes) + column * (16 / sizeof(Element));
  if (start + CHUNK <= end) {
#pragma unroll
    for (int n = 0; n < CHUNK; n += ROWS) copy_16_async(to + n * ROW_BYTES, further(from, n, bytes));
  } else {
    for (int n = 0; n < CHUNK; n += ROWS) {
      if (start + row + n < end) {
        copy_16_async(to + n * ROW_BYTES, further(from, n, bytes));
      } else {
        *reinterpret_cast<uint4*>(to + n * ROW_BYTES) = make_uint4(fill, fill, fill, fill);
      }
    }
  }
}

// The same for the decays (fill 1), and for the marks of packed rows (fill 0).
__device__ __forceinline__ void load_words(void* tile, const void* from, int token, int start, int end, unsigned fill) {
  if (threadIdx.x < CHUNK) {
    const int t = start + threadIdx.x;
    unsigned* to = static_cast<unsigned*>(tile) + threadIdx.x;
    if (t < end) {
      copy_4_async(to, static_cast<const unsigned*>(from) + static_cast<long long>(t) * token);
    } else {
      *to = fill;
    }
  }
}

constexpr unsigned ONE = 0x3f800000u;

// Where a packed sequence begins or ends: the mark of a token holds its sequence (sequences.cu).
struct Mark {
  int word;
  __device__ bool begins() const { return word >= 0 && (word & 2); }
  __device__ bool ends() const { return word >= 0 && (word & 1); }
  __device__ int sequence() const { return word >> 2; }
};

template <class Stage>
__device__ __forceinline__ Mark mark_of(const Stage& stage, int i) {
  return {PACKED ? stage.marks[strip_of_thread() * TOKENS + i] : 0};
}

// Two channels of a state tensor [N, H, 2, D] (null: zeros), row = n * H + h.
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

// Decays of tokens i .. i + 3 of this thread's strip.
template <class Stage>
__device__ __forceinline__ float4 decays_of(const Stage& stage, int i) {
  return *reinterpret_cast<const float4*>(stage.decays + strip_of_thread() * TOKENS + i);
}

__device__ __forceinline__ float pick(float4 x, int i) { return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w; }

// sigmoid(k) of this thread's channels of token `i`.
template <class Stage>
__device__ __forceinline__ float2 weight(const Stage& stage, int i) {
  const float2 k = load_pair(in_tile(stage.k, i));
  return make_float2(sigmoid(k.x), sigmoid(k.y));
}

// What token `i` adds to the state.
template <class Stage>
__device__ __forceinline__ State written(const Stage& stage, int i, float2 weight) {
  const float2 v = load_pair(in_tile(stage.v, i));
  return make_float4(weight.x * v.x, weight.y * v.y, weight.x, weight.y);
}

// Goes through this thread's strip from the state `x`. Returns the state that leaves the strip, and sets `decay` to the decay over it.
// Where a packed sequence begins, it continues from that sequence's initial state.
template <class Stage, class Visit>
__device__ __forceinline__ State walk_strip(const Stage& stage, const float* initial, int heads, State x, Product& decay,
                                            Visit visit) {
  float4 decays;
#pragma unroll
  for (int i = 0; i < TOKENS; ++i) {
    const Mark mark = mark_of(stage, i);
    if (mark.begins()) {
      x = load_state(initial, mark.sequence() * heads + stage.place.head);
      decay = {0.f, 0.f};
    }
    if (i % 4 == 0) decays = decays_of(stage, i);
    const float b = pick(decays, i % 4);
    const float2 s = weight(stage, i);
    decay.by(b);
    x = through(b, x, written(stage, i, s));
    visit(i, s, x);
  }
  decay.settle();
  return x;
}

// ---- Publishing between blocks. Each word is its own flag: the host fills the workspace with UNWRITTEN, and a word with another value
// has been written. So readers need no fence, and read memory once.
constexpr unsigned UNWRITTEN = 0xffffffffu;

__device__ __forceinline__ float as_written(float x) {
  return __float_as_uint(x) == UNWRITTEN ? __uint_as_float(0x7fffffffu) : x;  // that pattern is a NaN: pass on another
}

__device__ __forceinline__ bool is_written(float x) { return __float_as_uint(x) != UNWRITTEN; }

__device__ __forceinline__ bool is_written(Product x) { return is_written(x.value) && is_written(x.dropped); }

__device__ __forceinline__ bool is_written(State x) {
  return is_written(x.x) && is_written(x.y) && is_written(x.z) && is_written(x.w);
}

__device__ __forceinline__ void publish(Product* at, Product x) {
  asm volatile("st.relaxed.gpu.global.v2.f32 [%0], {%1, %2};" ::"l"(at), "f"(as_written(x.value)), "f"(as_written(x.dropped))
               : "memory");
}

__device__ __forceinline__ void publish(State* at, State x) {
  asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(at), "f"(as_written(x.x)),
               "f"(as_written(x.y)), "f"(as_written(x.z)), "f"(as_written(x.w))
               : "memory");
}

__device__ __forceinline__ Product peek(const Product* at) {
  Product x;
  asm volatile("ld.relaxed.gpu.global.v2.f32 {%0, %1}, [%2];" : "=f"(x.value), "=f"(x.dropped) : "l"(at) : "memory");
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

// The published summaries of one head: an entry for each chunk, group and span. core.py allocates the same layout.
struct Published {
  State* states;    // [entries][LANES], from this thread's lane on
  Product* decays;  // [entries]
  int chunks, groups;

  static __device__ int groups_of(int chunks) { return (chunks + FAN_OUT - 1) / FAN_OUT; }

  // workspace: 4 words (the counter first), then the states of all heads, then their decays.
  __device__ Published(unsigned* workspace, int heads, int head, int chunks) : chunks(chunks), groups(groups_of(chunks)) {
    const unsigned entries = chunks + groups + groups_of(groups);
    State* all = reinterpret_cast<State*>(workspace + 4);
    states = all + (head * entries * LANES + lane_of_thread());
    decays = reinterpret_cast<Product*>(all + heads * entries * LANES) + head * entries;
  }

  __device__ void write(int entry, Summary x) const {
    publish(states + entry * LANES, x.state);
    if (lane_of_thread() % 32 == 0) publish(decays + entry, x.decay);  // with 64 lanes both warps write the same word
  }
  __device__ Summary read(int entry) const { return {peek(decays + entry), peek(states + entry * LANES)}; }

  __device__ void write_span(int span, State leaving) const { publish(states + (chunks + groups + span) * LANES, leaving); }
  __device__ State read_span(int span) const { return peek(states + (chunks + groups + span) * LANES); }
};

// Shared memory for combining the strips' summaries, walked from the first strip to the last or, REVERSED, back.
template <bool REVERSED>
struct Exchange {
  State states[THREADS];
  alignas(16) Product decays[STRIPS];

  __device__ void put(Summary x) {
    states[threadIdx.x] = x.state;
    if (lane_of_thread() == 0) decays[strip_of_thread()] = x.decay;
  }
  // The n-th strip of the walk.
  __device__ Summary get(int n) const {
    const int strip = REVERSED ? STRIPS - 1 - n : n;
    return {decays[strip], states[strip * LANES + lane_of_thread()]};
  }
  __device__ Summary all() const {
    Summary x = get(0);
#pragma unroll 4
    for (int n = 1; n < STRIPS; ++n) x = then(x, get(n));
    return x;
  }
  // The state that enters this thread's strip, if x enters the chunk.
  __device__ State entering_strip(State x) const {
    const int end = REVERSED ? STRIPS - 1 - strip_of_thread() : strip_of_thread();
#pragma unroll 8
    for (int n = 0; n < STRIPS - 1; ++n) {
      const Summary next = get(n);
      if (n < end) x = through(next.decay.value, x, next.state);
    }
    return x;
  }
};

// What a chunk needs from other chunks. All strips read it together: the first half reads the groups before it in its span, the second
// half the chunks before it in its group.
struct Ancestors {
  static constexpr int HALF = STRIPS / 2;
  static constexpr int SHARE = FAN_OUT / HALF;  // entries for each strip

  int group, span;
  bool ends_group, ends_span;
  int entry, count;  // this strip's

  __device__ Ancestors(const Published& published, int rank) : group(rank / FAN_OUT), span(group / FAN_OUT) {
    ends_group = rank % FAN_OUT == FAN_OUT - 1;
    ends_span = ends_group && group % FAN_OUT == FAN_OUT - 1;
    const int skipped = strip_of_thread() % HALF * SHARE;
    const bool of_groups = strip_of_thread() < HALF;
    entry = skipped + (of_groups ? published.chunks + span * FAN_OUT : group * FAN_OUT);
    count = (of_groups ? group : rank) % FAN_OUT - skipped;
  }
};

// Their summaries, which may not be written yet.
struct PendingSummaries {
  Summary found[Ancestors::SHARE];
};

// Starts loading the summaries that the chunk of a rank needs.
__device__ __forceinline__ PendingSummaries load_summaries(const Published& published, int rank) {
  const Ancestors ancestors(published, rank);
  PendingSummaries pending;
#pragma unroll
  for (int n = 0; n < Ancestors::SHARE; ++n) {
    pending.found[n] = {{}, ZERO};
    if (n < ancestors.count) pending.found[n] = published.read(ancestors.entry + n);
  }
  return pending;
}

// Waits for those summaries and returns the state that enters the chunk, in each thread. own() returns the chunk's Summary, for the last
// strip. Row `row` of `initial` (may be null) enters rank 0. `partial` must be free. The block meets at one barrier inside.
template <class Own>
__device__ __forceinline__ State enter_chunk(const Published& published, int rank, PendingSummaries& pending, Own own, const float* initial,
                                             int row, Exchange<false>& partial) {
  constexpr int HALF = Ancestors::HALF;
  const int strip = strip_of_thread();
  const Ancestors ancestors(published, rank);
  Summary share = {{}, ZERO};
  if (strip == 0) {
    const int span = ancestors.span;
    share.state = span == 0 ? load_state(initial, row) : published.read_span(span - 1);
    while (span != 0 && !is_written(share.state)) share.state = published.read_span(span - 1);
  }
#pragma unroll
  for (int n = 0; n < Ancestors::SHARE; ++n) {
    Summary& next = pending.found[n];
    while (!is_written(next.decay) || !is_written(next.state)) next = published.read(ancestors.entry + n);
    share = then(share, next);
  }
  partial.put(share);
  if (strip >= HALF && ancestors.ends_group && !ancestors.ends_span) {
    // A barrier for the second half alone, so that the group is published without waiting for earlier groups.
    asm volatile("barrier.sync 1, 128;" ::: "memory");
    if (strip == STRIPS - 1) {
      Summary whole = partial.get(HALF);
      for (int s = HALF + 1; s < STRIPS; ++s) whole = then(whole, partial.get(s));
      published.write(published.chunks + ancestors.group, then(whole, own()));
    }
  }
  __syncthreads();

  State x = partial.get(0).state;
#pragma unroll 8
  for (int s = 1; s < STRIPS; ++s) {
    const Summary next = partial.get(s);
    x = through(next.decay.value, x, next.state);
  }
  if (strip == STRIPS - 1 && ancestors.ends_span) {
    const Summary last = own();
    published.write_span(ancestors.span, through(last.decay.value, x, last.state));
  }
  return x;
}
