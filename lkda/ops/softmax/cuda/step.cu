// One token of softmax attention for decoding. q and k are rotated by the position of the token, n = lengths[sequence]; k and v are
// written into the caches at n; and o = sum_s softmax_s(scale q . k_s) v_s over s <= n.
//
// The time is that of reading the caches. One head of one sequence is an item, whose cache is cut into `splits` parts of `part` tokens.
// A block takes one part. With one part it writes o; with several it writes its sums, and `softmax_combine` adds them up, in the order
// of the parts. Blocks whose part begins after n end at once. All sizes are those of the caches, so that a CUDA graph has them.
//
// A thread has 16 bytes of a token's k and v (N channels). LANES threads have a token, GROUPS tokens a warp. Each thread asks for the
// keys and the values of TOGETHER tokens at once, and has an online softmax of its own (arXiv:1805.02867), in powers of 2.
#include "activation.cuh"
#include "overlap.cuh"
#include "vector.cuh"

using Element = ELEMENT;

constexpr int D = HEAD_DIM, N = 16 / sizeof(Element), LANES = D / N, GROUPS = 32 / LANES;
constexpr int THREADS = 256, WARPS = THREADS / 32, TOGETHER = 8;
constexpr int STEP = WARPS * GROUPS;                // tokens that the block reads with one load per thread
constexpr int ROW = D + 4;                          // of `parts`: the sums, the largest score, the sum of the weights, and padding
constexpr int QUADS = D / 4, SETS = THREADS / QUADS;  // in softmax_combine: four channels a thread
constexpr int EACH = MAX_SPLITS / SETS;             // parts that a thread of softmax_combine adds up
// Below every score, but not infinite, so that the difference of two of them is 0.
constexpr float LOWEST = -3e38f;

// Sums of values with the weights 2^(score - largest), and the sum of these weights, of COUNT sets of tokens.
template <int COUNT>
struct Sums {
  float values[COUNT][D], largest[COUNT], weights[COUNT];
};
// A channel of the sums of all sets.
struct Total {
  float value, largest, weight;
};
template <int COUNT>
__device__ __forceinline__ Total total(const Sums<COUNT>& sums, int channel) {
  Total all = {0.f, LOWEST, 0.f};
#pragma unroll
  for (int i = 0; i < COUNT; ++i) all.largest = fmaxf(all.largest, sums.largest[i]);
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const float factor = exp2_fast(sums.largest[i] - all.largest);
    all.value = fmaf(factor, sums.values[i][channel], all.value);
    all.weight = fmaf(factor, sums.weights[i], all.weight);
  }
  return all;
}

struct Shared {
  float q[D], k[D], v[D];
  Sums<WARPS> sums;
};
static_assert(sizeof(Shared) == STEP_BYTES && sizeof(Sums<SETS>) == COMBINE_BYTES, "cuda.py allocates what these kernels use");
static_assert(EACH * SETS == MAX_SPLITS, "the sets have as many parts each");

// Loads what the kernel, or the launch before it, may have written. `fetch` must not be used: it assumes that nothing writes it.
__device__ __forceinline__ void read(Raw<16>& raw, const Element* at) {
  const uint4 x = *reinterpret_cast<const uint4*>(at);
  raw = {{x.x, x.y, x.z, x.w}};
}

// x as it is after it was stored and loaded.
template <class Half>
__device__ __forceinline__ float as_stored(Half, float x) {
  return unpack(Half{}, pack(Half{}, make_float2(x, 0.f))).x;
}
__device__ __forceinline__ float as_stored(float, float x) { return x; }

template <int COUNT>
__device__ __forceinline__ float dot(const Numbers<COUNT>& x, const Numbers<COUNT>& y) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) sum = fmaf(x.x[i], y.x[i], sum);
  return sum;
}

