// Matrix products by four warps together (wgmma, sm_90a). Each warp has 16 rows of the left operand in registers, and all share a
// right operand, which is read from shared memory once. The products are asynchronous and, like copies, are waited for in groups.
#pragma once
#include "tile.cuh"

// After the next barrier, products may read shared memory that this thread's copies have filled.
__device__ __forceinline__ void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// For sums that products have written or will write: the compiler moves no access to them across this point.
template <int N>
__device__ __forceinline__ void settle(Sum (&x)[N]) {
#pragma unroll
  for (int t = 0; t < N; ++t)
#pragma unroll
    for (int q = 0; q < 4; ++q) asm volatile("" : "+f"(x[t].pair[q].x), "+f"(x[t].pair[q].y)::"memory");
}

// Call before the first product after its sums or left operands were written in registers.
__device__ __forceinline__ void open_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void close_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most the newest NEWEST of the closed groups are unfinished.
template <int NEWEST>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(NEWEST) : "memory");
}

// x[16 rows of the warp][64] += a[16][16] b; x is four blocks side by side. b lies in a Tile with rows of 128 bytes, aligned to 1024,
// from `corner` on: b[k][n] = tile[n][k], or with TRANSPOSED tile[k][n].
template <bool TRANSPOSED>
__device__ __forceinline__ void product_of_four(Sum* x, const Block<float16>& a, const void* corner) {
  constexpr unsigned long long ROWS_OF_8 = 1024 >> 4, SWIZZLED_128 = 1ull << 62;
  const unsigned long long b = (shared_address(corner) >> 4) | ROWS_OF_8 << 16 | ROWS_OF_8 << 32 | SWIZZLED_128;
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
      "{%32,%33,%34,%35}, %36, 1, 1, 1, %37;"
      : "+f"(x[0].pair[0].x), "+f"(x[0].pair[0].y), "+f"(x[0].pair[1].x), "+f"(x[0].pair[1].y), "+f"(x[0].pair[2].x), "+f"(x[0].pair[2].y), "+f"(x[0].pair[3].x), "+f"(x[0].pair[3].y),
        "+f"(x[1].pair[0].x), "+f"(x[1].pair[0].y), "+f"(x[1].pair[1].x), "+f"(x[1].pair[1].y), "+f"(x[1].pair[2].x), "+f"(x[1].pair[2].y), "+f"(x[1].pair[3].x), "+f"(x[1].pair[3].y),
        "+f"(x[2].pair[0].x), "+f"(x[2].pair[0].y), "+f"(x[2].pair[1].x), "+f"(x[2].pair[1].y), "+f"(x[2].pair[2].x), "+f"(x[2].pair[2].y), "+f"(x[2].pair[3].x), "+f"(x[2].pair[3].y),
        "+f"(x[3].pair[0].x), "+f"(x[3].pair[0].y), "+f"(x[3].pair[1].x), "+f"(x[3].pair[1].y), "+f"(x[3].pair[2].x), "+f"(x[3].pair[2].y), "+f"(x[3].pair[3].x), "+f"(x[3].pair[3].y)
      : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "l"(b), "n"(TRANSPOSED ? 1 : 0));
}

// Transposes an 8x8 matrix of 16-bit elements.
__device__ __forceinline__ unsigned transpose(unsigned word) {
  unsigned other;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(other) : "r"(word));
  return other;
}
