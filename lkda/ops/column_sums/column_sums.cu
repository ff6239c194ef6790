// y[m] = sum_p x[p][m], in a fixed order. The rows are the partial sums of a weight's gradient, one per block of a backward.
//
// A block has 32 columns. The threads of a column sum every ROWS-th row each; then the first of them adds the partial sums.
constexpr int ROWS = 32;

extern "C" __global__ void __launch_bounds__(ROWS * 32) column_sums(const float* x, float* y, int rows, int columns) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  float* sums = reinterpret_cast<float*>(shared_memory);  // [ROWS][32]
  const int column = blockIdx.x * 32 + threadIdx.x % 32, start = threadIdx.x / 32;
  float sum = 0.f;
  if (column < columns) {
#pragma unroll 4
    for (int row = start; row < rows; row += ROWS) sum += x[static_cast<long long>(row) * columns + column];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (start > 0 || column >= columns) return;
#pragma unroll 8
  for (int other = 1; other < ROWS; ++other) sum += sums[other * 32 + threadIdx.x];
  y[column] = sum;
}
