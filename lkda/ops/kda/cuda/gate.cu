// The gates of a KDA layer: from logits to g and beta, and the gradients back.
//
//     softplus: g = -exp(A_log) softplus(x + bias)        bounded: g = lower_bound sigmoid(exp(A_log) (x + bias))
//     beta = strength sigmoid(y)
//
// x and bias have one number per channel, or with PER_HEAD one per head, which its channels share. The first `gate_blocks` blocks
// compute g: each has 32 N channels and WARPS runs of tokens, and the channels vary fastest. The other blocks compute beta. A thread
// keeps its channels' bias for all its tokens. In the backward the gradients of bias and A_log are summed in a fixed order: over a
// warp's tokens, over the block's warps, and (column_sums.cu) over the blocks, from partials [runs of WARPS, biases + heads].
#include "activation.cuh"
#include "vector.cuh"

using Element = ELEMENT;

constexpr int N = 16 / sizeof(Element);  // channels per thread
constexpr int LANES = HEAD_DIM / N;      // lanes per head
constexpr int WARPS = 8, THREADS = 32 * WARPS, AHEAD = 4;

struct Place {
  int start, channel, head, line;
  bool inside;  // lanes past the last channel compute channel 0 and store nothing

  __device__ Place(int channels, int run) {
    const int columns = (channels + 32 * N - 1) / (32 * N);
    const int block = blockIdx.x;
    line = block / columns;
    start = (line * WARPS + static_cast<int>(threadIdx.x) / 32) * run;
    channel = (block % columns * 32 + static_cast<int>(threadIdx.x) % 32) * N;
    inside = channel < channels;
    if (!inside) channel = 0;
    head = channel / HEAD_DIM;
  }
};

// The logits of a thread's channels at a token; with PER_HEAD that of its head, N times.
__device__ __forceinline__ Numbers<N> logits_at(const Element* logits, long long token, const Place& at, int channels) {
  if constexpr (PER_HEAD) {
    const float x = load_number(logits + token * (channels / HEAD_DIM) + at.head);
    Numbers<N> all;
#pragma unroll
    for (int i = 0; i < N; ++i) all.x[i] = x;
    return all;
  } else {
    return load_numbers<N>(logits + token * channels + at.channel);
  }
}

__device__ __forceinline__ Numbers<N> bias_of(const float* bias, const Place& at) {
  if constexpr (PER_HEAD) {
    Numbers<N> all;
#pragma unroll
    for (int i = 0; i < N; ++i) all.x[i] = bias[at.head];
    return all;
  } else {
    return load_floats<N>(bias + at.channel);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    kda_gate(const Element* logits, const Element* strengths, const float* a_log, const float* bias, float* g, float* beta,
             int gate_blocks, int run, int tokens, int channels, int bounded, float lower_bound, float strength) {
  if (static_cast<int>(blockIdx.x) >= gate_blocks) {
    const int at = (blockIdx.x - gate_blocks) * THREADS + threadIdx.x;
    if (at < tokens * (channels / HEAD_DIM)) beta[at] = strength * sigmoid(load_number(strengths + at));
    return;
  }
  const Place at(channels, run);
  const int stop = min(tokens, at.start + run);
  if (at.start >= stop) return;
  const float A = exp2_fast(LOG2E * a_log[at.head]);
  const Numbers<N> shift = bias_of(bias, at);
  for (int first = at.start; first < stop; first += AHEAD) {
    Numbers<N> x[AHEAD];
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) x[j] = logits_at(logits, min(first + j, stop - 1), at, channels);
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float z = x[j].x[i] + shift.x[i];
        x[j].x[i] = bounded ? lower_bound * sigmoid(A * z) : -A * softplus(z);
      }
      if (at.inside && first + j < stop) store_floats<N>(g + static_cast<long long>(first + j) * channels + at.channel, x[j]);
    }
  }
}

