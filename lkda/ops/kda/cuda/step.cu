// One token of the KDA layer for decoding, from the outputs of its projections to o. One head of one sequence is an item. The state
// and the convolution caches are updated in place. With a = exp(g) and S' = Diag(a) S,
//
//     c = beta (v - S'^T k)        S = S' + k c^T        o = scale (S'^T q + (q . k) c)
//
// so one pass over the state gives both sums, and a second one, from registers, writes it. A thread has 16 bytes of a row (COLUMNS of
// V) in every GROUPS-th row of K. A block takes item number blockIdx.x, then every gridDim.x-th; while it computes one, it copies all
// that the next one needs to shared memory. A state in bf16 or int8 is rounded to nearest (docs/guides/generating.md says when that is safe).
//
// STATE is float, bfloat16, or int8 with a float32 factor per row. The decay is multiplied into that factor, so reading an int8 state
// rounds nothing and only writing it does.
#include "activation.cuh"
#include "async_copy.cuh"
#include "overlap.cuh"
#include "vector.cuh"

struct int8 {
  signed char code;
};
using Element = ELEMENT;
using State = STATE;

constexpr int D = HEAD_DIM, COLUMNS = 16 / sizeof(State), LANES = D / COLUMNS, ROWS = D / GROUPS;
constexpr int THREADS = GROUPS * LANES, WARPS = THREADS / 32, CHANNELS = D / 32;
constexpr int MAX_TAPS = 4;

struct Shared {
  float q[D], k[D], v[D], factor[D], c[D];  // factor: the row's decay, for int8 times the row's factor
  float sums[2][GROUPS][D];                 // parts of S'^T k and S'^T q, one per group of rows
  // Inputs of the next item, in memory's type (float or Element).
  float tokens[3][D], filters[3][D * MAX_TAPS], caches[3][MAX_TAPS - 1][D], logits[D], bias[D], row_factors[D];
  uint4 state[D * LANES];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "step.py allocates what this kernel uses");

__device__ __forceinline__ float load_either(const void* at, long long i, int wide) {
  return wide ? static_cast<const float*>(at)[i] : load_number(static_cast<const Element*>(at) + i);
}
__device__ __forceinline__ void store_either(void* at, long long i, float x, int wide) {
  if (wide)
    static_cast<float*>(at)[i] = x;
  else
    store_number(static_cast<Element*>(at) + i, x);
}

template <class T>
__device__ __forceinline__ T of_stream(int stream, T q, T k, T v) {
  return stream == 0 ? q : stream == 1 ? k : v;
}

// A warp starts copying `count` elements (float or Element) from element number `first` on.
__device__ __forceinline__ void copy_row(float* to, const void* from, long long first, int count, int wide) {
  const int size = wide ? 4 : sizeof(Element);
  const char* source = static_cast<const char*>(from) + first * size;
  for (int at = threadIdx.x % 32 * 16; at < count * size; at += 32 * 16) copy_16_async(reinterpret_cast<char*>(to) + at, source + at);
}

// SiLU of the causal convolution of a channel. Moves its cache on by one token.
__device__ __forceinline__ float convolved(float x, const float* filter, const float (*before)[D], int i, void* cache, long long first,
                                           int channels, int width, int wide_weights, int wide_caches) {
  float y = x * load_either(filter, i * width + width - 1, wide_weights);
#pragma unroll
  for (int tap = 0; tap < MAX_TAPS - 1; ++tap) {
    if (tap >= width - 1) break;
    const float past = load_either(before[tap], i, wide_caches);
    y = fmaf(past, load_either(filter, i * width + tap, wide_weights), y);
    if (tap > 0) store_either(cache, first + static_cast<long long>(tap - 1) * channels, past, wide_caches);
  }
  if (width > 1) store_either(cache, first + static_cast<long long>(width - 2) * channels, x, wide_caches);
  return y * sigmoid(y);
}

// Number i of a thread's 16 bytes; for int8 without the row's factor.
__device__ __forceinline__ float number(float, const Raw<16>& raw, int i) { return __uint_as_float(raw.word[i]); }
__device__ __forceinline__ float number(bfloat16, const Raw<16>& raw, int i) {
  const unsigned word = raw.word[i / 2];
  return __uint_as_float(i % 2 ? word & 0xffff0000u : word << 16);
}
// A conversion instruction runs at an eighth of the rate. Instead: 2^23 + 128 + code is a float whose low byte is the code with
// its sign bit flipped.
__device__ __forceinline__ float number(int8, const Raw<16>& raw, int i) {
  const unsigned word = raw.word[i / 4] ^ 0x80808080u;
  return __uint_as_float((word >> 8 * (i % 4) & 0xffu) | 0x4b000000u) - 8388736.f;
}

// Zero, but the compiler cannot know that before it has x, since no arithmetic gives this NaN. Narrow numbers that are combined with
// it are therefore widened where they are used, not several rows ahead and not once for both passes, which would spill.
__device__ __forceinline__ unsigned zero_after(float x) { return __float_as_uint(x) == 0x7fc12345u; }

