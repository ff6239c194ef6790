// The cross-entropy of rows of logits on a CPU: the loss of each row, and its gradient, which is written over the
// logits. cpu.py calls it.

#include <cstdint>

#include "elementwise.h"

namespace {

template <typename T>
void row(int64_t V, T* x, int64_t target, T scale, T* loss) {
    T largest = x[0], sum = 0, wanted = x[target];
#pragma omp simd reduction(max : largest)
    for (int64_t c = 0; c < V; c++) largest = x[c] > largest ? x[c] : largest;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < V; c++) {
        x[c] = exponential(x[c] - largest);
        sum += x[c];
    }
    *loss = std::log(sum) + (largest - wanted);  // in this order, for logits of 1e30
    T factor = scale / sum;
#pragma omp simd
    for (int64_t c = 0; c < V; c++) x[c] *= factor;
    x[target] -= scale;
}

template <typename T>
void rows(T* logits, int64_t count, int64_t V, const int64_t* targets, int64_t ignored, double scale, T* losses,
          int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < count; n++) {
        if (targets[n] == ignored) {
            losses[n] = 0;
            std::memset(logits + n * V, 0, sizeof(T) * V);
        } else {
            row<T>(V, logits + n * V, targets[n], T(scale), losses + n);
        }
    }
}

}  // namespace

#define ENTRY(T, NAME)                                                                                          \
    extern "C" void cross_entropy_rows_##NAME(T* logits, int64_t count, int64_t V, const int64_t* targets,        \
                                              int64_t ignored, double scale, T* losses, int64_t threads) {       \
        rows<T>(logits, count, V, targets, ignored, scale, losses, threads);                                     \
    }

ENTRY(float, float32)
ENTRY(double, float64)
