// One token of the KDA layer, from what its projections give to o, for decoding: a block has one head of one sequence. State and
// convolution caches are updated in place. With a = exp(g) and S' = Diag(a) S,
//
//     c = beta (v - S'^T k)        S = S' + k c^T        o = scale (S'^T q + (q . k) c)
//
// so that one pass over the state gives both sums, and a second one, out of registers, writes it. A thread has 16 bytes of a row
// (COLUMNS of V) in every GROUPS-th row of K. Narrow states are rounded up or down at random, by a hash of the number and its
// place (docs/decoding.md tells what that gives, and what not).
//
// STATE is float, bfloat16, or int8 with a float32 factor a row, into which the decay goes; so only writes are rounded again.
#include "activation.cuh"
#include "vector.cuh"

struct int8 {
  signed char code;
};
using Element = ELEMENT;
using State = STATE;

constexpr int D = HEAD_DIM, COLUMNS = 16 / sizeof(State), LANES = D / COLUMNS, ROWS = D / GROUPS;
constexpr int THREADS = GROUPS * LANES, CHANNELS = D / 32;

struct Shared {
  float q[D], k[D], v[D], factor[D], c[D];  // factor: the row's decay, times int8's factor
  float sums[2][GROUPS][D];  // S'^T k and S'^T q, a part for each group of rows
};

__device__ __forceinline__ float load_either(const void* at, long long i, int wide) {
  return wide ? static_cast<const float*>(at)[i] : load_number(static_cast<const Element*>(at) + i);
}
__device__ __forceinline__ void store_either(void* at, long long i, float x, int wide) {
  if (wide)
    static_cast<float*>(at)[i] = x;
  else
    store_number(static_cast<Element*>(at) + i, x);
}

// SiLU of the causal convolution; its cache [width - 1, channels] moves on by one token.
__device__ __forceinline__ float convolved(float x, const void* weight, void* cache, long long sequence, int channel,
                                           int channels, int width, int wide_weights, int wide_caches) {
  float y = x * load_either(weight, static_cast<long long>(channel) * width + width - 1, wide_weights);
  const long long first = sequence * (width - 1) * channels + channel;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    if (i >= width - 1) break;
    const float before = load_either(cache, first + static_cast<long long>(i) * channels, wide_caches);
    y = fmaf(before, load_either(weight, static_cast<long long>(channel) * width + i, wide_weights), y);
    if (i > 0) store_either(cache, first + static_cast<long long>(i - 1) * channels, before, wide_caches);
  }
  if (width > 1) store_either(cache, first + static_cast<long long>(width - 2) * channels, x, wide_caches);
  return y * sigmoid(y);
}

// 32 bits that look random, of a number and its place in the state.
__device__ __forceinline__ unsigned hash(float x, unsigned place) {
  const unsigned mixed = (__float_as_uint(x) + place * 0x9E3779B1u) * 0x85EBCA6Bu;
  return (mixed ^ mixed >> 15) * 0xC2B2AE35u;
}

// The numbers of a thread's 16 bytes; int8's without their row's factor.
__device__ __forceinline__ float number(float, const Raw<16>& raw, int i) { return __uint_as_float(raw.word[i]); }
__device__ __forceinline__ float number(bfloat16, const Raw<16>& raw, int i) {
  const unsigned word = raw.word[i / 2];
  return __uint_as_float(i % 2 ? word & 0xffff0000u : word << 16);
}
// Conversions run at an eighth of the rate: 2^23 + 128 + code is a float whose low byte is the code's, its sign flipped.
__device__ __forceinline__ float number(int8, const Raw<16>& raw, int i) {
  const unsigned word = raw.word[i / 4] ^ 0x80808080u;
  return __uint_as_float((word >> 8 * (i % 4) & 0xffu) | 0x4b000000u) - 8388736.f;
}

// A zero that the compiler does not know to be one, and must wait for x for: no arithmetic gives this NaN. Where narrow numbers
// are changed by it, they are widened then and there: not rows ahead, nor once for both passes, kept, and spilled.
__device__ __forceinline__ unsigned zero_after(float x) { return __float_as_uint(x) == 0x7fc12345u; }

