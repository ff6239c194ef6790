// The short causal depthwise convolution with SiLU on a CPU, with the L2 norm of heads, forward and backward. cpu.py
// calls it.
//
//     z_t = sum_s w_s x_{t-s}    y_t = SiLU(z_t), and with a norm y_t / sqrt(sum over the head of y_t^2 + 1e-6)
//
// One item of work is a sequence and a head. The forward saves nothing: the backward computes z again.

#include <cstdint>
#include <vector>

#include "elementwise.h"

namespace {

struct Shape {
    const int32_t* bounds;  // [N + 1]: sequence n has the rows bounds[n] to bounds[n + 1]
    int64_t N, channels, width, head, stride;  // head: channels of a head. stride: of the rows of x and its gradient
};

template <typename T>
class Item {
  public:
    // x [rows, channels] with its stride, weight [width, channels] with the newest token last, and the inputs before
    // each sequence, state [N, width - 1, channels], or null for zeros.
    Item(const Shape& s, int64_t index, const T* x, const T* weight, const T* state)
        : n(index / (s.channels / s.head)),
          first(index % (s.channels / s.head) * s.head),
          begin(s.bounds[n]),
          length(s.bounds[n + 1] - begin),
          s_(s),
          x_(x),
          weight_(weight),
          state_(state),
          zeros_(s.head) {}

    const int64_t n, first, begin, length;

    // The input of token t of the sequence; t is -(width - 1) or more.
    const T* input(int64_t t) const {
        if (t >= 0) return x_ + (begin + t) * s_.stride + first;
        return state_ ? state_ + ((n + 1) * (s_.width - 1) + t) * s_.channels + first : zeros_.data();
    }
    // The filter of the token s before.
    const T* taps(int64_t s) const { return weight_ + (s_.width - 1 - s) * s_.channels + first; }

    void convolve(int64_t t, T* z) const {
        for (int64_t s = 0; s < s_.width; s++) {
            const T *w = taps(s), *x = input(t - s);
            if (s == 0) {
#pragma omp simd
                for (int64_t c = 0; c < s_.head; c++) z[c] = w[c] * x[c];
            } else {
#pragma omp simd
                for (int64_t c = 0; c < s_.head; c++) z[c] += w[c] * x[c];
            }
        }
    }

  private:
    const Shape& s_;
    const T *x_, *weight_, *state_;
    std::vector<T> zeros_;
};

// 1 / sqrt(sum of y^2 + 1e-6) of y = SiLU(z), or 1 without a norm.
template <typename T>
T silu(int64_t count, const T* z, T* y, bool normalized) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < count; c++) {
        y[c] = z[c] * sigmoid(z[c]);
        sum += y[c] * y[c];
    }
    return normalized ? T(1) / std::sqrt(sum + T(1e-6)) : T(1);
}

template <typename T>
void forward_item(const Shape& s, const Item<T>& item, bool normalized, T* y, T* last) {
    std::vector<T> z(s.head);
    for (int64_t t = 0; t < item.length; t++) {
        T* row = y + (item.begin + t) * s.channels + item.first;
        item.convolve(t, z.data());
        T factor = silu(s.head, z.data(), row, normalized);
        if (!normalized) continue;
#pragma omp simd
        for (int64_t c = 0; c < s.head; c++) row[c] *= factor;
    }
    for (int64_t j = 0; j < s.width - 1; j++)
        std::memcpy(last + (item.n * (s.width - 1) + j) * s.channels + item.first,
                    item.input(item.length - (s.width - 1) + j), sizeof(T) * s.head);
}