// A thread's part of a row in the form in which it is stored. int8 alone sets the row's `factor`.
__device__ __forceinline__ Raw<16> rounded(float, const Numbers<4>& x, float*) {
  Raw<16> raw;
#pragma unroll
  for (int i = 0; i < 4; ++i) raw.word[i] = __float_as_uint(x.x[i]);
  return raw;
}
__device__ __forceinline__ Raw<16> rounded(bfloat16, const Numbers<8>& x, float*) {
  Raw<16> raw;
#pragma unroll
  for (int i = 0; i < 4; ++i) raw.word[i] = pack(bfloat16{}, make_float2(x.x[2 * i], x.x[2 * i + 1]));
  return raw;
}
__device__ __forceinline__ Raw<16> rounded(int8, const Numbers<16>& x, float* factor) {
  float amax = 0.f;  // a NaN anywhere makes the row's factor NaN
#pragma unroll
  for (int i = 0; i < 16; ++i) amax = max_or_nan(amax, fabsf(x.x[i]));
#pragma unroll
  for (int other = LANES / 2; other > 0; other /= 2) amax = max_or_nan(amax, __shfl_xor_sync(0xffffffffu, amax, other));
  *factor = amax * (1.f / 127.f);
  const float inverse = amax > 1e-30f ? 127.f * reciprocal(amax) : 0.f;
  Raw<16> raw;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const unsigned byte = __float_as_uint(fmaf(x.x[i], inverse, 12582912.f)) & 0xffu;  // 1.5 * 2^23: to the nearest integer
    raw.word[i / 4] = i % 4 ? raw.word[i / 4] | byte << 8 * (i % 4) : byte;
  }
  return raw;
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    kda_step(const Element* q, const Element* k, const Element* v, const Element* gate_logits, const Element* beta_logits,
             const float* a_log, const float* dt_bias, const void* q_weight, const void* k_weight, const void* v_weight,
             void* q_cache, void* k_cache, void* v_cache, State* state, float* factors, Element* o, int items, int heads, int token_stride,
             int gate_stride, int beta_stride, int width, int wide_weights, int wide_caches, int normalize, int per_head, int bounded,
             float lower_bound, float strength, float scale) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory);
  const int thread = threadIdx.x, group = thread / LANES, column = thread % LANES * COLUMNS;
  const int channels = heads * D;

  float write_logit = 0.f, decay_log = 0.f;
  // Starts copying all inputs of an item: each thread its own part of the state, each warp some rows of the rest.
  auto ask = [&](int item) {
    const int thread = opaque(threadIdx.x), group = thread / LANES, column = thread % LANES * COLUMNS;  // computed again, to save registers
    const int head = item % heads, sequence = item / heads;
    write_logit = load_number(beta_logits + static_cast<long long>(sequence) * beta_stride + head);
    if (gate_logits) decay_log = a_log[head];
    const State* from = state + static_cast<long long>(item) * D * D + column;
#pragma unroll
    for (int j = 0; j < ROWS; ++j) copy_16_async(&shared.state[j * THREADS + thread], from + (j * GROUPS + group) * D);
    for (int row = thread / 32; row < 18; row += WARPS) {
      const int stream = row % 3, tap = row / 3 - 2;
      if (row < 3) {
        copy_row(shared.tokens[stream], of_stream(stream, q, k, v), static_cast<long long>(sequence) * token_stride + head * D, D, 0);
      } else if (row < 6) {
        if (width > 0)
          copy_row(shared.filters[stream], of_stream(stream, q_weight, k_weight, v_weight), static_cast<long long>(head) * D * width, D * width, wide_weights);
      } else if (tap < MAX_TAPS - 1) {
        const long long first = (static_cast<long long>(sequence) * (width - 1) + tap) * channels + head * D;
        if (tap < width - 1) copy_row(shared.caches[stream][tap], of_stream<const void*>(stream, q_cache, k_cache, v_cache), first, D, wide_caches);
      } else if (stream == 0) {
        if (gate_logits && !per_head) copy_row(shared.logits, gate_logits, static_cast<long long>(sequence) * gate_stride + head * D, D, 0);
      } else if (stream == 1) {
        if (gate_logits && !per_head) copy_row(shared.bias, dt_bias, head * D, D, 1);
      } else if (sizeof(State) == 1) {
        copy_row(shared.row_factors, factors, static_cast<long long>(item) * D, D, 1);
      }
    }
    commit_copies();
  };

  wait_for_the_launch_before();
  let_the_next_launch_begin();
  ask(blockIdx.x);
#pragma unroll 1
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    const int head = item % heads, sequence = item / heads;
    const float beta = strength * sigmoid(write_logit);
    wait_copies<0>();
    Raw<16> raw[ROWS];
