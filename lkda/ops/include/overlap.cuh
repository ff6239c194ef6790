// For kernels whose launches may overlap: on architectures from sm_90 on, in a CUDA graph, a launch may begin before the one before it
// has ended. Both functions do nothing elsewhere.
#pragma once

// Until here, a kernel must not read what earlier launches write, and must not write at all.
__device__ __forceinline__ void wait_for_the_launch_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_the_next_launch_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
