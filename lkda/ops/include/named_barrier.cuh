// Barriers for some of a block's warps, with a number from 1 to 15. __syncthreads is number 0.
#pragma once

// Waits until `threads` threads have come to the barrier, in whole warps. What they wrote before is visible to all who wait.
__device__ __forceinline__ void wait_at_barrier(int number, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory"); }
