// For packed sequences: marks the tokens where each sequence begins and ends, and copies the state of an empty one.
//
// One block per sequence n, which has the tokens [bounds[n], bounds[n + 1]). The mark of a token is 4 n, + 2 where n begins, + 1 where
// it ends. `through` and `result` are [N, words]; a null `through` means zeros.

extern "C" __global__ void simplified_mark(const int* bounds, int* marks, int length, const float* through, float* result,
                                           int words) {
  const int n = blockIdx.x;
  const int begin = max(bounds[n], 0), end = min(bounds[n + 1], length);
  for (int t = begin + threadIdx.x; t < end; t += blockDim.x) marks[t] = 4 * n + 2 * (t == begin) + (t == end - 1);
  if (begin < end) return;
  for (int i = threadIdx.x; i < words; i += blockDim.x) {
    const long long at = static_cast<long long>(n) * words + i;
    result[at] = through == nullptr ? 0.f : through[at];
  }
}
