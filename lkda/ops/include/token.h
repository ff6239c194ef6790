// What the steps of all mixers do with one token on a CPU. The loops run over channels, in one order for every batch.
#pragma once

#include <cstdint>

#include "elementwise.h"
#include "vector.h"

template <typename T>
using Loose = typename Vector<T>::loose;

// a . b
template <typename T>
inline T inner(int64_t n, const T* a, const T* b) {
    constexpr int W = Vector<T>::W;
    typename Vector<T>::type sum{};
    int64_t i = 0;
    for (; i + W <= n; i += W) sum += *(const Loose<T>*)(a + i) * *(const Loose<T>*)(b + i);
    T all = total<T>(sum);
    for (; i < n; i++) all += a[i] * b[i];
    return all;
}

// y += factor x
template <typename T>
inline void accumulate(int64_t n, T factor, const T* x, T* y) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) y[i] += factor * x[i];
}

// y = x / sqrt(mean of x^2 + eps) w
template <typename T>
inline void rms_norm(int64_t n, const T* x, const T* w, T eps, T* y) {
    T r = T(1) / std::sqrt(inner(n, x, x) / T(n) + eps);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) y[i] = x[i] * r * w[i];
}

// The channels `first` to first + n of one token of a short convolution with SiLU: x -> y [n]. The cache
// [width - 1, channels], the last inputs, moves on. weight [channels, width], with the newest token last.
template <typename T>
inline void convolve(int64_t first, int64_t n, int64_t channels, int64_t width, const T* weight, T* cache, const T* x,
                     T* y) {
    const T* w = weight + first * width;
    T* before = cache + first;
    for (int64_t c = 0; c < n; c++) y[c] = w[c * width + width - 1] * x[c];
    for (int64_t tap = 0; tap + 1 < width; tap++) {
        T* row = before + tap * channels;
        const T* next = tap + 2 < width ? row + channels : x;
        for (int64_t c = 0; c < n; c++) {
            y[c] += w[c * width + tap] * row[c];
            row[c] = next[c];
        }
    }
#pragma omp simd
    for (int64_t c = 0; c < n; c++) y[c] *= sigmoid(y[c]);
}

// x / sqrt(sum of x^2 + 1e-6), in place
template <typename T>
inline void l2_normalize(int64_t n, T* x) {
    T factor = T(1) / std::sqrt(inner(n, x, x) + T(1e-6));
#pragma omp simd
    for (int64_t i = 0; i < n; i++) x[i] *= factor;
}

// softmax of x, in place
template <typename T>
inline void softmax(int64_t n, T* x) {
    T largest = x[0], sum = 0;
    for (int64_t i = 1; i < n; i++) largest = x[i] > largest ? x[i] : largest;
    if (!(largest - largest == T(0))) largest = T(0);  // inf and NaN stay what they are
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) {
        x[i] = exponential(x[i] - largest);
        sum += x[i];
    }
    T factor = T(1) / sum;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) x[i] *= factor;
}
