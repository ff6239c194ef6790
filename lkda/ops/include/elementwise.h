// Functions of single numbers that a compiler can turn into vectors: no branches and no calls.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// exp(x) to 2 units in the last place: 2^n exp(r) with |r| <= ln(2) / 2, and exp(r) by a polynomial (Cephes).
inline float exponential(float x) {
    x = x < 88.0f ? x : 88.0f;
    x = x > -87.0f ? x : -87.0f;
    float n = std::nearbyint(x * 1.44269504088896341f);
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof(power));
    return p * power;
}

inline double exponential(double x) { return std::exp(x); }

template <typename T>
inline T sigmoid(T x) {
    return T(1) / (T(1) + exponential(-x));
}