// dx = dg -A sigmoid(x + bias), or dg g (1 - sigmoid(A (x + bias))) A;  dbias = sum dx;  dA_log = sum dg g, or sum dx (x + bias)
extern "C" __global__ void __launch_bounds__(THREADS)
    kda_gate_backward(const Element* logits, const Element* strengths, const float* a_log, const float* bias, const float* dg,
                      const float* dbeta, Element* dlogits, Element* dstrengths, float* partials, int gate_blocks, int run,
                      int tokens, int channels, int bounded, float lower_bound, float strength) {
  const int heads = channels / HEAD_DIM;
  if (static_cast<int>(blockIdx.x) >= gate_blocks) {
    const int at = (blockIdx.x - gate_blocks) * THREADS + threadIdx.x;
    if (at < tokens * heads) {
      const float s = sigmoid(load_number(strengths + at));
      store_number(dstrengths + at, dbeta[at] * strength * s * (1.f - s));
    }
    return;
  }
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const Place at(channels, run);
  const int stop = min(tokens, at.start + run), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float A = exp2_fast(LOG2E * a_log[at.head]);
  const Numbers<N> shift = bias_of(bias, at);
  Numbers<N> dbias;
  float da_log = 0.f;
#pragma unroll
  for (int i = 0; i < N; ++i) dbias.x[i] = 0.f;

  for (int first = at.start; first < stop; first += AHEAD / 2) {
    Numbers<N> x[AHEAD / 2], slope[AHEAD / 2];
#pragma unroll
    for (int j = 0; j < AHEAD / 2; ++j) {
      const long long token = min(first + j, stop - 1);
      x[j] = logits_at(logits, token, at, channels);
      slope[j] = load_floats<N>(dg + token * channels + at.channel);
    }
#pragma unroll
    for (int j = 0; j < AHEAD / 2; ++j) {
      const bool mine = first + j < stop;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float upper = mine ? slope[j].x[i] : 0.f, z = x[j].x[i] + shift.x[i];
        if (bounded) {
          const float s = sigmoid(A * z);
          x[j].x[i] = upper * lower_bound * s * (1.f - s) * A;
          da_log = fmaf(x[j].x[i], z, da_log);
        } else {
          x[j].x[i] = upper * -A * sigmoid(z);
          da_log = fmaf(upper * -A, softplus(z), da_log);
        }
      }
      const long long token = first + j;
      if constexpr (PER_HEAD) {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < N; ++i) sum += x[j].x[i];
        sum = sum_over_lanes<LANES>(sum);
        dbias.x[0] += sum;
        if (mine && at.inside && lane % LANES == 0) store_number(dlogits + token * heads + at.head, sum);
      } else {
#pragma unroll
        for (int i = 0; i < N; ++i) dbias.x[i] += x[j].x[i];
        if (mine && at.inside) store_numbers<N>(dlogits + token * channels + at.channel, x[j]);
      }
    }
  }

  // Sums over the block's warps: [WARPS][N + 1][32 lanes].
  float* shared = reinterpret_cast<float*>(shared_memory);
  da_log = sum_over_lanes<LANES>(da_log);
#pragma unroll
  for (int i = 0; i < N; ++i) shared[(warp * (N + 1) + i) * 32 + lane] = dbias.x[i];
  shared[(warp * (N + 1) + N) * 32 + lane] = da_log;
  __syncthreads();
  const int biases = PER_HEAD ? heads : channels;
  float* line = partials + static_cast<long long>(at.line) * (biases + heads);
  for (int which = warp; which <= N; which += WARPS) {
    float sum = 0.f;
#pragma unroll
    for (int other = 0; other < WARPS; ++other) sum += shared[(other * (N + 1) + which) * 32 + lane];
    const bool leader = lane % LANES == 0;
    if (!at.inside) continue;
    if (which == N) {
      if (leader) line[biases + at.head] = sum;
    } else if (!PER_HEAD) {
      line[at.channel + which] = sum;
    } else if (which == 0 && leader) {
      line[at.head] = sum;
    }
  }
}
