// The short causal depthwise convolution with SiLU on a CPU, with the L2 norm of heads, forward and backward. cpu.py
// calls it.
//
//     z_t = sum_s w_s x_{t-s}    y_t = SiLU(z_t), and with a norm y_t / sqrt(sum over the head of y_t^2 + 1e-6)
//
// One item of work is a sequence and a head. The forward saves nothing: the backward computes z again.

#include <array>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "elementwise.h"

namespace {

struct Shape {
    const int32_t* bounds;  // [N + 1]: sequence n has the rows bounds[n] to bounds[n + 1]
    int64_t N, channels, width, head, stride;  // head: channels of a head. stride: of the rows of x and its gradient
    int64_t items() const { return N * (channels / head); }
};

// One item. W is the width, so that the loops over the taps are unrolled; 0 where it is only known at run time.
template <typename T, int W>
class Item {
  public:
    // x [rows, channels] with its stride, weight [width, channels] with the newest token last, and the inputs before
    // each sequence, state [N, width - 1, channels], or null for zeros.
    Item(const Shape& s, int64_t index, const T* x, const T* weight, const T* state)
        : s_(s),
          n_(index / (s.channels / s.head)),
          first_(index % (s.channels / s.head) * s.head),
          begin_(s.bounds[n_]),
          length_(s.bounds[n_ + 1] - begin_),
          x_(x),
          state_(state),
          zeros_(s.head),
          taps_(pointers()) {
        for (int64_t tap = 0; tap < width(); tap++) taps_[tap] = weight + (width() - 1 - tap) * s.channels + first_;
    }

    void forward(bool normalized, T* y, T* last) const {
        std::vector<T> z(s_.head), gate(s_.head);
        for (int64_t t = 0; t < length_; t++) {
            T* row = y + (begin_ + t) * s_.channels + first_;
            T factor = silu(t, z.data(), gate.data(), row, normalized);
            if (!normalized) continue;
#pragma omp simd
            for (int64_t c = 0; c < s_.head; c++) row[c] *= factor;
        }
        for (int64_t j = 0; j < reach(); j++)
            std::memcpy(last + (n_ * reach() + j) * s_.channels + first_, input(length_ - reach() + j), bytes());
    }

    // dlast may be null, and dstate where there is no state. dweight [N, width, channels] holds the sums of a sequence.
    void backward(bool normalized, const T* dy, const T* dlast, T* dx, T* dweight, T* dstate) const {
        int64_t D = s_.head;
        std::vector<T> all((length_ + 2 * reach()) * D), sums(width() * D);
        T* dz = all.data() + reach() * D;  // zeros before the first token and after the last one
        gradients_of_z(normalized, dy, dz);
        for (int64_t t = 0; t < length_; t++) {
            const T* now = dz + t * D;
            Pointers x = inputs(t);
            for (int64_t tap = 0; tap < width(); tap++) {
                T* sum = &sums[tap * D];
#pragma omp simd
                for (int64_t c = 0; c < D; c++) sum[c] += now[c] * x[tap][c];
            }
        }
        for (int64_t tap = 0; tap < width(); tap++)
            std::memcpy(dweight + (n_ * width() + width() - 1 - tap) * s_.channels + first_, &sums[tap * D], bytes());
        for (int64_t t = dstate ? -reach() : 0; t < length_; t++) {
            int64_t row = t - (length_ - reach());  // of the last inputs
            const T* later = dlast && row >= 0 ? dlast + (n_ * reach() + row) * s_.channels + first_ : zeros_.data();
            T* out = t >= 0 ? dx + (begin_ + t) * s_.stride + first_
                            : dstate + ((n_ + 1) * reach() + t) * s_.channels + first_;
            Pointers w = taps_;
            const T* now = dz + t * D;
#pragma omp simd
            for (int64_t c = 0; c < D; c++) {
                T sum = later[c];
                for (int64_t tap = 0; tap < width(); tap++) sum += w[tap][c] * now[tap * D + c];
                out[c] = sum;
            }
        }
    }

  private:
    // A pointer for each tap.
    using Pointers = std::conditional_t<W != 0, std::array<const T*, W>, std::vector<const T*>>;

    Pointers pointers() const {
        if constexpr (W != 0)
            return Pointers{};
        else
            return Pointers(s_.width);
    }
    int64_t width() const { return W ? W : s_.width; }
    int64_t reach() const { return width() - 1; }
    size_t bytes() const { return sizeof(T) * s_.head; }

