// One token of softmax attention and of multi-head latent attention on a CPU: the entries of the token are appended to
// preallocated caches, then each head attends to them. step.py calls it.
//
// Caches are [B, heads, S, width] or [B, S, width] with their entries side by side; of each sequence `lengths` entries
// are filled before the token. In a full cache, the token takes the place of the last one.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "token.h"

namespace {

constexpr int64_t PER_THREAD = 1 << 15;  // numbers of caches; fewer are not worth a thread

template <typename F>
void for_heads(int64_t B, int64_t H, int64_t width, const int64_t* lengths, int64_t threads, const F& run) {
    int64_t longest = 0;
    for (int64_t b = 0; b < B; b++) longest = lengths[b] > longest ? lengths[b] : longest;
    int64_t wanted = B * H * longest * width / PER_THREAD + 1;
    if (wanted < threads) threads = wanted;
    if (threads == 1) {
        for (int64_t n = 0; n < B * H; n++) run(n / H, n % H);
        return;
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t n = 0; n < B * H; n++) run(n / H, n % H);
}

// Rotates the pairs (x_i, x_{i + half}) by the angles position * frequency_i.
template <typename T>
void rotate(int64_t half, T position, const T* frequencies, const T* x, T* y) {
    for (int64_t i = 0; i < half; i++) {
        T angle = position * frequencies[i], cosine = std::cos(angle), sine = std::sin(angle), a = x[i], b = x[half + i];
        y[i] = a * cosine - b * sine;
        y[half + i] = b * cosine + a * sine;
    }
}

template <typename T>
struct Softmax {
    int64_t B, H, D;
    const T *q, *k, *v;  // rows [B, H * D]
    int64_t q_stride, k_stride, v_stride;
    const T* frequencies;
    T *keys, *values;
    int64_t batch_stride, head_stride, S;
    const int64_t* lengths;
    T scale;
    T* o;

    void head(int64_t b, int64_t h) const {
        int64_t at = lengths[b] < S ? lengths[b] : S - 1, from = b * batch_stride + h * head_stride;
        std::vector<T> numbers(D + at + 1);
        T *query = numbers.data(), *scores = query + D, *K = keys + from, *V = values + from;
        rotate(D / 2, T(lengths[b]), frequencies, q + b * q_stride + h * D, query);
        rotate(D / 2, T(lengths[b]), frequencies, k + b * k_stride + h * D, K + at * D);
        std::memcpy(V + at * D, v + b * v_stride + h * D, sizeof(T) * D);
        for (int64_t s = 0; s <= at; s++) scores[s] = scale * inner(D, query, K + s * D);
        softmax(at + 1, scores);
        T* out = o + (b * H + h) * D;
        std::memset(out, 0, sizeof(T) * D);
        for (int64_t s = 0; s <= at; s++) accumulate(D, scores[s], V + s * D, out);
    }
};

// The query is projected to the latent, and the sum of latents to the values.
template <typename T>
struct Latent {
    int64_t B, H, nope, rope, rank, v_dim;
    const T *q, *latent, *shared;  // rows [B, H * (nope + rope)], [B, rank] before its norm, [B, rope]
    int64_t q_stride, latent_stride, shared_stride;
    const T* norm;
    T eps;
    const T* projection;   // [H, nope + v_dim, rank]
    const T* frequencies;  // [rope / 2]; null: nothing is rotated
    T *latents, *shareds;
    int64_t latents_stride, shareds_stride, S;
    const int64_t* lengths;
    T scale;
    T* o;  // [B, H, v_dim]

    int64_t place(int64_t b) const { return lengths[b] < S ? lengths[b] : S - 1; }

    void append(int64_t b) const {
        int64_t at = place(b);
        rms_norm(rank, latent + b * latent_stride, norm, eps, latents + b * latents_stride + at * rank);
        turn(b, shared + b * shared_stride, shareds + b * shareds_stride + at * rope);
    }

