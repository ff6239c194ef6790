// Samples one token per row of logits, as reference.py defines it. One block per row.
//
// The weights exp((logit - largest) / temperature) stay in shared memory. Counts are weights in units of 2^-40, as 64-bit integers, so that
// their sums are exact in any order. The thresholds of top_k and top_p are found by bisection, on the bits of a weight and on a count.
#include "vector.cuh"

using Element = ELEMENT;
using Count = unsigned long long;

constexpr int THREADS = 1024, WARPS = THREADS / 32;
constexpr unsigned MINUS_INFINITY = 0xff800000u;
constexpr float UNIT = 1099511627776.f;  // 2^40

extern __shared__ unsigned char shared_memory[];

__device__ __forceinline__ Count count_of(float weight) { return static_cast<Count>(weight * UNIT); }

// The value of lane `lanes` further on, of 64 bits, in two words.
__device__ __forceinline__ Count from_lane(Count x, int lanes) {
  const unsigned low = __float_as_uint(__shfl_xor_sync(~0u, __uint_as_float(static_cast<unsigned>(x)), lanes));
  const unsigned high = __float_as_uint(__shfl_xor_sync(~0u, __uint_as_float(static_cast<unsigned>(x >> 32)), lanes));
  return static_cast<Count>(high) << 32 | low;
}

// The sum over the block, in every thread.
__device__ Count block_sum(Count x, Count* partial) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += from_lane(x, lanes);
  __syncthreads();  // of the readers of the sum before
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  Count sum = 0;
#pragma unroll
  for (int i = 0; i < WARPS; ++i) sum += partial[i];
  return sum;
}

// Numbers that order as (value, then the smaller index first): the likeliest token is that of the largest one.
__device__ __forceinline__ Count ranked(float value, int index) {
  const unsigned bits = __float_as_uint(value);
  const unsigned ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<Count>(ordered) << 32 | static_cast<unsigned>(~index);
}

__device__ Count block_max(Count x, Count* partial) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const Count other = from_lane(x, lanes);
    x = other > x ? other : x;
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  Count most = 0;
#pragma unroll
  for (int i = 0; i < WARPS; ++i) most = partial[i] > most ? partial[i] : most;
  return most;
}

// Number `position` of the SplitMix64 generator that begins with `key`, in [0, 1).
__device__ __forceinline__ double uniform(Count key, Count position) {
  Count z = key + (position + 1) * 0x9E3779B97F4A7C15ull;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ z >> 27) * 0x94D049BB133111EBull;
  return static_cast<double>((z ^ z >> 31) >> 11) * (1. / 9007199254740992.);
}

__device__ __forceinline__ float value_of(float x) { return x; }
__device__ __forceinline__ float value_of(bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

extern "C" __global__ void __launch_bounds__(THREADS)
    sample(const Element* logits, const long long* keys, const long long* positions, long long* tokens, int size,
           float temperature, int top_k, double top_p, float min_p) {
  float* const weights = reinterpret_cast<float*>(shared_memory);
  Count* const partial = reinterpret_cast<Count*>(shared_memory + (static_cast<long long>(size) * 4 + 15) / 16 * 16);
  const int row = blockIdx.x, thread = threadIdx.x;
  logits += static_cast<long long>(row) * size;

  Count best = 0;
  bool finite = true;
  for (int i = thread; i < size; i += THREADS) {
    const float x = value_of(logits[i]);
    weights[i] = x;
    // A logit that is not a number, or +infinity, has all bits of the exponent set.
    if ((__float_as_uint(x) & 0x7f800000u) == 0x7f800000u && __float_as_uint(x) != MINUS_INFINITY) finite = false;
    const Count rank = ranked(x, i);
    best = rank > best ? rank : best;
  }
  best = block_max(best, partial);
  const int likeliest = static_cast<int>(~static_cast<unsigned>(best));
  if (block_sum(finite ? 0 : 1, partial) > 0 || __float_as_uint(weights[likeliest]) == MINUS_INFINITY) {
    if (thread == 0) tokens[row] = -1;
    return;
  }
  if (temperature == 0.f) {
    if (thread == 0) tokens[row] = likeliest;
    return;
  }
  const float largest = weights[likeliest];
  __syncthreads();
  for (int i = thread; i < size; i += THREADS) weights[i] = expf((weights[i] - largest) / temperature);

  // The weights below `least` are left out. Weights are >= 0, so their bits order as they do. A thread reads only its own weights.
  float least = 0.f;
  if (top_k > 0 && top_k < size) {
    unsigned low = 0, high = 0x3f800001u;  // at least top_k weights are >= low, and fewer are >= high
    while (high - low > 1) {
      const unsigned middle = low + (high - low) / 2;
      Count kept = 0;
      for (int i = thread; i < size; i += THREADS) kept += __float_as_uint(weights[i]) >= middle;
      if (block_sum(kept, partial) >= static_cast<Count>(top_k)) low = middle; else high = middle;
    }
    least = __uint_as_float(low);
  }
  Count least_count = 0;
  if (top_p < 1.) {
    Count all = 0;
    for (int i = thread; i < size; i += THREADS) all += weights[i] >= least ? count_of(weights[i]) : 0;
    const double share = ceil(static_cast<double>(block_sum(all, partial)) * top_p);
    const Count needed = share < 1. ? 1 : static_cast<Count>(share);
    Count low = 0, high = (1ull << 40) + 1;  // counts of low and more have the share, counts of high and more have not
    while (high - low > 1) {
      const Count middle = low + (high - low) / 2;
      Count kept = 0;
      for (int i = thread; i < size; i += THREADS) {
        const Count count = weights[i] >= least ? count_of(weights[i]) : 0;
        kept += count >= middle ? count : 0;
      }
      if (block_sum(kept, partial) >= needed) low = middle; else high = middle;
    }
    least_count = low;
  }
  if (min_p > least) least = min_p;

  // Each thread sums the counts of its stretch of tokens; the one in whose stretch the drawn number falls finds the token.
  __syncthreads();
  // An odd stretch, so that the threads of a warp read from different banks.
  const int stretch = (size + THREADS - 1) / THREADS | 1, begin = min(thread * stretch, size), end = min(begin + stretch, size);
  Count own = 0;
  for (int i = begin; i < end; ++i) {
    const Count count = weights[i] >= least ? count_of(weights[i]) : 0;
    own += count >= least_count ? count : 0;
  }
  const Count total = block_sum(own, partial);
  Count* const sums = partial + WARPS;
  sums[thread] = own;
  Count drawn = static_cast<Count>(uniform(keys[row], positions[row]) * static_cast<double>(total));
  if (drawn > total - 1) drawn = total - 1;
  __syncthreads();
  Count before = 0;
  for (int warp = 0; warp < thread / 32; ++warp) before += partial[warp];
  for (int i = thread / 32 * 32; i < thread; ++i) before += sums[i];
  if (before <= drawn && drawn < before + own) {
    int token = begin;
    for (; token < end; ++token) {
      const Count count = weights[token] >= least ? count_of(weights[token]) : 0;
      before += count >= least_count ? count : 0;
      if (drawn < before) break;
    }
    tokens[row] = token;
  }
}
