// Of each row of logits: its loss, log(sum exp logits) - logits[target], and over the logits the gradient of `scale`
// times the loss, (softmax - one at the target) scale. A row without a target (IGNORE_INDEX) has a loss and a gradient of
// 0. A target that is no class gives a loss of NaN, since a kernel cannot raise an error.
//
// A block has a row and reads it twice; the second time it is still in the cache. The logits' sums are float32.
#include "vector.cuh"

using Element = ELEMENT;

constexpr int THREADS = 512, N = 16 / sizeof(Element), WARPS = THREADS / 32;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

// The sum over the block of sums 2^-top sum, as if each had the largest top.
__device__ __forceinline__ float2 combine(float2 a, float2 b) {
  const float top = fmaxf(a.x, b.x);
  return make_float2(top, a.y * exp2f(a.x - top) + b.y * exp2f(b.x - top));
}

extern "C" __global__ void __launch_bounds__(THREADS)
    cross_entropy_rows(Element* logits, const long long* targets, const float* scale, float* losses, int classes) {
  __shared__ float2 parts[WARPS];
  const long long row = blockIdx.x;
  Element* const at = logits + row * classes;
  const long long target = targets[row];
  const int whole = classes / N * N;  // a row that 16 bytes do not divide ends in single elements

  // (top, sum of 2^(x log2 e - top)); a top that is not -inf, so that no difference is NaN.
  float2 mine = make_float2(-3.0e38f, 0.f);
  for (int i = threadIdx.x * N; i < whole; i += THREADS * N) {
    Raw<16> raw;
    raw = *reinterpret_cast<const Raw<16>*>(at + i);
    const Numbers<N> x = numbers<N>(Element{}, raw);
    float top = mine.x;
#pragma unroll
    for (int j = 0; j < N; ++j) top = fmaxf(top, x.x[j] * LOG2E);
    float sum = mine.y * exp2f(mine.x - top);
#pragma unroll
    for (int j = 0; j < N; ++j) sum += exp2f(fmaf(x.x[j], LOG2E, -top));
    mine = make_float2(top, sum);
  }
  for (int i = whole + threadIdx.x; i < classes; i += THREADS) {
    mine = combine(mine, make_float2(load_number(at + i) * LOG2E, 1.f));
  }
#pragma unroll
  for (int other = 16; other > 0; other /= 2) {
    const float2 theirs =
        make_float2(__shfl_xor_sync(0xffffffffu, mine.x, other), __shfl_xor_sync(0xffffffffu, mine.y, other));
    mine = combine(mine, theirs);
  }
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = mine;
  const bool has_target = target != IGNORE_INDEX, is_class = target >= 0 && target < classes;
  const float wanted = is_class ? load_number(at + target) : __uint_as_float(0x7fc00000u);  // NaN
  __syncthreads();
  float2 all = parts[0];
  for (int i = 1; i < WARPS; ++i) all = combine(all, parts[i]);
  const float log_sum = all.x + log2f(all.y);  // to the base 2
  if (threadIdx.x == 0) losses[row] = has_target ? log_sum * LN2 - wanted : 0.f;

  const float factor = has_target ? *scale : 0.f;
  for (int i = threadIdx.x * N; i < whole; i += THREADS * N) {
    Raw<16> raw;
    raw = *reinterpret_cast<const Raw<16>*>(at + i);
    Numbers<N> x = numbers<N>(Element{}, raw);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      x.x[j] = (exp2f(fmaf(x.x[j], LOG2E, -log_sum)) - (i + j == target ? 1.f : 0.f)) * factor;
    }
    store_numbers<N>(at + i, x);
  }
  for (int i = whole + threadIdx.x; i < classes; i += THREADS) {
    const float share = exp2f(fmaf(load_number(at + i), LOG2E, -log_sum));
    store_number(at + i, (share - (i == target ? 1.f : 0.f)) * factor);
  }
}
