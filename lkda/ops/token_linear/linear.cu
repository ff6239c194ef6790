// y = W x for the tokens of a decoding step, a token per sequence, with what comes before and after the product:
//
//   PROLOGUE 0: x as it is. With several groups, output row r reads group r / group_rows of x.
//   PROLOGUE 1: RMSNorm of x. The norm's factor is one number per token, so it multiplies the finished sums.
//   PROLOGUE 2: RMSNorm of each head of x, times sigmoid(gate) where a gate is given.
//   SWIGLU 0: y = W x, or y += W x if `adds`.
//   SWIGLU 1: y = SiLU(W_first x) * (W_second x), with the halves of W.
//
// The time is that of reading W. `split` warps share OUT rows of W, so that long rows do not make few warps read for long. Each lane
// reads 16 bytes of a row at once, every 32nd of its warp's. The lane that has a part of W has the same part of x, of every token, so
// that only the sums of warps that share a row go through shared memory.
//
// The launch may begin before the one that it depends on has ended. Up to `wait_for_the_launch_before` it reads only W and the norm's weight,
// which no launch writes.
#include "overlap.cuh"
#include "vector.cuh"

using Element = ELEMENT;

constexpr int N = 16 / sizeof(Element);    // elements that a lane reads at once
constexpr int THREADS = 128, WARPS = THREADS / 32;
constexpr int AHEAD = 4;                   // parts of a row of W that a lane asks for before x is known
constexpr int MATRICES = SWIGLU ? 2 : 1;

extern "C" __global__ void __launch_bounds__(THREADS)
    token_linear(const Element* x, const Element* gate, const float* norm, const Element* weight, Element* y, int inputs, int outputs,
                 int tokens, int x_stride, int gate_stride, int y_stride, int group_rows, int head_dim, int split, int adds, float eps) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  auto& partial = *reinterpret_cast<float(*)[WARPS][MATRICES * OUT + 1][TOKENS]>(shared_memory);
  const int warp = threadIdx.x / 32, begin = warp % split * 32 + threadIdx.x % 32, parts = inputs / N;
  const int first = (blockIdx.x * (WARPS / split) + warp / split) * OUT;
  const int stride = 32 * split;  // parts of a row that its warps read at once
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
        if (begin + stride * i < parts) fetch(ahead[m][o][i], row_of(m, o) + (begin + stride * i) * N);
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
    if (PROLOGUE == 2) scale = load_floats<N>(norm + at % head_dim);
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      const int token = t < tokens ? t : 0;  // without a branch, so that all tokens are asked for at once
      const Element* own = x + static_cast<long long>(token) * x_stride + at;
      if (PROLOGUE == 0) own += first / group_rows * inputs;
      Numbers<N> value = read_numbers<N>(own);
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
        for (int other = head_dim / N / 2; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
        const float r = rsqrtf(sum / head_dim + eps);
#pragma unroll
        for (int i = 0; i < N; ++i) value.x[i] *= r * scale.x[i];
        if (gate != nullptr) {
          const Numbers<N> open = read_numbers<N>(gate + static_cast<long long>(token) * gate_stride + at);
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
    if (stride * i >= parts) break;
#pragma unroll
    for (int m = 0; m < MATRICES; ++m)
#pragma unroll
      for (int o = 0; o < OUT; ++o) now[m][o] = ahead[m][o][i];
    add(begin + stride * i, now);
  }
#pragma unroll 2
  for (int part = begin + stride * AHEAD; part - begin < parts; part += stride) {
#pragma unroll
    for (int m = 0; m < MATRICES; ++m)
#pragma unroll
      for (int o = 0; o < OUT; ++o)
        if (part < parts) fetch(now[m][o], row_of(m, o) + part * N);
    add(part, now);
  }

  // The sums of a warp, then of the warps that share its rows. One lane has the results.
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) {
    if (PROLOGUE == 1) squares[t] = sum_over_lanes<32>(squares[t]);
#pragma unroll
    for (int m = 0; m < MATRICES; ++m)
#pragma unroll
      for (int o = 0; o < OUT; ++o) sums[m][o][t] = sum_over_lanes<32>(sums[m][o][t]);
  }
  if (split > 1) {
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int t = 0; t < TOKENS; ++t) {
        partial[warp][MATRICES * OUT][t] = squares[t];
#pragma unroll
        for (int r = 0; r < MATRICES * OUT; ++r) partial[warp][r][t] = sums[r / OUT][r % OUT][t];
      }
    }
    __syncthreads();
    if (begin > 0) return;
#pragma unroll
    for (int other = 1; other < WARPS; ++other) {
      if (other >= split) break;
#pragma unroll
      for (int t = 0; t < TOKENS; ++t) {
        squares[t] += partial[warp + other][MATRICES * OUT][t];
#pragma unroll
        for (int r = 0; r < MATRICES * OUT; ++r) sums[r / OUT][r % OUT][t] += partial[warp + other][r][t];
      }
    }
  }
  if (begin > 0) return;
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) {
    if (t >= tokens) break;
    const float r = PROLOGUE == 1 ? rsqrtf(squares[t] / inputs + eps) : 1.f;
#pragma unroll
    for (int o = 0; o < OUT; ++o) {
      float result = r * sums[0][o][t];
      if (SWIGLU) result *= sigmoid(result) * r * sums[MATRICES - 1][o][t];
      Element* to = y + static_cast<long long>(t) * y_stride + first + o;
      if (first + o < outputs) store_number(to, adds ? load_number(to) + result : result);
    }
  }
}
