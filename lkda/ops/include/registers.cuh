// Moving registers from some warps of a block to others (setmaxnreg, sm_90a). All warps of a group of four call the same one.
#pragma once

// From here on a thread of this warp has at most N registers, N a multiple of 8. The others go to the block's pool.
template <int N>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// From here on a thread of this warp has N registers. Waits until there are as many in the block's pool.
template <int N>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
