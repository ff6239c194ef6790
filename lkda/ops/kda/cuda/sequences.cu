// The positions of the chunks of packed sequences, computed from cu_seqlens on the device so that the host need not wait for it.
// One block.
#include "kda_chunk.cuh"

// cu_seqlens: [N + 1]. bounds: [2 (N + 1)], a copy of it and the number of chunks before each sequence.
// spans: [slots] (sequence, start, tokens, first + 2 last); slots past the last chunk get tokens = 0.
extern "C" __global__ void __launch_bounds__(1024) kda_sequences(const int* cu_seqlens, int* bounds, int4* spans, int sequences, int slots) {
  __shared__ int warp_total[32];
  __shared__ int before_tile;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  int* chunks_before = bounds + sequences + 1;
  if (thread == 0) before_tile = 0;
  for (int tile = 0; tile <= sequences; tile += 1024) {
    __syncthreads();
    const int n = tile + thread;
    const int chunks = n < sequences ? (cu_seqlens[n + 1] - cu_seqlens[n] + C - 1) / C : 0;
    int sum = chunks;  // inclusive over the warp
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += other;
    }
    if (lane == 31) warp_total[warp] = sum;
    __syncthreads();
    int before = before_tile;
    for (int w = 0; w < warp; ++w) before += warp_total[w];
    if (n <= sequences) {
      chunks_before[n] = before + sum - chunks;
      bounds[n] = cu_seqlens[n];
    }
    __syncthreads();
    if (thread == 1023) before_tile = before + sum;
  }
  __syncthreads();
  for (int n = warp; n < sequences; n += 32) {
    const int start = bounds[n], end = bounds[n + 1], first = chunks_before[n];
    for (int m = lane; start + m * C < end; m += 32) {
      const int left = end - start - m * C;
      spans[first + m] = make_int4(n, start + m * C, min(C, left), (m == 0 ? 1 : 0) + (left <= C ? 2 : 0));
    }
  }
  for (int slot = before_tile + thread; slot < slots; slot += 1024) spans[slot] = make_int4(0, 0, 0, 0);
}
