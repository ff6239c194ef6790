// Element types in memory and their float32 values, in pairs. No toolkit header: NVRTC parses nothing else.
#pragma once

// x, of which the compiler knows nothing: what follows from it is computed where it is needed, not held in registers.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

struct bfloat16 {
  unsigned short bits;
};
struct float16 {
  unsigned short bits;
};

// Two neighbours as they lie in memory.
template <class Element>
struct PairOf {
  using type = unsigned;
};
template <>
struct PairOf<float> {
  using type = float2;
};
template <class Element>
using Pair = typename PairOf<Element>::type;

// Two neighbours in one 32-bit word, the first in the low half.
__device__ __forceinline__ float2 unpack(bfloat16, unsigned pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

__device__ __forceinline__ float2 unpack(float16, unsigned pair) {
  float2 x;
  asm("{.reg .f16 l, h;\n mov.b32 {l, h}, %2;\n cvt.f32.f16 %0, l;\n cvt.f32.f16 %1, h;}"
      : "=f"(x.x), "=f"(x.y)
      : "r"(pair));
  return x;
}

__device__ __forceinline__ float2 unpack(float, float2 pair) { return pair; }

__device__ __forceinline__ unsigned pack(bfloat16, float2 x) {
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(x.y), "f"(x.x));
  return pair;
}

__device__ __forceinline__ unsigned pack(float16, float2 x) {
  unsigned pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(x.y), "f"(x.x));
  return pair;
}

// Two neighbours at an address of either's alignment times two.
template <class Half>
__device__ __forceinline__ float2 load_pair(const Half* at) {
  return unpack(Half{}, *reinterpret_cast<const unsigned*>(at));
}

__device__ __forceinline__ float2 load_pair(const float* at) { return *reinterpret_cast<const float2*>(at); }

template <class Half>
__device__ __forceinline__ void store_pair(Half* at, float2 x) {
  *reinterpret_cast<unsigned*>(at) = pack(Half{}, x);
}

__device__ __forceinline__ void store_pair(float* at, float2 x) { *reinterpret_cast<float2*>(at) = x; }

// The same for global memory that nobody reads soon (first to leave the caches), if `wanted`. A predicate of the store alone:
// of an `if`, the compiler makes a branch, moves the arithmetic of x into it, and overlaps it with nothing.
template <class Half>
__device__ __forceinline__ void stream_pair_if(bool wanted, Half* at, float2 x) {
  asm volatile("{.reg .pred p;\n setp.ne.s32 p, %0, 0;\n @p st.global.cs.b32 [%1], %2;}" ::"r"(int(wanted)), "l"(at),
               "r"(pack(Half{}, x))
               : "memory");
}

__device__ __forceinline__ void stream_pair_if(bool wanted, float* at, float2 x) {
  asm volatile("{.reg .pred p;\n setp.ne.s32 p, %0, 0;\n @p st.global.cs.v2.f32 [%1], {%2, %3};}" ::"r"(int(wanted)), "l"(at),
               "f"(x.x), "f"(x.y)
               : "memory");
}

// 16 bytes to global memory at once. Of a uint4 whose parts it knows the compiler may make four stores.
__device__ __forceinline__ void store_16(void* at, const unsigned (&word)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3]) : "memory");
}

// The greater, or NaN where either is.
__device__ __forceinline__ float max_or_nan(float x, float y) {
  float greater;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(greater) : "f"(x), "f"(y));
  return greater;
}

// -infinity, repeated through a 32-bit word.
__device__ __forceinline__ constexpr unsigned minus_infinity(bfloat16) { return 0xff80ff80u; }
__device__ __forceinline__ constexpr unsigned minus_infinity(float16) { return 0xfc00fc00u; }
__device__ __forceinline__ constexpr unsigned minus_infinity(float) { return 0xff800000u; }

// Relative error about 2^-22; a result below 2^-126 is 0.
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / (1 + exp(-x)); 0 for x below -87, without an infinity on the way out.
__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.f + exp2_fast(-1.4426950408889634f * x)); }
