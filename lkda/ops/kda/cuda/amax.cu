// The largest finite |x| of each chunk and head, of v or of do; its scale follows from it (kda_scale.cuh). One warp per chunk and
// head.
#include "kda_scale.cuh"

constexpr int WARPS = 8;

// values: [rows, H, D] Element. amax: [chunks, H] float32. Grid: items = chunks x H, over WARPS.
extern "C" __global__ void __launch_bounds__(WARPS * 32) kda_amax(const Element* values, float* amax, const int4* spans, int items, int length, int heads) {
  const int item = blockIdx.x * WARPS + threadIdx.x / 32;
  if (item >= items) return;
  const Span span = span_of(item / heads, length, spans);
  if (span.tokens <= 0) return;
  const float x = amax_in_warp(amax_of(values, span, heads, item % heads, lane_id(), 32));
  if (lane_id() == 0) amax[item] = x;
}