// The gradients of one item. dlast may be null, and dstate where there is no state. dweight [N, width, channels] holds
// the sums of each sequence.
template <typename T>
void backward_item(const Shape& s, const Item<T>& item, bool normalized, const T* dy, const T* dlast, T* dx, T* dweight,
                   T* dstate) {
    int64_t D = s.head, reach = s.width - 1;
    std::vector<T> z(D), y(D), ring(s.width * D), zeros(D), into(D);
    auto dz = [&](int64_t t) { return ring.data() + (t + s.width) % s.width * D; };
    T* dw = dweight + item.n * s.width * s.channels + item.first;
    for (int64_t tap = 0; tap < s.width; tap++) std::memset(dw + tap * s.channels, 0, sizeof(T) * D);
    for (int64_t t = item.length - 1; t >= (dstate ? -reach : 0); t--) {
        T* now = dz(t);
        if (t >= 0) {
            const T* grad = dy + (item.begin + t) * s.channels + item.first;
            item.convolve(t, z.data());
            T factor = silu(D, z.data(), y.data(), normalized), along = 0;
            if (normalized) {
#pragma omp simd reduction(+ : along)
                for (int64_t c = 0; c < D; c++) along += grad[c] * y[c];
                along *= factor * factor;
            }
#pragma omp simd
            for (int64_t c = 0; c < D; c++) {
                T gate = sigmoid(z[c]), dsilu = factor * (grad[c] - along * y[c]);
                now[c] = dsilu * gate * (T(1) + z[c] * (T(1) - gate));
            }
            for (int64_t tap = 0; tap < s.width; tap++) {
                T* sum = dw + (s.width - 1 - tap) * s.channels;
                const T* x = item.input(t - tap);
#pragma omp simd
                for (int64_t c = 0; c < D; c++) sum[c] += now[c] * x[c];
            }
        } else {
            std::memset(now, 0, sizeof(T) * D);
        }
        int64_t row = t - (item.length - reach);  // of the last inputs
        std::memcpy(into.data(), dlast && row >= 0 ? dlast + (item.n * reach + row) * s.channels + item.first : zeros.data(),
                    sizeof(T) * D);
        for (int64_t tap = 0; tap < s.width; tap++) {
            const T *w = item.taps(tap), *later = dz(t + tap);
#pragma omp simd
            for (int64_t c = 0; c < D; c++) into[c] += w[c] * later[c];
        }
        T* out = t >= 0 ? dx + (item.begin + t) * s.stride + item.first
                        : dstate + ((item.n + 1) * reach + t) * s.channels + item.first;
        std::memcpy(out, into.data(), sizeof(T) * D);
    }
}

}  // namespace

#define ENTRIES(T, NAME)                                                                                             \
    extern "C" void convolution_forward_##NAME(const int32_t* bounds, int64_t N, int64_t channels, int64_t width,      \
                                               int64_t head, int64_t stride, const T* x, const T* weight,              \
                                               const T* state, int64_t normalized, T* y, T* last, int64_t threads) {   \
        Shape s{bounds, N, channels, width, head, stride};                                                            \
        _Pragma("omp parallel for schedule(dynamic) num_threads(threads)")                                            \
        for (int64_t index = 0; index < N * (channels / head); index++)                                               \
            forward_item<T>(s, Item<T>(s, index, x, weight, state), normalized, y, last);                             \
    }                                                                                                                 \
    extern "C" void convolution_backward_##NAME(const int32_t* bounds, int64_t N, int64_t channels, int64_t width,     \
                                                int64_t head, int64_t stride, const T* x, const T* weight,             \
                                                const T* state, int64_t normalized, const T* dy, const T* dlast,       \
                                                T* dx, T* dweight, T* dstate, int64_t threads) {                      \
        Shape s{bounds, N, channels, width, head, stride};                                                            \
        _Pragma("omp parallel for schedule(dynamic) num_threads(threads)")                                            \
        for (int64_t index = 0; index < N * (channels / head); index++)                                               \
            backward_item<T>(s, Item<T>(s, index, x, weight, state), normalized, dy, dlast, dx, dweight, dstate);     \
    }

ENTRIES(float, float32)
ENTRIES(double, float64)