// A thread's part of a row as it is stored; `place` is that of its first number. `factor` is the row's, of int8 alone.
__device__ __forceinline__ Raw<16> rounded(float, const Numbers<4>& x, unsigned, float*) {
  Raw<16> raw;
#pragma unroll
  for (int i = 0; i < 4; ++i) raw.word[i] = __float_as_uint(x.x[i]);
  return raw;
}
__device__ __forceinline__ Raw<16> rounded(bfloat16, const Numbers<8>& x, unsigned place, float*) {
  Raw<16> raw;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const unsigned bits = __float_as_uint(x.x[i]);
    const unsigned up = x.x[i] == x.x[i] ? bits + (hash(x.x[i], place + i) >> 16) : bits;  // a NaN stays one
    raw.word[i / 2] = i % 2 ? raw.word[i / 2] | (up & 0xffff0000u) : up >> 16;
  }
  return raw;
}
__device__ __forceinline__ Raw<16> rounded(int8, const Numbers<16>& x, unsigned place, float* factor) {
  float largest = 0.f, poison = 0.f;  // a NaN anywhere makes the row's factor one
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    largest = fmaxf(largest, fabsf(x.x[i]));
    poison = fmaf(0.f, x.x[i], poison);
  }
  largest += poison;
#pragma unroll
  for (int other = LANES / 2; other > 0; other /= 2) {
    const float theirs = __shfl_xor_sync(0xffffffffu, largest, other);
    largest = theirs <= largest || largest != largest ? largest : theirs;
  }
  *factor = largest * (1.f / 127.f);
  const float inverse = largest > 1e-30f ? 127.f * reciprocal(largest) : 0.f;
  Raw<16> raw;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float uniform = __uint_as_float(hash(x.x[i], place + i) >> 9 | 0x3f800000u) - 1.5f;  // in [-1/2, 1/2)
    const float code = fminf(fmaxf(fmaf(x.x[i], inverse, uniform), -127.f), 127.f);
    const unsigned byte = __float_as_uint(code + 12582912.f) & 0xffu;  // 1.5 * 2^23: to the nearest integer
    raw.word[i / 4] = i % 4 ? raw.word[i / 4] | byte << 8 * (i % 4) : byte;
  }
  return raw;
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    kda_step(const Element* q, const Element* k, const Element* v, const Element* gate_logits, const Element* beta_logits,
             const float* a_log, const float* dt_bias, const void* q_weight, const void* k_weight, const void* v_weight,
             void* q_cache, void* k_cache, void* v_cache, State* state, float* factors, Element* o, int heads, int width,
             int wide_weights, int wide_caches, int normalize, int per_head, int bounded, float lower_bound, float strength, float scale) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory);
  const int thread = threadIdx.x, group = thread / LANES, column = thread % LANES * COLUMNS;
  const long long unit = blockIdx.x, sequence = unit / heads;
  const int head = unit % heads, channels = heads * D;
  State* own = state + unit * D * D + column;

  // All of the state is asked for before anything else.
  Raw<16> raw[ROWS];
#pragma unroll
  for (int j = 0; j < ROWS; ++j) {
    const uint4 x = *reinterpret_cast<const uint4*>(own + (j * GROUPS + group) * D);
    raw[j] = {{x.x, x.y, x.z, x.w}};
  }

  for (int i = thread; i < 3 * D; i += THREADS) {
    const int stream = i / D, channel = head * D + i % D;
    const Element* x = stream == 0 ? q : stream == 1 ? k : v;
    float y = load_number(x + sequence * channels + channel);
    if (width > 0) {
      const void* weight = stream == 0 ? q_weight : stream == 1 ? k_weight : v_weight;
      void* cache = stream == 0 ? q_cache : stream == 1 ? k_cache : v_cache;
      y = convolved(y, weight, cache, sequence, channel, channels, width, wide_weights, wide_caches);
    }
    (stream == 0 ? shared.q : stream == 1 ? shared.k : shared.v)[i % D] = y;
  }
  for (int i = thread; i < D; i += THREADS) {
    float g = 0.f;
    if (gate_logits) {
      const long long at = per_head ? unit : unit * D + i;
      const float z = load_number(gate_logits + at) + dt_bias[per_head ? head : head * D + i];
      const float A = exp2_fast(LOG2E * a_log[head]);
      g = bounded ? lower_bound * sigmoid(A * z) : -A * softplus(z);
    }
    shared.factor[i] = exp2_fast(LOG2E * g) * (sizeof(State) == 1 ? factors[unit * D + i] : 1.f);
  }
  const float beta = strength * sigmoid(load_number(beta_logits + unit));
  __syncthreads();

  // Norms and q . k, by each warp for itself.
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
    store_number(o + unit * D + i, scale * fmaf(qk, c, from_q));
  }
  __syncthreads();

  const Numbers<COLUMNS> c = load_floats<COLUMNS>(&shared.c[column]);
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
    put(own + row * D, rounded(State{}, x, row * D + column, &factor));
    if (sizeof(State) == 1 && j % 2) nothing = zero_after(factor);
    if (sizeof(State) == 1 && column == 0) factors[unit * D + row] = factor;
  }
}
