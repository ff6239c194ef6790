// intra_chunk_bwd.cu: scaled operands of do and the states, and h . dh'.
#pragma once
#include "kda_bwd_shared.cuh"
#include "kda_scale.cuh"

// The power-of-two scales of v and do (kda_scale.cuh), in shared memory.
struct Scales {
  static constexpr int values = Shared::place + 20, gradients = Shared::place + 24;

  static __device__ __forceinline__ float of_v(const char* shared) { return HALVES ? *reinterpret_cast<const float*>(shared + values) : 1.f; }
  static __device__ __forceinline__ float of_do(const char* shared) { return HALVES ? *reinterpret_cast<const float*>(shared + gradients) : 1.f; }
  // The factors that undo the scales: dv is multiplied by the first, other gradients by the second. Where the second exceeds
  // float32's range, it is float32's largest number.
  static __device__ __forceinline__ float inverse_of_do(const char* shared) { return inverse_of(of_do(shared)); }
  static __device__ __forceinline__ float inverse_of_both(const char* shared) {
    return fminf(inverse_of(of_v(shared)) * inverse_of(of_do(shared)), 3.4028234e38f);
  }
};

// Converts a thread's share of SLICES slices of do from memory's type to scaled operands, in place.
template <class Half, int SLICES>
__device__ __forceinline__ void make_operands(char* output, float factor) {
  static_assert(OutputSlice::bytes % (THREADS * 16) == 0, "each thread has whole pieces");
#pragma unroll
  for (int at = threadIdx.x * 16; at < SLICES * OutputSlice::bytes; at += THREADS * 16) {
    uint4& piece = *reinterpret_cast<uint4*>(output + at);
    uint4 word = piece;
    auto converted = [&](unsigned pair) {
      const float2 x = unpack(Half{}, pair);
      return pack(Operand{}, make_float2(factor * x.x, factor * x.y));
    };
    word.x = converted(word.x);
    word.y = converted(word.y);
    word.z = converted(word.z);
    word.w = converted(word.w);
    piece = word;
  }
}

// h . dh' of each channel, summed over V, into straight [BLOCKS][D]: a warp has 32 channels, and shares V with the other warps of
// these. In float16 it is the diagonal of a product of the numbers as they were saved, with all their digits. They are each read here
// once, and are turned into operands in place. The states at a sequence's ends are read unrounded in float32, since in a short sequence
// they are all there is; these and float32 inputs are summed on ordinary cores, eight rows of V at a time.
struct Straight {
  // A power of two as two factors, since float16 does not hold the smallest ones. The second is 1 but for factors below 2^-14.
  struct Factor {
    unsigned first, second;

    __device__ __forceinline__ explicit Factor(float x) : first(both(fminf(fmaxf(x, SMALL), 32768.f))), second(both(fminf(x / SMALL, 1.f))) {}
    __device__ __forceinline__ void scale(unsigned& word) const { word = product_of_pairs(float16{}, product_of_pairs(float16{}, word, first), second); }

   private:
    static constexpr float SMALL = 1.f / 16384;
    static __device__ __forceinline__ unsigned both(float x) { return pack(float16{}, make_float2(x, x)); }
  };
  // Turns the warp's 16 rows of V, from `rows` on, into operands.
  static __device__ __forceinline__ void make_operands_of(char* rows, const Factor& factor) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      uint4& piece = *reinterpret_cast<uint4*>(StateSlice::from(rows, n * 8) + lane_id() * 16);  // a lane has one row of a square
      uint4 word = piece;
      factor.scale(word.x);
      factor.scale(word.y);
      factor.scale(word.z);
      factor.scale(word.w);
      piece = word;
    }
  }
  // The diagonal's element of this lane, which only every fourth lane has.
  static __device__ __forceinline__ float diagonal(float2 x) { return lane_row() % 2 == 0 ? x.x : x.y; }
  static __device__ __forceinline__ void add_products(char* shared, char* slice, int block, int channels, int first) {
    static_assert(SLICE <= BLOCKS * 16, "a warp has at most 16 rows of V");
    float sum[4] = {};  // of eight channels each
    if (block * 16 < SLICE) {
      char* h_rows = StateSlice::from(slice + Shared::state, block * 16, channels);
      char* dh_rows = StateSlice::from(slice + Shared::d_state, block * 16, channels);
      const float* scales = reinterpret_cast<const float*>(shared + Shared::state_scales) + (first / 16 + block) * SavedState::REPEATS;
      const float of_h = scales[0], of_dh = scales[32];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const Block<Operand> h = StateSlice::load_transposed(h_rows, 0, c * 16), dh = StateSlice::load_transposed(dh_rows, 0, c * 16);
        Sum x;
        clear(x);
        product(x, h, as_right(dh));
        sum[2 * c] = of_h * (of_dh * diagonal(x.pair[0]));
        sum[2 * c + 1] = of_h * (of_dh * diagonal(x.pair[3]));
      }
      __syncwarp();  // all lanes have read the numbers as they were saved
      make_operands_of(h_rows, Factor(of_h));
      make_operands_of(dh_rows, Factor(of_dh));
    }
    if (lane_id() % 4 != lane_row() / 2) return;
    float* to = reinterpret_cast<float*>(shared + Shared::straight) + block * D + channels + lane_row();
