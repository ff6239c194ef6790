// RMSNorm of rows with a gate on a CPU, forward and backward. cpu.py calls it.
//
//     y = x r w sigmoid(gate),    r = 1 / sqrt(mean of x^2 + eps)
//
// The rows are divided into PARTS equal parts, whose gradients of w the caller adds: the result does not depend on the
// number of threads.

#include <cstdint>

#include "elementwise.h"

namespace {

template <typename T>
T inverse(int64_t D, const T* x, T eps) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < D; c++) sum += x[c] * x[c];
    return T(1) / std::sqrt(sum / T(D) + eps);
}

template <typename T>
void forward(int64_t rows, int64_t D, const T* x, const T* gate, const T* w, T eps, T* y, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < rows; n++) {
        const T *row = x + n * D, *gates = gate ? gate + n * D : nullptr;
        T *out = y + n * D, r = inverse<T>(D, row, eps);
        if (gates) {
#pragma omp simd
            for (int64_t c = 0; c < D; c++) out[c] = row[c] * r * w[c] * sigmoid(gates[c]);
        } else {
#pragma omp simd
            for (int64_t c = 0; c < D; c++) out[c] = row[c] * r * w[c];
        }
    }
}

template <typename T>
void backward_row(int64_t D, const T* dy, const T* x, const T* gate, const T* w, T eps, T* dx, T* dgate, T* dw) {
    T r = inverse<T>(D, x, eps), along = 0;  // along: the sum of the gradient of x r times x r
    if (gate) {
#pragma omp simd reduction(+ : along)
        for (int64_t c = 0; c < D; c++) {
            T s = sigmoid(gate[c]), normal = x[c] * r, through = dy[c] * s;
            dgate[c] = dy[c] * normal * w[c] * s * (T(1) - s);
            dw[c] += through * normal;
            dx[c] = through * w[c];
            along += dx[c] * normal;
        }
    } else {
#pragma omp simd reduction(+ : along)
        for (int64_t c = 0; c < D; c++) {
            T normal = x[c] * r;
            dw[c] += dy[c] * normal;
            dx[c] = dy[c] * w[c];
            along += dx[c] * normal;
        }
    }
    T mean = along / T(D) * r;
#pragma omp simd
    for (int64_t c = 0; c < D; c++) dx[c] = r * (dx[c] - mean * x[c]);
}

template <typename T>
void backward(int64_t rows, int64_t D, int64_t parts, const T* dy, const T* x, const T* gate, const T* w, T eps, T* dx,
              T* dgate, T* dw, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t part = 0; part < parts; part++) {
        T* sums = dw + part * D;
        std::memset(sums, 0, sizeof(T) * D);
        for (int64_t n = rows * part / parts; n < rows * (part + 1) / parts; n++) {
            int64_t at = n * D;
            backward_row<T>(D, dy + at, x + at, gate ? gate + at : nullptr, w, eps, dx + at,
                            gate ? dgate + at : nullptr, sums);
        }
    }
}

}  // namespace

#define ENTRIES(T, NAME)                                                                                            \
    extern "C" void norm_forward_##NAME(int64_t rows, int64_t D, const T* x, const T* gate, const T* w, double eps,  \
                                        T* y, int64_t threads) {                                                    \
        forward<T>(rows, D, x, gate, w, T(eps), y, threads);                                                         \
    }                                                                                                                \
    extern "C" void norm_backward_##NAME(int64_t rows, int64_t D, int64_t parts, const T* dy, const T* x,             \
                                         const T* gate, const T* w, double eps, T* dx, T* dgate, T* dw,              \
                                         int64_t threads) {                                                         \
        backward<T>(rows, D, parts, dy, x, gate, w, T(eps), dx, dgate, dw, threads);                                 \
    }

ENTRIES(float, float32)
ENTRIES(double, float64)