    // y is x [rope], rotated where there are frequencies.
    void turn(int64_t b, const T* x, T* y) const {
        if (frequencies)
            rotate(rope / 2, T(lengths[b]), frequencies, x, y);
        else
            std::memcpy(y, x, sizeof(T) * rope);
    }

    void head(int64_t b, int64_t h) const {
        int64_t at = place(b);
        std::vector<T> numbers(2 * rank + rope + at + 1);
        T *query = numbers.data(), *sum = query + rank, *turned = sum + rank, *scores = turned + rope;
        const T *own = q + b * q_stride + h * (nope + rope), *rows = projection + h * (nope + v_dim) * rank;
        const T *L = latents + b * latents_stride, *R = shareds + b * shareds_stride;
        for (int64_t n = 0; n < nope; n++) accumulate(rank, own[n], rows + n * rank, query);
        turn(b, own + nope, turned);
        for (int64_t s = 0; s <= at; s++)
            scores[s] = scale * (inner(rank, query, L + s * rank) + inner(rope, turned, R + s * rope));
        softmax(at + 1, scores);
        for (int64_t s = 0; s <= at; s++) accumulate(rank, scores[s], L + s * rank, sum);
        T* out = o + (b * H + h) * v_dim;
        for (int64_t n = 0; n < v_dim; n++) out[n] = inner(rank, rows + (nope + n) * rank, sum);
    }
};

template <typename T>
void softmax_step(const Softmax<T>& x, int64_t threads) {
    for_heads(x.B, x.H, 2 * x.D, x.lengths, threads, [&](int64_t b, int64_t h) { x.head(b, h); });
}

template <typename T>
void latent_step(const Latent<T>& x, int64_t threads) {
    for (int64_t b = 0; b < x.B; b++) x.append(b);
    for_heads(x.B, x.H, 2 * x.rank, x.lengths, threads, [&](int64_t b, int64_t h) { x.head(b, h); });
}

}  // namespace

// Whether a sequence has filled its S entries.
extern "C" int64_t is_full(int64_t B, const int64_t* lengths, int64_t S) {
    for (int64_t b = 0; b < B; b++)
        if (lengths[b] >= S) return 1;
    return 0;
}

extern "C" void advance(int64_t B, int64_t* lengths) {
    for (int64_t b = 0; b < B; b++) lengths[b]++;
}

#define ENTRIES(T, NAME)                                                                                               \
    extern "C" void softmax_step_##NAME(int64_t B, int64_t H, int64_t D, const T* q, const T* k, const T* v,           \
                                        int64_t q_stride, int64_t k_stride, int64_t v_stride, const T* frequencies,    \
                                        T* keys, T* values, int64_t batch_stride, int64_t head_stride, int64_t S,      \
                                        const int64_t* lengths, double scale, T* o, int64_t threads) {                 \
        softmax_step<T>({B, H, D, q, k, v, q_stride, k_stride, v_stride, frequencies, keys, values, batch_stride,      \
                         head_stride, S, lengths, T(scale), o},                                                        \
                        threads);                                                                                      \
    }                                                                                                                  \
    extern "C" void latent_step_##NAME(                                                                                \
        int64_t B, int64_t H, int64_t nope, int64_t rope, int64_t rank, int64_t v_dim, const T* q, const T* latent,    \
        const T* shared, int64_t q_stride, int64_t latent_stride, int64_t shared_stride, const T* norm, double eps,    \
        const T* projection, const T* frequencies, T* latents, T* shareds, int64_t latents_stride,                     \
        int64_t shareds_stride, int64_t S, const int64_t* lengths, double scale, T* o, int64_t threads) {              \
        latent_step<T>({B, H, nope, rope, rank, v_dim, q, latent, shared, q_stride, latent_stride, shared_stride,      \
                        norm, T(eps), projection, frequencies, latents, shareds, latents_stride, shareds_stride, S,    \
                        lengths, T(scale), o},                                                                         \
                       threads);                                                                                       \
    }

ENTRIES(float, float32)
ENTRIES(double, float64)
