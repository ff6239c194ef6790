// Packed sequences: mark the token where each begins and where it ends, and pass the state of an empty one through.
//
// One block a sequence n of tokens [bounds[n], bounds[n + 1]). marks[t] = (the sequence that begins at t, the one that ends
// there), -1 for none, which the caller has written before. `through` and `result` are [N, words]; `through` may be null.

extern "C" __global__ void simplified_mark(const int* bounds, int2* marks, int length, const float* through, float* result,
                                           int words) {
  const int n = blockIdx.x;
  const int begin = bounds[n], end = bounds[n + 1];
  if (begin < end) {
    if (threadIdx.x == 0 && begin >= 0 && end <= length) {
      marks[begin].x = n;
      marks[end - 1].y = n;
    }
    return;
  }
  for (int i = threadIdx.x; i < words; i += blockDim.x) {
    const long long at = static_cast<long long>(n) * words + i;
    result[at] = through == nullptr ? 0.f : through[at];
  }
}
