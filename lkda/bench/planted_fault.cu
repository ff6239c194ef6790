// A race and an access beyond the end of x, planted: `lkda.bench.sanitize` first shows that the tools find them.

extern "C" __global__ void kda_planted_fault(float* x) {
  __shared__ float shared[64];
  shared[threadIdx.x] = x[threadIdx.x];  // x has 63 numbers, and the block 64 threads
  x[threadIdx.x] = shared[63 - threadIdx.x];  // of the other warp, without a barrier
}
