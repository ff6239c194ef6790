// y = W x for the tokens of a decoding step, a token per sequence, with what comes before and after the product:
//
//   PROLOGUE 0: x as it is. With several groups, output row r reads group r / group_rows of x.
//   PROLOGUE 1: RMSNorm of x. The norm's factor is one number per token, so it multiplies the finished sums.
//   PROLOGUE 2: RMSNorm of each head of x, times sigmoid(gate) where a gate is given.
//   EPILOGUE 0: y = W x.    EPILOGUE 1: y += W x.    EPILOGUE 2: y = SiLU(W_first x) * (W_second x), the halves of W.
//
// The time is that of reading W. A warp has OUT rows of W; its lanes read 16 bytes each, every 32nd. The lanes that have a part of W
// have the same part of x, of every token, so that nothing goes through shared memory.
//
// The launch may begin before the one that it depends on has ended. Up to `wait_for_the_launch_before` it reads only W and the norm's weight,
// which no launch writes.
#include "overlap.cuh"
#include "vector.cuh"

using Element = ELEMENT;

constexpr int N = 16 / sizeof(Element);    // elements that a lane reads at once
constexpr int THREADS = 128, WARPS = THREADS / 32;
constexpr int AHEAD = 4;                   // parts of a row of W that are asked for before x is known
constexpr int MATRICES = EPILOGUE == 2 ? 2 : 1;
constexpr int LANES = PROLOGUE == 2 ? HEAD_DIM / N : 1;  // that share a head

// Loads what the launch before this one may have written. `fetch` must not be used: it assumes that nothing writes it.
__device__ __forceinline__ Numbers<N> read(const Element* at) {
  const uint4 x = *reinterpret_cast<const uint4*>(at);
  return numbers<N>(Element{}, Raw<16>{{x.x, x.y, x.z, x.w}});
}

extern "C" __global__ void __launch_bounds__(THREADS)
    token_linear(const Element* x, const Element* gate, const float* norm, const Element* weight, Element* y, int inputs, int outputs,
                 int tokens, int x_stride, int gate_stride, int y_stride, int group_rows, float eps) {
  const int lane = threadIdx.x % 32, parts = inputs / N;
  const int first = (blockIdx.x * WARPS + threadIdx.x / 32) * OUT;
  let_the_next_launch_begin();

  // Row `o` of matrix `m`; a row past the end is read as the last one and not stored.
  auto row_of = [&](int m, int o) {
    const int row = first + o;
    return weight + static_cast<long long>(m * outputs + (row < outputs ? row : outputs - 1)) * inputs;
  };
  Raw<16> ahead[MATRICES][OUT][AHEAD];
#pragma unroll
  for (int m = 0; m < MATRICES; ++m)
#pragma unroll
    for (int o = 0; o < OUT; ++o)
#pragma unroll
      for (int i = 0; i < AHEAD; ++i)
        if (lane + 32 * i < parts) fetch(ahead[m][o][i], row_of(m, o) + (lane + 32 * i) * N);
  wait_for_the_launch_before();

  float sums[MATRICES][OUT][TOKENS] = {}, squares[TOKENS] = {};
  auto add = [&](int part, const Raw<16> (&raw)[MATRICES][OUT]) {
    const bool inside = part < parts;
    const int at = inside ? part * N : 0;
    Numbers<N> w[MATRICES][OUT];
#pragma unroll
    for (int m = 0; m < MATRICES; ++m)
#pragma unroll
      for (int o = 0; o < OUT; ++o) w[m][o] = numbers<N>(Element{}, raw[m][o]);
    Numbers<N> scale;
    if (PROLOGUE == 1) scale = load_floats<N>(norm + at);
    if (PROLOGUE == 2) scale = load_floats<N>(norm + at % HEAD_DIM);
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      if (t > 0 && t >= tokens) break;
      const Element* own = x + static_cast<long long>(t) * x_stride + at;
      if (PROLOGUE == 0) own += first / group_rows * inputs;
      Numbers<N> value = read(own);
      if (PROLOGUE == 1) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          if (inside) squares[t] = fmaf(value.x[i], value.x[i], squares[t]);
          value.x[i] *= scale.x[i];
        }
      }
      if (PROLOGUE == 2) {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < N; ++i) sum = fmaf(value.x[i], value.x[i], sum);
        const float r = rsqrtf(sum_over_lanes<LANES>(sum) * (1.f / HEAD_DIM) + eps);
#pragma unroll
        for (int i = 0; i < N; ++i) value.x[i] *= r * scale.x[i];
        if (gate != nullptr) {
          const Numbers<N> open = read(gate + static_cast<long long>(t) * gate_stride + at);
#pragma unroll
          for (int i = 0; i < N; ++i) value.x[i] *= sigmoid(open.x[i]);
        }
      }
      if (inside) {
#pragma unroll
        for (int m = 0; m < MATRICES; ++m)
#pragma unroll
          for (int o = 0; o < OUT; ++o)
#pragma unroll
            for (int i = 0; i < N; ++i) sums[m][o][t] = fmaf(w[m][o].x[i], value.x[i], sums[m][o][t]);
      }
    }
  };
  Raw<16> now[MATRICES][OUT];
#pragma unroll
  for (int i = 0; i < AHEAD; ++i) {
    if (32 * i >= parts) break;
#pragma unroll
    for (int m = 0; m < MATRICES; ++m)
#pragma unroll
      for (int o = 0; o < OUT; ++o) now[m][o] = ahead[m][o][i];
    add(lane + 32 * i, now);
  }
#pragma unroll 2
  for (int part = lane + 32 * AHEAD; part - lane < parts; part += 32) {
#pragma unroll
    for (int m = 0; m < MATRICES; ++m)
#pragma unroll
      for (int o = 0; o < OUT; ++o)
        if (part < parts) fetch(now[m][o], row_of(m, o) + part * N);
    add(part, now);
  }

#pragma unroll
  for (int t = 0; t < TOKENS; ++t) {
    if (t > 0 && t >= tokens) break;
    const float r = PROLOGUE == 1 ? rsqrtf(sum_over_lanes<32>(squares[t]) / inputs + eps) : 1.f;
#pragma unroll
    for (int o = 0; o < OUT; ++o) {
      float result = r * sum_over_lanes<32>(sums[0][o][t]);
      if (EPILOGUE == 2) result *= sigmoid(result) * r * sum_over_lanes<32>(sums[MATRICES - 1][o][t]);
      Element* to = y + static_cast<long long>(t) * y_stride + first + o;
      if (lane == 0 && first + o < outputs) store_number(to, EPILOGUE == 1 ? load_number(to) + result : result);
    }
  }
}
