// What a kernel's source takes for granted of CUDA, for a host compiler. Threads of a block, or of a cluster, are fibers that run in turn and
// give way at barriers and warp-wide instructions: arithmetic and indices are checked, races and timing are not.
#pragma once
#include "standard.h"

#define __device__
#define __global__
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(n) __attribute__((aligned(n)))

struct float2 {
  float x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct int4 {
  int x, y, z, w;
};
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
struct uint4 {
  unsigned x, y, z, w;
};
struct Dim {
  unsigned x, y, z;
};
extern Dim threadIdx, blockIdx, gridDim;
extern unsigned char* shared_memory;  // of the running thread's block

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, 4);
  return bits;
}
template <class T>
T __ldg(const T* at) {
  return *at;
}
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
template <class T>
T min(T a, T b) {
  return a < b ? a : b;
}

// What the lanes of a warp show each other.
struct Exchange {
  unsigned word[32][6];
  const void* address[32];
};
Exchange& exchange();
void warp_barrier();
void __syncthreads();
inline void __syncwarp() { warp_barrier(); }

inline float __shfl_sync(unsigned, float x, int lane) {
  exchange().word[threadIdx.x % 32][0] = __float_as_uint(x);
  warp_barrier();
  const float y = __uint_as_float(exchange().word[lane][0]);
  warp_barrier();
  return y;
}
inline int __shfl_sync(unsigned mask, int x, int lane) { return static_cast<int>(__float_as_uint(__shfl_sync(mask, __uint_as_float(static_cast<unsigned>(x)), lane))); }
inline int __shfl_up_sync(unsigned, int x, int lanes) {
  exchange().word[threadIdx.x % 32][0] = static_cast<unsigned>(x);
  warp_barrier();
  const int lane = static_cast<int>(threadIdx.x % 32) - lanes, y = static_cast<int>(exchange().word[lane < 0 ? 0 : lane][0]);
  warp_barrier();
  return lane < 0 ? x : y;
}
inline unsigned __reduce_max_sync(unsigned, unsigned x) {
  exchange().word[threadIdx.x % 32][0] = x;
  warp_barrier();
  unsigned largest = 0;
  for (int lane = 0; lane < 32; ++lane) largest = max(largest, exchange().word[lane][0]);
  warp_barrier();
  return largest;
}
inline unsigned __reduce_or_sync(unsigned, unsigned x) {
  exchange().word[threadIdx.x % 32][0] = x;
  warp_barrier();
  unsigned all = 0;
  for (int lane = 0; lane < 32; ++lane) all |= exchange().word[lane][0];
  warp_barrier();
  return all;
}
inline float __shfl_xor_sync(unsigned mask, float x, int lanes) { return __shfl_sync(mask, x, threadIdx.x % 32 ^ lanes); }
