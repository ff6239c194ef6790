// Simplified linear attention, forward, in the straightforward way to be bound by memory. Its choices are macros, to measure what each of
// them is worth:
//
//   LOAD_BYTES  that a thread copies with one instruction: 4, 8 or 16
//   LOADERS     threads of a block that copy, of 256
//   CHANNELS    of a head that one block has: all HEAD_DIM of them or fewer
//   TOKENS      in shared memory at a time; the next ones are copied beside them
//
// A block goes through one sequence, TOKENS tokens at a time. A thread has two channels, and the LANES threads that cover a token are a
// strip. A strip has EACH consecutive tokens and goes through them twice: from a zero state, and, once the strips before it have written
// the states that leave them, for the outputs.
#include "async_copy.cuh"
#include "numeric.cuh"

using Element = ELEMENT;

constexpr int THREADS = 256, LANES = CHANNELS / 2, STRIPS = THREADS / LANES, EACH = TOKENS / STRIPS;
static_assert(EACH * STRIPS == TOKENS, "each strip has as many tokens");

struct Tile {
  Element q[TOKENS][CHANNELS], k[TOKENS][CHANNELS], v[TOKENS][CHANNELS];
  float decay[TOKENS];
};
struct Shared {
  Tile tiles[2];
  float4 states[STRIPS][LANES];  // num, num, den, den
  float decays[STRIPS];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "notes.py allocates what this kernel uses");

__device__ __forceinline__ void copy(void* to, const void* from) {
  if constexpr (LOAD_BYTES == 16) copy_16_async(to, from);
  if constexpr (LOAD_BYTES == 8) copy_8_async(to, from);
  if constexpr (LOAD_BYTES == 4) copy_4_async(to, from);
}

// Starts copying the channels of tokens [start, start + TOKENS); `head` is their place in token 0. Tokens from `length` on are left as
// they are, because only later ones would depend on them.
__device__ __forceinline__ void load(Element (*tile)[CHANNELS], const Element* head, int start, int length, int stride) {
  constexpr int PIECE = LOAD_BYTES / sizeof(Element), PIECES = CHANNELS / PIECE;
  for (int n = threadIdx.x; n < TOKENS * PIECES; n += LOADERS) {
    const int i = n / PIECES, at = n % PIECES * PIECE;
    if (start + i < length) copy(&tile[i][at], head + static_cast<long long>(start + i) * stride + at);
  }
}

__device__ __forceinline__ float4 through(float decay, float4 x, float4 plus) {
  return {fmaf(decay, x.x, plus.x), fmaf(decay, x.y, plus.y), fmaf(decay, x.z, plus.z), fmaf(decay, x.w, plus.w)};
}

// q, k, v, o: [B, length, heads, HEAD_DIM]. decay: [B, length, heads]. Grid: B x heads x HEAD_DIM / CHANNELS.
extern "C" __global__ void __launch_bounds__(THREADS)
    simplified_ablation(const Element* q, const Element* k, const Element* v, const float* decay, Element* o, int length, int heads) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory);
  constexpr int PARTS = HEAD_DIM / CHANNELS;
  const int strip = threadIdx.x / LANES, lane = threadIdx.x % LANES, stride = heads * HEAD_DIM;
  const int head = blockIdx.x / PARTS % heads, part = blockIdx.x % PARTS;
  const long long row = static_cast<long long>(blockIdx.x / PARTS / heads) * length;
  const long long begin = row * stride + head * HEAD_DIM + part * CHANNELS;

  auto begin_load = [&](Tile& tile, int start) {
    if (threadIdx.x < LOADERS) {
      load(tile.q, q + begin, start, length, stride);
      load(tile.k, k + begin, start, length, stride);
      load(tile.v, v + begin, start, length, stride);
      for (int i = threadIdx.x; i < TOKENS; i += LOADERS) {
        if (start + i < length) copy_4_async(&tile.decay[i], decay + (row + start + i) * heads + head);
      }
    }
    commit_copies();
  };
  // What token i adds to the state.
  auto written = [&](const Tile& tile, int i) {
    const float2 key = load_pair(&tile.k[i][2 * lane]), value = load_pair(&tile.v[i][2 * lane]);
    const float2 s = make_float2(sigmoid(key.x), sigmoid(key.y));
    return float4{s.x * value.x, s.y * value.y, s.x, s.y};
  };

  begin_load(shared.tiles[0], 0);
  float4 entering = {0.f, 0.f, 0.f, 0.f};  // the tile
  for (int start = 0, turn = 0; start < length; start += TOKENS, ++turn) {
    const Tile& tile = shared.tiles[turn % 2];
    wait_copies<0>();
    __syncthreads();  // the tile has arrived, and all threads are done with the one before
    begin_load(shared.tiles[(turn + 1) % 2], start + TOKENS);

    float product = 1.f;
    float4 x = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int i = strip * EACH; i < strip * EACH + EACH; ++i) {
      product *= tile.decay[i];
      x = through(tile.decay[i], x, written(tile, i));
    }
    shared.states[strip][lane] = x;
    if (lane == 0) shared.decays[strip] = product;
    __syncthreads();
    for (int n = 0; n < STRIPS; ++n) {
      if (n == strip) x = entering;
      entering = through(shared.decays[n], entering, shared.states[n][lane]);
    }

#pragma unroll
    for (int i = strip * EACH; i < strip * EACH + EACH; ++i) {
      x = through(tile.decay[i], x, written(tile, i));
      const float2 query = load_pair(&tile.q[i][2 * lane]);
      const float2 y = make_float2(query.x * (x.x * reciprocal(x.z + 1e-30f)), query.y * (x.y * reciprocal(x.w + 1e-30f)));
      stream_pair_if(start + i < length, o + begin + static_cast<long long>(start + i) * stride + 2 * lane, y);
    }
  }
}