    // The input of token t of the sequence; t is -(width - 1) or more.
    const T* input(int64_t t) const {
        if (t >= 0) return x_ + (begin_ + t) * s_.stride + first_;
        return state_ ? state_ + ((n_ + 1) * reach() + t) * s_.channels + first_ : zeros_.data();
    }

    // The inputs of token t and of the tokens before it.
    Pointers inputs(int64_t t) const {
        Pointers found = pointers();
        for (int64_t tap = 0; tap < width(); tap++) found[tap] = input(t - tap);
        return found;
    }

    // z of token t, sigmoid(z) and SiLU(z). Returns the factor of the norm, 1 without one.
    T silu(int64_t t, T* z, T* gate, T* y, bool normalized) const {
        Pointers x = inputs(t), w = taps_;
        T squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t c = 0; c < s_.head; c++) {
            T sum = 0;
            for (int64_t tap = 0; tap < width(); tap++) sum += w[tap][c] * x[tap][c];
            z[c] = sum;
            gate[c] = sigmoid(sum);
            y[c] = sum * gate[c];
            squares += y[c] * y[c];
        }
        return normalized ? T(1) / std::sqrt(squares + T(1e-6)) : T(1);
    }

    void gradients_of_z(bool normalized, const T* dy, T* dz) const {
        int64_t D = s_.head;
        std::vector<T> z(D), gate(D), y(D);
        for (int64_t t = 0; t < length_; t++) {
            const T* grad = dy + (begin_ + t) * s_.channels + first_;
            T factor = silu(t, z.data(), gate.data(), y.data(), normalized), along = 0;
            if (normalized) {
#pragma omp simd reduction(+ : along)
                for (int64_t c = 0; c < D; c++) along += grad[c] * y[c];
                along *= factor * factor;
            }
            T* now = dz + t * D;
#pragma omp simd
            for (int64_t c = 0; c < D; c++) {
                T dsilu = factor * (grad[c] - along * y[c]);
                now[c] = dsilu * gate[c] * (T(1) + z[c] * (T(1) - gate[c]));
            }
        }
    }

    const Shape& s_;
    const int64_t n_, first_, begin_, length_;
    const T *x_, *state_;
    std::vector<T> zeros_;
    Pointers taps_;
};

template <typename T, int W>
void forward(const Shape& s, const T* x, const T* weight, const T* state, bool normalized, T* y, T* last,
             int64_t threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t index = 0; index < s.items(); index++)
        Item<T, W>(s, index, x, weight, state).forward(normalized, y, last);
}

template <typename T, int W>
void backward(const Shape& s, const T* x, const T* weight, const T* state, bool normalized, const T* dy,
              const T* dlast, T* dx, T* dweight, T* dstate, int64_t threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t index = 0; index < s.items(); index++)
        Item<T, W>(s, index, x, weight, state).backward(normalized, dy, dlast, dx, dweight, dstate);
}

}  // namespace

#define ENTRIES(T, NAME)                                                                                             \
    extern "C" void convolution_forward_##NAME(const int32_t* bounds, int64_t N, int64_t channels, int64_t width,      \
                                               int64_t head, int64_t stride, const T* x, const T* weight,              \
                                               const T* state, int64_t normalized, T* y, T* last, int64_t threads) {   \
        auto run = width == 4 ? forward<T, 4> : forward<T, 0>;                                                        \
        run({bounds, N, channels, width, head, stride}, x, weight, state, normalized, y, last, threads);              \
    }                                                                                                                 \
    extern "C" void convolution_backward_##NAME(const int32_t* bounds, int64_t N, int64_t channels, int64_t width,     \
                                                int64_t head, int64_t stride, const T* x, const T* weight,             \
                                                const T* state, int64_t normalized, const T* dy, const T* dlast,       \
                                                T* dx, T* dweight, T* dstate, int64_t threads) {                      \
        auto run = width == 4 ? backward<T, 4> : backward<T, 0>;                                                      \
        run({bounds, N, channels, width, head, stride}, x, weight, state, normalized, dy, dlast, dx, dweight, dstate, \
            threads);                                                                                                 \
    }

ENTRIES(float, float32)
ENTRIES(double, float64)
