// N neighbouring elements that one thread loads or stores at once: 8 or 16 bytes, aligned to their size.
#pragma once
#include "numeric.cuh"

// The elements in memory's type.
template <int BYTES>
struct Raw {
  unsigned word[BYTES / 4];
};

// Loads from memory that the kernel does not write.
__device__ __forceinline__ void fetch(Raw<8>& raw, const void* at) {
  const uint2 x = __ldg(static_cast<const uint2*>(at));
  raw = {{x.x, x.y}};
}
__device__ __forceinline__ void fetch(Raw<16>& raw, const void* at) {
  const uint4 x = __ldg(static_cast<const uint4*>(at));
  raw = {{x.x, x.y, x.z, x.w}};
}
__device__ __forceinline__ void put(void* at, const Raw<8>& raw) { *static_cast<uint2*>(at) = {raw.word[0], raw.word[1]}; }
__device__ __forceinline__ void put(void* at, const Raw<16>& raw) {
  *static_cast<uint4*>(at) = {raw.word[0], raw.word[1], raw.word[2], raw.word[3]};
}

// The elements in float32.
template <int N>
struct Numbers {
  float x[N];
};

template <int N, class Half>
__device__ __forceinline__ Numbers<N> numbers(Half, const Raw<2 * N>& raw) {
  Numbers<N> y;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const float2 pair = unpack(Half{}, raw.word[i]);
    y.x[2 * i] = pair.x;
    y.x[2 * i + 1] = pair.y;
  }
  return y;
}
template <int N>
__device__ __forceinline__ Numbers<N> numbers(float, const Raw<4 * N>& raw) {
  Numbers<N> y;
#pragma unroll
  for (int i = 0; i < N; ++i) y.x[i] = __uint_as_float(raw.word[i]);
  return y;
}

template <int N, class Half>
__device__ __forceinline__ Numbers<N> load_numbers(const Half* at) {
  Raw<N * static_cast<int>(sizeof(Half))> raw;
  fetch(raw, at);
  return numbers<N>(Half{}, raw);
}
// Loads 16 bytes of what an earlier launch may still have been writing when this one began. `load_numbers` must not be used there: it
// assumes that nothing writes them.
template <int N, class Half>
__device__ __forceinline__ Numbers<N> read_numbers(const Half* at) {
  const uint4 x = *reinterpret_cast<const uint4*>(at);
  return numbers<N>(Half{}, Raw<16>{{x.x, x.y, x.z, x.w}});
}
// Loads N float32 numbers, 16 bytes at a time.
template <int N>
__device__ __forceinline__ Numbers<N> load_floats(const float* at) {
  Numbers<N> y;
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const float4 x = *reinterpret_cast<const float4*>(at + i);
    y.x[i] = x.x;
    y.x[i + 1] = x.y;
    y.x[i + 2] = x.z;
    y.x[i + 3] = x.w;
  }
  return y;
}
template <int N>
__device__ __forceinline__ void store_floats(float* at, const Numbers<N>& x) {
#pragma unroll
  for (int i = 0; i < N; i += 4) *reinterpret_cast<float4*>(at + i) = {x.x[i], x.x[i + 1], x.x[i + 2], x.x[i + 3]};
}

template <int N, class Half>
__device__ __forceinline__ void store_numbers(Half* at, const Numbers<N>& x) {
  Raw<2 * N> raw;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) raw.word[i] = pack(Half{}, make_float2(x.x[2 * i], x.x[2 * i + 1]));
  put(at, raw);
}
template <int N>
__device__ __forceinline__ void store_numbers(float* at, const Numbers<N>& x) {
  store_floats<N>(at, x);
}

// The sum over LANES neighbouring lanes (a power of two). Each lane gets it.
template <int LANES>
__device__ __forceinline__ float sum_over_lanes(float x) {
#pragma unroll
  for (int other = LANES / 2; other > 0; other /= 2) x += __shfl_xor_sync(0xffffffffu, x, other);
  return x;
}

// Loads or stores one element.
template <class Half>
__device__ __forceinline__ float load_number(const Half* at) {
  return unpack(Half{}, static_cast<unsigned>(at->bits)).x;
}
__device__ __forceinline__ float load_number(const float* at) { return *at; }
template <class Half>
__device__ __forceinline__ void store_number(Half* at, float x) {
  at->bits = static_cast<unsigned short>(pack(Half{}, make_float2(x, 0.f)));
}
__device__ __forceinline__ void store_number(float* at, float x) { *at = x; }