#pragma unroll
    for (int j = 0; j < ROWS; ++j) {
      const uint4 x = shared.state[j * THREADS + thread];
      raw[j] = {{x.x, x.y, x.z, x.w}};
    }
    __syncthreads();

#if __CUDA_ARCH__ < 900  // for fewer registers; the compiler for later architectures does better without it
    for (int i = opaque(thread); i < 3 * D; i += THREADS) {
#else
    for (int i = thread; i < 3 * D; i += THREADS) {
#endif
      const int stream = i / D, channel = i % D;
      float y = load_either(shared.tokens[stream], channel, 0);
      if (width > 0)
        y = convolved(y, shared.filters[stream], shared.caches[stream], channel, of_stream(stream, q_cache, k_cache, v_cache),
                      static_cast<long long>(sequence) * (width - 1) * channels + head * D + channel, channels, width, wide_weights, wide_caches);
      of_stream(stream, shared.q, shared.k, shared.v)[channel] = y;
    }
    for (int i = thread; i < D; i += THREADS) {
      float g = 0.f;
      if (gate_logits) {
        const float z = per_head ? load_number(gate_logits + static_cast<long long>(sequence) * gate_stride + head) + dt_bias[head] : load_either(shared.logits, i, 0) + shared.bias[i];
        const float A = exp2_fast(LOG2E * decay_log);
        g = bounded ? lower_bound * sigmoid(A * z) : -A * softplus(z);
      }
      shared.factor[i] = exp2_fast(LOG2E * g) * (sizeof(State) == 1 ? shared.row_factors[i] : 1.f);
    }
    __syncthreads();
    if (item + gridDim.x < items) ask(item + gridDim.x);

    // The norms and q . k, computed by each warp for itself.
    float qq = 0.f, kk = 0.f, qk = 0.f;
#pragma unroll
    for (int i = 0; i < CHANNELS; ++i) {
      const float x = shared.q[i * 32 + thread % 32], y = shared.k[i * 32 + thread % 32];
      qq = fmaf(x, x, qq), kk = fmaf(y, y, kk), qk = fmaf(x, y, qk);
    }
    const float q_norm = normalize ? rsqrtf(sum_over_lanes<32>(qq) + 1e-6f) : 1.f;
    const float k_norm = normalize ? rsqrtf(sum_over_lanes<32>(kk) + 1e-6f) : 1.f;
    qk = sum_over_lanes<32>(qk) * q_norm * k_norm;

    Numbers<COLUMNS> read = {}, query = {};
#pragma unroll
    for (int j = 0; j < ROWS; ++j) {
      const int row = j * GROUPS + group;
      const unsigned nothing = sizeof(State) == 1 && j > 0 ? zero_after(query.x[0]) : 0;
#pragma unroll
      for (unsigned& word : raw[j].word) word ^= nothing;
      const float by_k = k_norm * (shared.factor[row] * shared.k[row]), by_q = q_norm * (shared.factor[row] * shared.q[row]);
#pragma unroll
      for (int i = 0; i < COLUMNS; ++i) {
        const float x = number(State{}, raw[j], i);
        read.x[i] = fmaf(x, by_k, read.x[i]);
        query.x[i] = fmaf(x, by_q, query.x[i]);
      }
    }
    store_floats<COLUMNS>(&shared.sums[0][group][column], read);
    store_floats<COLUMNS>(&shared.sums[1][group][column], query);
    __syncthreads();
    for (int i = thread; i < D; i += THREADS) {
      float from_k = 0.f, from_q = 0.f;
#pragma unroll
      for (int part = 0; part < GROUPS; ++part) from_k += shared.sums[0][part][i], from_q += shared.sums[1][part][i];
      const float c = beta * (shared.v[i] - from_k);
      shared.c[i] = c;
      store_number(o + static_cast<long long>(item) * D + i, scale * fmaf(qk, c, from_q));
    }
    __syncthreads();

    const Numbers<COLUMNS> c = load_floats<COLUMNS>(&shared.c[column]);
    State* own = state + static_cast<long long>(item) * D * D + column;
    unsigned nothing = sizeof(State) == 4 ? 0 : zero_after(c.x[0]);
#pragma unroll
    for (int j = 0; j < ROWS; ++j) {
#pragma unroll
      for (unsigned& word : raw[j].word) word ^= nothing;
      const int row = j * GROUPS + group;
      const float write = k_norm * shared.k[row];
      float factor = shared.factor[row];
      Numbers<COLUMNS> x;
#pragma unroll
      for (int i = 0; i < COLUMNS; ++i) x.x[i] = fmaf(factor, number(State{}, raw[j], i), write * c.x[i]);
      store_16(own + row * D, rounded(State{}, x, &factor).word);
      if (sizeof(State) == 1 && j % 2) nothing = zero_after(factor);
      if (sizeof(State) == 1 && column == 0) factors[static_cast<long long>(item) * D + row] = factor;
    }
  }
}
