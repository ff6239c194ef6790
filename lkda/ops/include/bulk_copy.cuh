// Copies from shared to GPU memory by the bulk copy engine (cp.async.bulk, sm_90 and later). A thread waits for those that it has started.
#pragma once
#include "async_copy.cuh"

// Starts copying `bytes`, a multiple of 16, between addresses that are too. What other threads wrote there is copied if they have
// called show_to_products (warpgroup.cuh) before a barrier.
__device__ __forceinline__ void copy_to_memory(char* to, const void* at, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\ncp.async.bulk.commit_group;" ::"l"(__cvta_generic_to_global(to)), "r"(shared_address(at)), "r"(bytes) : "memory");
}

// Waits until shared memory has been read for this thread's copies, and may be written again.
__device__ __forceinline__ void wait_until_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// Waits until this thread's copies are done.
__device__ __forceinline__ void wait_until_copied() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
