// The functions that the layer's gates use.
#pragma once
#include "numeric.cuh"

constexpr float LOG2E = 1.4426950408889634f;

// log(1 + exp(x)), to a relative error of 1e-6 for every x: 2 atanh(u / (2 + u)), u = exp(-|x|), by its series.
__device__ __forceinline__ float softplus(float x) {
  const float u = exp2_fast(-LOG2E * fabsf(x));
  const float s = u * reciprocal(2.f + u), t = s * s;  // t <= 1/9
  float sum = 1.f / 15.f;
  sum = fmaf(sum, t, 1.f / 13.f);
  sum = fmaf(sum, t, 1.f / 11.f);
  sum = fmaf(sum, t, 1.f / 9.f);
  sum = fmaf(sum, t, 1.f / 7.f);
  sum = fmaf(sum, t, 1.f / 5.f);
  sum = fmaf(sum, t, 1.f / 3.f);
  return fmaxf(x, 0.f) + 2.f * s * fmaf(sum, t, 1.f);
}