// The place of the new token in a cache of `size`. The last token of a full cache is overwritten.
__device__ __forceinline__ int place(long long length, int size) { return length < size ? static_cast<int>(length) : size - 1; }

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    softmax_step(const Element* q, const Element* k, const Element* v, const float* frequencies, const long long* lengths,
                 Element* k_cache, Element* v_cache, Element* o, float* parts, int heads, int stride, int size, int part, int splits,
                 long long sequence_stride, long long head_stride, float scale) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory);
  const int thread = threadIdx.x, warp = thread / 32, group = thread % 32 / LANES, column = thread % LANES * N;
  const int item = blockIdx.x / splits, sequence = item / heads, head = item % heads;
  const long long cache = sequence * sequence_stride + head * head_stride, own = static_cast<long long>(sequence) * stride + head * D;
  wait_for_the_launch_before();
  let_the_next_launch_begin();

  const long long length = lengths[sequence];
  float frequency = 0.f, token[3][2];  // a pair of channels of q, k and v
  if (thread < D / 2) {
    frequency = frequencies[thread];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const long long at = own + i * (D / 2) + thread;
      token[0][i] = load_number(q + at), token[1][i] = load_number(k + at), token[2][i] = load_number(v + at);
    }
  }
  const int newest = place(length, size), first = static_cast<int>(blockIdx.x % splits) * part;
  if (first > newest) return;
  const int end = min(first + part, newest);  // of the tokens in the caches
  const bool has_newest = newest < first + part;

  Raw<16> keys[TOGETHER], values[TOGETHER];
  auto ask = [&](const Element* from, Raw<16> (&raw)[TOGETHER], int begin) {
#pragma unroll
    for (int i = 0; i < TOGETHER; ++i) {
      const int at = begin + i * STEP + warp * GROUPS + group;
      raw[i] = {{0, 0, 0, 0}};
      if (at < end) read(raw[i], from + cache + static_cast<long long>(at) * D + column);
    }
  };
  ask(k_cache, keys, first);
  ask(v_cache, values, first);

  if (thread < D / 2) {
    float sine, cosine;
    sincosf(static_cast<float>(length) * frequency, &sine, &cosine);
    const float factor = scale * LOG2E;
    shared.q[thread] = factor * (token[0][0] * cosine - token[0][1] * sine);
    shared.q[thread + D / 2] = factor * (token[0][1] * cosine + token[0][0] * sine);
    if (has_newest) {
      const float rotated[2] = {token[1][0] * cosine - token[1][1] * sine, token[1][1] * cosine + token[1][0] * sine};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int channel = i * (D / 2) + thread;
        const long long at = cache + static_cast<long long>(newest) * D + channel;
        shared.k[channel] = as_stored(Element{}, rotated[i]);
        shared.v[channel] = token[2][i];
        store_number(k_cache + at, rotated[i]);
        store_number(v_cache + at, token[2][i]);
      }
    }
  }
  __syncthreads();

  const Numbers<N> query = load_floats<N>(&shared.q[column]);
  float largest = LOWEST, weights = 0.f;
  Numbers<N> sums = {};
  auto rescale = [&](float most) {
    const float factor = exp2_fast(largest - most);
    largest = most, weights *= factor;
#pragma unroll
    for (int i = 0; i < N; ++i) sums.x[i] *= factor;
  };
  auto add = [&](float score, const Numbers<N>& value) {
    const float weight = exp2_fast(score - largest);
    weights += weight;
#pragma unroll
    for (int i = 0; i < N; ++i) sums.x[i] = fmaf(weight, value.x[i], sums.x[i]);
  };
  for (int begin = first; begin < end; begin += TOGETHER * STEP) {
    if (begin > first) {
      ask(k_cache, keys, begin);
      ask(v_cache, values, begin);
    }
    float scores[TOGETHER], most = largest;
#pragma unroll
    for (int i = 0; i < TOGETHER; ++i) {
      const float score = sum_over_lanes<LANES>(dot(query, numbers<N>(Element{}, keys[i])));
      scores[i] = begin + i * STEP + warp * GROUPS + group < end ? score : __uint_as_float(0xff800000u);  // minus infinity
      most = fmaxf(most, scores[i]);
    }
    rescale(most);
#pragma unroll
    for (int i = 0; i < TOGETHER; ++i) add(scores[i], numbers<N>(Element{}, values[i]));
  }
  if (has_newest && warp == 0) {
    const float score = sum_over_lanes<LANES>(dot(query, load_floats<N>(&shared.k[column])));
    if (group == 0) {
      rescale(fmaxf(largest, score));
      add(score, load_floats<N>(&shared.v[column]));
    }
  }

  // The sums of a warp, then those of the block.
#pragma unroll
  for (int other = LANES; other < 32; other *= 2) {
    rescale(fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, other)));
    weights += __shfl_xor_sync(0xffffffffu, weights, other);
#pragma unroll
    for (int i = 0; i < N; ++i) sums.x[i] += __shfl_xor_sync(0xffffffffu, sums.x[i], other);
  }
  if (group == 0) {
    store_floats<N>(&shared.sums.values[warp][column], sums);
    if (column == 0) shared.sums.largest[warp] = largest, shared.sums.weights[warp] = weights;
  }
  __syncthreads();
  if (thread < D) {
    const Total all = total(shared.sums, thread);
    if (splits == 1) {
      store_number(o + static_cast<long long>(item) * D + thread, all.value / all.weight);
    } else {
      float* to = parts + static_cast<long long>(blockIdx.x) * ROW;
      to[thread] = all.value;
      if (thread == 0) to[D] = all.largest, to[D + 1] = all.weight;
    }
  }
}

// o of an item from the sums of its parts.
extern "C" __global__ void __launch_bounds__(THREADS)
    softmax_combine(const float* parts, const long long* lengths, Element* o, int heads, int size, int part, int splits) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  Sums<SETS>& sums = *reinterpret_cast<Sums<SETS>*>(shared_memory);
  const int thread = threadIdx.x, set = thread / QUADS, column = thread % QUADS * 4;
  const float* own = parts + static_cast<long long>(blockIdx.x) * splits * ROW;
  wait_for_the_launch_before();
  let_the_next_launch_begin();
  const int filled = place(lengths[blockIdx.x / heads], size) / part + 1;

  Numbers<4> values[EACH];
  float largest[EACH], weights[EACH], most = LOWEST, weight = 0.f;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int number = set + i * SETS;
    largest[i] = LOWEST, weights[i] = 0.f, values[i] = {};
    if (number < filled) {
      values[i] = load_floats<4>(own + number * ROW + column);
      largest[i] = own[number * ROW + D], weights[i] = own[number * ROW + D + 1];
    }
  }
#pragma unroll
  for (int i = 0; i < EACH; ++i) most = fmaxf(most, largest[i]);
  Numbers<4> value = {};
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const float factor = exp2_fast(largest[i] - most);
    weight = fmaf(factor, weights[i], weight);
#pragma unroll
    for (int j = 0; j < 4; ++j) value.x[j] = fmaf(factor, values[i].x[j], value.x[j]);
  }
  store_floats<4>(&sums.values[set][column], value);
  if (column == 0) sums.largest[set] = most, sums.weights[set] = weight;
  __syncthreads();
  if (thread < D) {
    const Total all = total(sums, thread);
    store_number(o + static_cast<long long>(blockIdx.x) * D + thread, all.value / all.weight);
  }
}
