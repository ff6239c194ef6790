// One token of Kimi Delta Attention on a CPU, from the projections of a layer to o. step.py calls it.
//
//     S' = Diag(E) S        c = beta (v - S'^T k)        S = S' + k c^T        o = scale S^T q
//
// An item of work is a head of a sequence. Its state stays in the first-level cache for the two passes over it.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "token.h"

namespace {

constexpr int64_t PER_THREAD = 1 << 15;  // numbers of states; fewer are not worth a thread

enum Decay { NONE, PER_CHANNEL, PER_HEAD };

template <typename T>
struct Token {
    int64_t B, H, D;
    const T *q, *k, *v;  // rows [B, H * D]
    int64_t q_stride, k_stride, v_stride;
    int64_t decay;
    const T* logits;  // of the decay
    int64_t logits_stride;
    const T* beta_logits;
    int64_t beta_stride;
    const T *A_log, *dt_bias;
    bool bounded;
    T lower_bound, strength;
    int64_t width;
    const T *q_weight, *k_weight, *v_weight;  // of the convolutions [H * D, width]
    T *q_cache, *k_cache, *v_cache;           // [B, width - 1, H * D]
    bool normalize;
    T scale;
    T *state, *o;

    // A head's numbers of one stream, convolved where there is a convolution.
    void head(int64_t b, int64_t h, const T* rows, int64_t stride, const T* weight, T* cache, T* y) const {
        int64_t channels = H * D;
        if (width)
            convolve(h * D, D, channels, width, weight, cache + b * (width - 1) * channels, rows + b * stride + h * D, y);
        else
            std::memcpy(y, rows + b * stride + h * D, sizeof(T) * D);
    }

    // E = exp(g)
    T decayed(T logit, T rate) const {
        if (bounded) return std::exp(lower_bound * (T(1) / (T(1) + std::exp(-rate * logit))));
        T softplus = logit > T(20) ? logit : std::log1p(std::exp(logit));
        return std::exp(-rate * softplus);
    }

    void decays(int64_t b, int64_t h, T* E) const {
        if (decay == NONE) {
            for (int64_t i = 0; i < D; i++) E[i] = T(1);
            return;
        }
        T rate = std::exp(A_log[h]);
        if (decay == PER_HEAD) {
            T one = decayed(logits[b * logits_stride + h] + dt_bias[h], rate);
            for (int64_t i = 0; i < D; i++) E[i] = one;
            return;
        }
        for (int64_t i = 0; i < D; i++) E[i] = decayed(logits[b * logits_stride + h * D + i] + dt_bias[h * D + i], rate);
    }

    void item(int64_t b, int64_t h) const {
        std::vector<T> numbers(5 * D);
        T *q_ = &numbers[0], *k_ = q_ + D, *v_ = k_ + D, *E = v_ + D, *read = E + D;
        head(b, h, q, q_stride, q_weight, q_cache, q_);
        head(b, h, k, k_stride, k_weight, k_cache, k_);
        head(b, h, v, v_stride, v_weight, v_cache, v_);
        if (normalize) {
            l2_normalize(D, q_);
            l2_normalize(D, k_);
        }
        decays(b, h, E);
        T beta = strength / (T(1) + std::exp(-beta_logits[b * beta_stride + h]));
        T *S = state + (b * H + h) * D * D, *out = o + (b * H + h) * D;
        for (int64_t i = 0; i < D; i++) {
            T *row = S + i * D, e = E[i], key = k_[i];
#pragma omp simd
            for (int64_t c = 0; c < D; c++) {
                row[c] *= e;
                read[c] += key * row[c];
            }
        }
#pragma omp simd
        for (int64_t c = 0; c < D; c++) {
            read[c] = beta * (v_[c] - read[c]);
            out[c] = T(0);
        }
        for (int64_t i = 0; i < D; i++) {
            T *row = S + i * D, key = k_[i], query = scale * q_[i];
#pragma omp simd
            for (int64_t c = 0; c < D; c++) {
                row[c] += key * read[c];
                out[c] += query * row[c];
            }
        }
    }
};

template <typename T>
void step(const Token<T>& token, int64_t threads) {
    int64_t items = token.B * token.H, wanted = items * token.D * token.D / PER_THREAD + 1;
    if (wanted < threads) threads = wanted;
    if (threads == 1) {
        for (int64_t n = 0; n < items; n++) token.item(n / token.H, n % token.H);
        return;
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t n = 0; n < items; n++) token.item(n / token.H, n % token.H);
}

}  // namespace

#define ENTRY(T, NAME)                                                                                                \
    extern "C" void kda_step_##NAME(                                                                                  \
        int64_t B, int64_t H, int64_t D, const T* q, const T* k, const T* v, int64_t q_stride, int64_t k_stride,       \
        int64_t v_stride, int64_t decay, const T* logits, int64_t logits_stride, const T* beta_logits,                 \
        int64_t beta_stride, const T* A_log, const T* dt_bias, int64_t bounded, double lower_bound, double strength,   \
        int64_t width, const T* q_weight, const T* k_weight, const T* v_weight, T* q_cache, T* k_cache, T* v_cache,    \
        int64_t normalize, double scale, T* state, T* o, int64_t threads) {                                            \
        step<T>({B,           H,             D,           q,       k,         v,        q_stride,       k_stride,      \
                 v_stride,    decay,         logits,      logits_stride, beta_logits, beta_stride, A_log, dt_bias,     \
                 bounded != 0, T(lower_bound), T(strength), width, q_weight, k_weight, v_weight, q_cache, k_cache,     \
                 v_cache,     normalize != 0, T(scale),   state,   o},                                                 \
                threads);                                                                                              \
    }

ENTRY(float, float32)
ENTRY(double, float64)
