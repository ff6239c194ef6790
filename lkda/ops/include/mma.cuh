// One function for each instruction that the tensor-core kernels use. All exist since sm_80.
#pragma once
#include "async_copy.cuh"
#include "numeric.cuh"

struct tf32 {
  float value;
};

// Loads four 8x8 matrices of 16-bit elements. Lane l passes the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(unsigned (&word)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
               : "r"(shared_address(row)));
}

__device__ __forceinline__ void load_matrices_transposed(unsigned (&word)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
               : "r"(shared_address(row)));
}

// d[16][8] += a[16][16] b[16][8], float32 sums. top = row lane / 4, bottom = row 8 + lane / 4, columns 2 (lane % 4) + {0, 1}.
__device__ __forceinline__ void multiply(float16, float2& top, float2& bottom, const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(top.x), "+f"(top.y), "+f"(bottom.x), "+f"(bottom.y)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d[16][8] += a[16][8] b[8][8] in tf32; the caller may number the 8 terms of the sum as it likes, alike in a and b.
__device__ __forceinline__ void multiply(tf32, float2& top, float2& bottom, float2 a_top, float2 a_bottom, float2 b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(top.x), "+f"(top.y), "+f"(bottom.x), "+f"(bottom.y)
               : "r"(__float_as_uint(a_top.x)), "r"(__float_as_uint(a_bottom.x)), "r"(__float_as_uint(a_top.y)),
                 "r"(__float_as_uint(a_bottom.y)), "r"(__float_as_uint(b.x)), "r"(__float_as_uint(b.y)));
}

__device__ __forceinline__ float round_to_tf32(float x) {
  unsigned y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return __uint_as_float(y);
}
