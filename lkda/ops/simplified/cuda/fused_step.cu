// One token of the layer of simplified linear attention for decoding, from the outputs of its projections to o. With x' = SiLU(conv(x)),
// or x where there are no convolutions,
//
//     b = sigmoid(logit + bias)    num = b num + sigmoid(k') v'    den = b den + sigmoid(k')    o = q' num / (den + 1e-30)
//
// The state (num, den) and the caches of the convolutions are updated in place. A thread has one channel of one sequence. With few
// sequences the time is that of one access to memory, so a thread loads all that it needs before it computes.
#include "overlap.cuh"
#include "vector.cuh"

using Element = ELEMENT;
using Weight = WEIGHT;
using Cache = CACHE;

constexpr int MAX_TAPS = 4;

// What the convolution of a channel needs. Taps and past inputs are numbered by their distance from this token; those beyond the
// filter's width are 0.
struct Channel {
  float x, taps[MAX_TAPS], past[MAX_TAPS];
};

// `cache` is that of the sequence and the channel.
__device__ __forceinline__ Channel load_channel(const Element* x, const Weight* filter, const Cache* cache, int channels, int width) {
  Channel c;
  c.x = load_number(x);
#pragma unroll
  for (int lag = 0; lag < MAX_TAPS; ++lag) {
    c.taps[lag] = lag < width ? load_number(filter + width - 1 - lag) : 0.f;
    c.past[lag] = lag > 0 && lag < width ? load_number(cache + static_cast<long long>(width - 1 - lag) * channels) : 0.f;
  }
  return c;
}

// SiLU of the convolution. Moves the cache on by one token.
__device__ __forceinline__ float convolved(const Channel& c, Cache* cache, int channels, int width) {
  if (width == 0) return c.x;
  float y = c.x * c.taps[0];
#pragma unroll
  for (int lag = 1; lag < MAX_TAPS; ++lag) {
    if (lag >= width) break;
    y = fmaf(c.past[lag], c.taps[lag], y);
    store_number(cache + static_cast<long long>(width - 1 - lag) * channels, lag == 1 ? c.x : c.past[lag - 1]);
  }
  return y * sigmoid(y);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    simplified_fused_step(const Element* q, const Element* k, const Element* v, const void* logits, const float* bias,
                          const Weight* q_weight, const Weight* k_weight, const Weight* v_weight, Cache* q_cache, Cache* k_cache,
                          Cache* v_cache, float* state, Element* o, int channels, int head_dim, int q_stride, int k_stride, int v_stride,
                          int logits_stride, int wide_logits, int width) {
  wait_for_the_launch_before();
  let_the_next_launch_begin();
  const int blocks = (channels + THREADS - 1) / THREADS;  // of a sequence
  const int channel = blockIdx.x % blocks * THREADS + threadIdx.x;
  const long long sequence = blockIdx.x / blocks;
  if (channel >= channels) return;
  const int head = channel / head_dim;

  const long long first = sequence * (width - 1) * channels + channel;
  const int filter = channel * width;
  const Channel query = load_channel(q + sequence * q_stride + channel, q_weight + filter, q_cache + first, channels, width);
  const Channel key = load_channel(k + sequence * k_stride + channel, k_weight + filter, k_cache + first, channels, width);
  const Channel value = load_channel(v + sequence * v_stride + channel, v_weight + filter, v_cache + first, channels, width);
  float logit = bias[head];
  if (logits) {
    const long long at = sequence * logits_stride + head;
    logit += wide_logits ? static_cast<const float*>(logits)[at] : load_number(static_cast<const Element*>(logits) + at);
  }
  float* own = state + sequence * 2 * channels + head * head_dim + channel;  // num; den is head_dim further on
  float num = own[0], den = own[head_dim];

  const float r = convolved(query, q_cache + first, channels, width);
  const float b = sigmoid(logit), s = sigmoid(convolved(key, k_cache + first, channels, width));
  const float y = convolved(value, v_cache + first, channels, width);
  num = fmaf(b, num, s * y);
  den = fmaf(b, den, s);
  own[0] = num;
  own[head_dim] = den;
  store_number(o + sequence * channels + channel, r * (num * reciprocal(den + 1e-30f)));
}
