// Element types in memory and their float32 values, in pairs. No header of the CUDA toolkit is included, so that NVRTC has less to parse.
#pragma once

// Returns x, but the compiler does not know that. So it computes what depends on the result where it is needed, instead of holding it
// in registers.
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

// Two neighbouring elements in memory's type.
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

// Two neighbouring elements in one 32-bit word; the first is in the low half.
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

// (a.x b.x, a.y b.y), rounded.
__device__ __forceinline__ unsigned product_of_pairs(float16, unsigned a, unsigned b) {
  unsigned pair;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  return pair;
}

// The greater of the signed 16-bit integers in each half.
__device__ __forceinline__ unsigned max_of_pairs(unsigned a, unsigned b) {
  unsigned pair;
  asm("max.s16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  return pair;
}

// Loads or stores two neighbouring elements. The address is aligned to both together.
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

// Stores two elements to global memory if `wanted`, with a hint that they are not read soon. The condition is a predicate of the
// store: for an `if` the compiler would make a branch, move the arithmetic of x into it and overlap it with nothing.
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

// Stores 16 bytes to global memory with one instruction. For a uint4 whose parts the compiler knows it may make four stores.
__device__ __forceinline__ void store_16(void* at, const unsigned (&word)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3]) : "memory");
}

// max(x, y), or NaN if one of them is NaN.
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

// 1 / (1 + exp(-x)). For x below -87 it is 0.
__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.f + exp2_fast(-1.4426950408889634f * x)); }
