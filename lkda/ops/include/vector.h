// Vectors of a CPU, as wide as its registers, in the notation that GCC and Clang share.
#pragma once

#include <cstdint>
#include <utility>

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

template <typename T>
struct Vector;
template <>
struct Vector<float> {
    typedef float loose __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));  // at any address
    typedef float type __attribute__((vector_size(VECTOR_BYTES), aligned(VECTOR_BYTES), may_alias));
    typedef int32_t index __attribute__((vector_size(VECTOR_BYTES)));
    static constexpr int W = VECTOR_BYTES / 4;
};
template <>
struct Vector<double> {
    typedef double loose __attribute__((vector_size(VECTOR_BYTES), aligned(8), may_alias));  // at any address
    typedef double type __attribute__((vector_size(VECTOR_BYTES), aligned(VECTOR_BYTES), may_alias));
    typedef int64_t index __attribute__((vector_size(VECTOR_BYTES)));
    static constexpr int W = VECTOR_BYTES / 8;
};

// Lane l is lane I_l of a, followed by b.
template <typename T, int... I>
inline typename Vector<T>::type shuffle(typename Vector<T>::type a, typename Vector<T>::type b,
                                        std::integer_sequence<int, I...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, I...);
#else
    return __builtin_shuffle(a, b, typename Vector<T>::index{I...});
#endif
}

// Lane l: a[l] + a[l ^ H] where l has no bit H, else b[l] + b[l ^ H].
template <typename T, int H, int... L>
inline typename Vector<T>::type merge(typename Vector<T>::type a, typename Vector<T>::type b,
                                      std::integer_sequence<int, L...>) {
    constexpr int W = Vector<T>::W;
    return shuffle<T>(a, b, std::integer_sequence<int, (L & H ? W + L : L)...>()) +
           shuffle<T>(a, b, std::integer_sequence<int, (L & H ? W + (L ^ H) : (L ^ H))...>());
}

// Lane l is the sum of the lanes of x[l], for W vectors x.
template <typename T, int COUNT = Vector<T>::W>
inline typename Vector<T>::type totals(const typename Vector<T>::type* x) {
    if constexpr (COUNT == 1) {
        return x[0];
    } else {
        constexpr int H = COUNT / 2;
        typename Vector<T>::type merged[H];
        for (int i = 0; i < H; i++)
            merged[i] = merge<T, H>(x[i], x[i + H], std::make_integer_sequence<int, Vector<T>::W>());
        return totals<T, H>(merged);
    }
}

// The sum of the lanes.
template <typename T>
inline T total(typename Vector<T>::type x) {
    T sum = 0;
    for (int l = 0; l < Vector<T>::W; l++) sum += x[l];
    return sum;
}
