// The layers of a decoding step on a CPU, for a few rows. cpu.py calls it.
//
// The bits of a row do not depend on the other rows, nor on the number of threads: every output is summed in one order.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "token.h"

namespace {

constexpr int GROUP = 8;                 // outputs that are computed together, so that they share the loads of x
constexpr int64_t PER_THREAD = 1 << 18;  // weights, of 1 MB in float32; fewer are not worth waiting for a thread

enum Form { PLAIN, NORM, SILU, TIMES };

// What a product does with a row of x before it.
template <typename T>
struct Input {
    const T* x;
    int64_t stride, form;
    const T* norm;  // NORM: RMSNorm of groups of `group` channels with this weight, times sigmoid(other) if there is one
    int64_t group;
    T eps;
    const T* other;  // SILU: SiLU(x) times other. TIMES: x times other
    int64_t other_stride;

    void row(int64_t b, int64_t n, T* z) const {
        const T *from = x + b * stride, *with = other ? other + b * other_stride : nullptr;
        if (form == NORM) {
            for (int64_t c = 0; c < n; c += group) rms_norm(group, from + c, norm, eps, z + c);
            if (!with) return;
#pragma omp simd
            for (int64_t c = 0; c < n; c++) z[c] *= sigmoid(with[c]);
        } else if (form == SILU) {
#pragma omp simd
            for (int64_t c = 0; c < n; c++) z[c] = from[c] * sigmoid(from[c]) * with[c];
        } else if (form == TIMES) {
            for (int64_t c = 0; c < n; c++) z[c] = from[c] * with[c];
        } else {
            std::memcpy(z, from, sizeof(T) * n);
        }
    }
};

// COUNT outputs of one row: y[i] = w_i . x
template <int COUNT, typename T>
inline void outputs(int64_t n, const T* w, const T* x, T* y) {
    constexpr int W = Vector<T>::W;
    typename Vector<T>::type sums[COUNT] = {};
    int64_t c = 0;
    for (; c + W <= n; c += W) {
        auto a = *(const Loose<T>*)(x + c);
        for (int i = 0; i < COUNT; i++) sums[i] += a * *(const Loose<T>*)(w + i * n + c);
    }
    for (int i = 0; i < COUNT; i++) {
        T sum = total<T>(sums[i]);
        for (int64_t tail = c; tail < n; tail++) sum += w[i * n + tail] * x[tail];
        y[i] = sum;
    }
}

// y [B, total of `sizes`] = z [B, n] times the matrices' transposes, side by side, plus `add` where it is given.
template <typename T>
void product(int64_t B, int64_t n, const Input<T>& input, int64_t count, const T* const* matrices, const int64_t* sizes,
             const T* add, T* y, int64_t threads) {
    std::vector<T> z(B * n);
    for (int64_t b = 0; b < B; b++) input.row(b, n, &z[b * n]);
    int64_t all = 0;
    for (int64_t m = 0; m < count; m++) all += sizes[m];
    threads = std::max<int64_t>(1, std::min(threads, all * n / PER_THREAD));
    for (int64_t m = 0, first = 0; m < count; first += sizes[m++]) {
        const T* w = matrices[m];
        int64_t rows = sizes[m], groups = (rows + GROUP - 1) / GROUP;
        auto group = [&](int64_t g) {
            int64_t begin = g * GROUP, end = begin + GROUP < rows ? begin + GROUP : rows;
            for (int64_t b = 0; b < B; b++) {
                T* out = y + b * all + first;
                if (end - begin == GROUP)
                    outputs<GROUP>(n, w + begin * n, &z[b * n], out + begin);
                else
                    for (int64_t r = begin; r < end; r++) outputs<1>(n, w + r * n, &z[b * n], out + r);
                if (add)
                    for (int64_t r = begin; r < end; r++) out[r] += add[b * all + first + r];
            }
        };
        if (threads == 1) {
            for (int64_t g = 0; g < groups; g++) group(g);
        } else {
#pragma omp parallel for schedule(static) num_threads(threads)
            for (int64_t g = 0; g < groups; g++) group(g);
        }
    }
}

// Rows of a table, with an RMSNorm where `norm` is given, times `scale`. Returns 1 if the table [V, n] lacks a token,
// which takes the first row.
template <typename T>
int64_t embed(int64_t B, int64_t n, const int64_t* tokens, int64_t V, const T* table, const T* norm, T eps, T scale, T* y) {
    int64_t missing = 0;
    for (int64_t b = 0; b < B; b++) {
        bool known = tokens[b] >= 0 && tokens[b] < V;
        if (!known) missing = 1;
        const T* from = table + (known ? tokens[b] : 0) * n;
        T* to = y + b * n;
        if (norm)
            rms_norm(n, from, norm, eps, to);
        else
            std::memcpy(to, from, sizeof(T) * n);
        for (int64_t c = 0; c < n; c++) to[c] *= scale;
    }
    return missing;
}

}  // namespace

#define ENTRIES(T, NAME)                                                                                              \
    extern "C" void product_##NAME(int64_t B, int64_t n, const T* x, int64_t stride, int64_t form, const T* norm,       \
                                   int64_t group, double eps, const T* other, int64_t other_stride, int64_t count,     \
                                   const T* const* matrices, const int64_t* sizes, const T* add, T* y,                 \
                                   int64_t threads) {                                                                  \
        product<T>(B, n, {x, stride, form, norm, group, T(eps), other, other_stride}, count, matrices, sizes, add, y,  \
                   threads);                                                                                           \
    }                                                                                                                  \
    extern "C" int64_t embed_##NAME(int64_t B, int64_t n, const int64_t* tokens, int64_t V, const T* table, const T* norm,            \
                                 double eps, double scale, T* y) {                                                     \
        return embed<T>(B, n, tokens, V, table, norm, T(eps), T(scale), y);                                                      \
    }                                                                                                                  \
    extern "C" void norm_##NAME(int64_t B, int64_t heads, int64_t n, const T* x, int64_t stride, const T* w, double eps, \
                                T* y) {                                                                                \
        for (int64_t i = 0; i < B * heads; i++)                                                                        \
            rms_norm(n, x + i / heads * stride + i % heads * n, w, T(eps), y + i * n);                                 \
    }                                                                                                                  \
    extern "C" void add_##NAME(int64_t count, const T* a, const T* b, T* y) {                                           \
        for (int64_t i = 0; i < count; i++) y[i] = a[i] + b[i];                                                        \
    }                                                                                                                  \
    extern "C" void convolve_##NAME(int64_t B, int64_t channels, int64_t width, const T* x, int64_t stride,             \
                                    const T* weight, T* cache, T* y) {                                                 \
        for (int64_t b = 0; b < B; b++)                                                                                \
            convolve<T>(0, channels, channels, width, weight, cache + b * (width - 1) * channels, x + b * stride,      \
                        y + b * channels);                                                                             \
    }

ENTRIES(float, float32)
ENTRIES(double, float64)