#pragma unroll
    for (int n = 0; n < 4; ++n) to[n * 8] = first == 0 ? sum[n] : to[n * 8] + sum[n];
  }
  static __device__ __forceinline__ float2 halves(unsigned& word, float scale) {
    float2 x = unpack(float16{}, word);
    x = make_float2(scale * x.x, scale * x.y);
    word = pack(float16{}, x);
    return x;
  }
  template <class T>
  static __device__ __forceinline__ void eight(float2 (&x)[4], T* row, float scale) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int n = 0; n < 4; ++n) x[n] = load_pair(row + 2 * n);
    } else {
      uint4 word = *reinterpret_cast<const uint4*>(row);
      x[0] = halves(word.x, scale);
      x[1] = halves(word.y, scale);
      x[2] = halves(word.z, scale);
      x[3] = halves(word.w, scale);
      *reinterpret_cast<uint4*>(row) = word;
    }
  }
  static __device__ __forceinline__ void replace(float2 (&x)[4], const float* exact, float factor) {
#pragma unroll
    for (int n = 0; n < 4; ++n) x[n] = make_float2(factor * exact[2 * n * D], factor * exact[(2 * n + 1) * D]);
  }
  template <bool AT_AN_END>
  static __device__ __forceinline__ void sums(float (&sum)[8], char* shared, char* slice, int block, int channel, int first, const float* exact_initial, const float* exact_final, const char* placed) {
#pragma unroll 1
    for (int v = block * 8 + lane_id() % 8; v < SLICE; v += BLOCKS * 8) {
      float2 h[4], dh[4];
      const float* scales = reinterpret_cast<const float*>(shared + Shared::state_scales) + (first + v) / 16 * SavedState::REPEATS;
      eight(h, StateSlice::at(slice + Shared::state, v, channel), scales[0]);
      eight(dh, StateSlice::at(slice + Shared::d_state, v, channel), scales[32]);
      if constexpr (AT_AN_END) {
        if (exact_initial != nullptr) replace(h, exact_initial + channel * D + v, Scales::of_v(placed));
        if (exact_final != nullptr) replace(dh, exact_final + channel * D + v, Scales::of_do(placed));
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        sum[2 * n] += h[n].x * dh[n].x;
        sum[2 * n + 1] += h[n].y * dh[n].y;
      }
    }
  }
  // exact_initial, exact_final (may be null): [K, V], from this slice's first column of V on. placed: from where `Scales` are read.
  static __device__ __forceinline__ void add(char* shared, char* slice, int block, int channels, int first, const float* exact_initial, const float* exact_final, const char* placed) {
    if constexpr (HALVES) {
      if (exact_initial == nullptr && exact_final == nullptr) {
        add_products(shared, slice, block, channels, first);
        return;
      }
    }
    const int channel = channels + lane_id() / 8 * 8;
    float sum[8] = {};
    if (HALVES || exact_initial != nullptr || exact_final != nullptr) {
      sums<true>(sum, shared, slice, block, channel, first, exact_initial, exact_final, placed);
    } else {
      sums<false>(sum, shared, slice, block, channel, first, nullptr, nullptr, placed);
    }
    int count = 8;  // sum over eight lanes: each step halves the sums that a lane has
#pragma unroll
    for (int step = 4; step >= 1; step /= 2) {
      count /= 2;
      const bool upper = lane_id() & step;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (i < count) sum[i] = (upper ? sum[i + count] : sum[i]) + __shfl_xor_sync(0xffffffffu, upper ? sum[i] : sum[i + count], step);
    }
    float* to = reinterpret_cast<float*>(shared + Shared::straight) + block * D + channel + lane_id() % 8;
    *to = first == 0 ? sum[0] : *to + sum[0];
  }
};
