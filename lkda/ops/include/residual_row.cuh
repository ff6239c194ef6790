// How a block divides rows of WIDTH numbers among its threads, for the norm of the residual stream.
//
// WARPS warps share a row. A thread has every LANES-th piece of it, N neighbouring numbers each.
#pragma once
#include "vector.cuh"

constexpr int N = 4, PIECES = WIDTH / N;
constexpr int WARPS = PIECES <= 128 ? 1 : PIECES <= 256 ? 2 : PIECES <= 512 ? 4 : PIECES <= 1024 ? 8 : 16;
constexpr int LANES = 32 * WARPS, OWN = (PIECES + LANES - 1) / LANES;       // pieces of a thread
constexpr int THREADS = LANES > 128 ? LANES : 128, ROWS = THREADS / LANES;  // rows that a block has at a time
constexpr int RESIDENT = 512 / THREADS;                                     // blocks that a multiprocessor should hold
static_assert(WIDTH % N == 0 && OWN <= 4, "WIDTH is a multiple of 4 up to 8192");

// The first number of a thread's piece; at WIDTH or after it there is no such piece.
__device__ __forceinline__ int column_of(int piece) { return (piece * LANES + static_cast<int>(threadIdx.x) % LANES) * N; }

// The sum over all threads of a row, in an order that depends on WIDTH alone. Each thread gets it. `shared` has a number per warp.
__device__ __forceinline__ float sum_over_row(float x, float* shared) {
  x = sum_over_lanes<32>(x);
  if constexpr (WARPS > 1) {
    const int warp = threadIdx.x / 32;
    __syncthreads();  // the sums before have been read
    if (threadIdx.x % 32 == 0) shared[warp] = x;
    __syncthreads();
    x = 0.f;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) x += shared[warp / WARPS * WARPS + i];
  }
  return x;
}

// What an element holds after the numbers are stored in it.
template <class Half>
__device__ __forceinline__ Numbers<N> rounded_to(Half, Numbers<N> x) {
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    const float2 pair = unpack(Half{}, pack(Half{}, make_float2(x.x[i], x.x[i + 1])));
    x.x[i] = pair.x;
    x.x[i + 1] = pair.y;
  }
  return x;
}
__device__ __forceinline__ Numbers<N> rounded_to(float, Numbers<N> x) { return x; }

// The residual stream's numbers: x, or x + y rounded to x's type.
template <class Stream, class Added>
__device__ __forceinline__ Numbers<N> stream_of(const Raw<N * sizeof(Stream)>& x, const Raw<N * sizeof(Added)>& y, bool add) {
  Numbers<N> sum = numbers<N>(Stream{}, x);
  if (!add) return sum;
  const Numbers<N> other = numbers<N>(Added{}, y);
#pragma unroll
  for (int i = 0; i < N; ++i) sum.x[i] += other.x[i];
  return rounded_to(Stream{}, sum);
}
