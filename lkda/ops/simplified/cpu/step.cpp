// One token of simplified linear attention on a CPU, from the projections of a layer to o. step.py calls it.
//
//     b = sigmoid(logit + bias)    num = b num + sigmoid(k) v    den = b den + sigmoid(k)    o = q num / (den + 1e-30)

#include <cstdint>
#include <cstring>
#include <vector>

#include "token.h"

namespace {

template <typename T>
struct Token {
    int64_t B, H, D;
    const T *q, *k, *v;  // rows [B, H * D]
    int64_t q_stride, k_stride, v_stride;
    const T* logits;  // of the decay, or null where it is constant
    int64_t logits_stride;
    const T* bias;
    int64_t width;
    const T *q_weight, *k_weight, *v_weight;  // of the convolutions [H * D, width]
    T *q_cache, *k_cache, *v_cache;           // [B, width - 1, H * D]
    T *state, *o;                             // [B, H, 2, D] (num, den), [B, H, D]

    void head(int64_t b, int64_t h, const T* rows, int64_t stride, const T* weight, T* cache, T* y) const {
        int64_t channels = H * D;
        if (width)
            convolve(h * D, D, channels, width, weight, cache + b * (width - 1) * channels, rows + b * stride + h * D, y);
        else
            std::memcpy(y, rows + b * stride + h * D, sizeof(T) * D);
    }

    void item(int64_t b, int64_t h, T* numbers) const {
        T *q_ = numbers, *k_ = q_ + D, *v_ = k_ + D;
        head(b, h, q, q_stride, q_weight, q_cache, q_);
        head(b, h, k, k_stride, k_weight, k_cache, k_);
        head(b, h, v, v_stride, v_weight, v_cache, v_);
        T decay = sigmoid((logits ? logits[b * logits_stride + h] : T(0)) + bias[h]);
        T *num = state + (b * H + h) * 2 * D, *den = num + D, *out = o + (b * H + h) * D;
#pragma omp simd
        for (int64_t c = 0; c < D; c++) {
            T write = sigmoid(k_[c]);
            num[c] = decay * num[c] + write * v_[c];
            den[c] = decay * den[c] + write;
            out[c] = q_[c] * (num[c] / (den[c] + T(1e-30)));
        }
    }
};

template <typename T>
void step(const Token<T>& token) {
    std::vector<T> numbers(3 * token.D);
    for (int64_t b = 0; b < token.B; b++)
        for (int64_t h = 0; h < token.H; h++) token.item(b, h, numbers.data());
}

}  // namespace

#define ENTRY(T, NAME)                                                                                                \
    extern "C" void simplified_step_##NAME(                                                                           \
        int64_t B, int64_t H, int64_t D, const T* q, const T* k, const T* v, int64_t q_stride, int64_t k_stride,       \
        int64_t v_stride, const T* logits, int64_t logits_stride, const T* bias, int64_t width, const T* q_weight,     \
        const T* k_weight, const T* v_weight, T* q_cache, T* k_cache, T* v_cache, T* state, T* o) {                    \
        step<T>({B, H, D, q, k, v, q_stride, k_stride, v_stride, logits, logits_stride, bias, width, q_weight,         \
                 k_weight, v_weight, q_cache, k_cache, v_cache, state, o});                                            \
    }

ENTRY(float, float32)
ENTRY(double, float64)
