// The tree of anchors: products of E = exp(g) inside a leaf of 8 tokens, and from a leaf to the boundaries of its groups.
//
// A thread holds two channels of the 8 tokens of one leaf. On level b the halves of a group have 8 << b tokens. Leaf number l is
// in the second half (rows) of its group where bit b of l is set, else in the first half (columns).
#pragma once
#include "kda_chunk.cuh"

__device__ __forceinline__ float2 times(float2 a, float2 b) { return make_float2(a.x * b.x, a.y * b.y); }
__device__ __forceinline__ void add_to(float2& a, float2 b) {
  a.x += b.x;
  a.y += b.y;
}

constexpr float LOG2_E = 1.4426950408889634f;
__device__ __forceinline__ float2 exp2_fast(float2 x) { return make_float2(exp2_fast(x.x), exp2_fast(x.y)); }

// Two channels of a leaf's tokens, read from [rows, H, D], in memory's type. Tokens past the chunk's last one are zeros.
template <class T>
struct Packed {
  using type = unsigned;
};
template <>
struct Packed<float> {
  using type = float2;
};
template <class T>
struct Leaf {
  using Pair = typename Packed<T>::type;
  Pair pair[LEAF];

  __device__ __forceinline__ void read(const T* from, const Span& span, int heads, int head, int leaf, int channel) {
    const T* at = from + (static_cast<long long>(span.start + leaf * LEAF) * heads + head) * D + channel;
    const int left = span.tokens - leaf * LEAF;
#pragma unroll
    for (int i = 0; i < LEAF; ++i, at += heads * D) pair[i] = i < left ? *reinterpret_cast<const Pair*>(at) : Pair{};
  }
  __device__ __forceinline__ float2 operator[](int i) const {
    if constexpr (sizeof(T) == 2) {  // unpacked again at each use, which saves 16 registers
      unsigned word = pair[i];
      asm volatile("" : "+r"(word));
      return unpack(T{}, word);
    } else {
      return pair[i];
    }
  }
};

// The leaf in float16.
template <class T>
__device__ __forceinline__ Leaf<float16> in_float16(const Leaf<T>& leaf) {
  Leaf<float16> half;
#pragma unroll
  for (int i = 0; i < LEAF; ++i) half.pair[i] = same<T, float16> ? leaf.pair[i] : pack(float16{}, unpack(T{}, leaf.pair[i]));
  return half;
}

// E of a leaf's tokens; it is 1 past the chunk's last token. decay(j..i) and the factors are running products of E.
struct Gates {
  float2 e[LEAF];

  __device__ __forceinline__ void read(const float* g, const Span& span, int heads, int head, int leaf, int channel) {
    Leaf<float> nats;
    nats.read(g, span, heads, head, leaf, channel);
    set(nats);
  }
  __device__ __forceinline__ void set(const Leaf<float>& nats) {
#pragma unroll
    for (int i = 0; i < LEAF; ++i) e[i] = make_float2(exp2_fast(LOG2_E * nats[i].x), exp2_fast(LOG2_E * nats[i].y));
  }
  // Writes log2 of the whole leaf's product to leaf_logs [LEAVES][D], for the other threads.
  static __device__ __forceinline__ void share(const Leaf<float>& nats, float* leaf_logs, int leaf, int channel) {
    float2 sum = nats[0];
#pragma unroll
    for (int i = 1; i < LEAF; ++i) add_to(sum, nats[i]);
    *reinterpret_cast<float2*>(leaf_logs + leaf * D + channel) = make_float2(LOG2_E * sum.x, LOG2_E * sum.y);
  }
  // Calls use(i, f_i) for the tokens in ascending order: f_i = before * product of E from the leaf's first token through i.
  template <class Use>
  __device__ __forceinline__ float2 rows(float2 before, Use use) const {
    float2 f = before;
#pragma unroll
    for (int i = 0; i < LEAF; ++i) {
      f = times(f, e[i]);
      use(i, f);
    }
    return f;
  }
  // Calls use(j, f_j) in descending order: f_j = after * product of E after j to the leaf's end.
  template <class Use>
  __device__ __forceinline__ void columns(float2 after, Use use) const {
    float2 f = after;
#pragma unroll
    for (int j = LEAF - 1; j >= 0; --j) {
      use(j, f);
      f = times(f, e[j]);
    }
  }
};

// log2 of the product of the whole leaves between this leaf and the boundary of its group: `before` from the middle of the group
// to this leaf (for rows), `after` from this leaf to the middle (for columns). After the last level they reach from the chunk's
// start and to its end. Logs are summed because a product of many factors near 1 accumulates errors of one sign.
struct Reach {
  float2 before = {0.f, 0.f}, after = {0.f, 0.f};

  __device__ __forceinline__ float2 at(int level, int leaf) const {
    return level == 0 ? make_float2(1.f, 1.f) : exp2_fast(leaf >> level & 1 ? before : after);
  }
  __device__ __forceinline__ void widen(const float* leaf_logs, int level, int leaf, int channel) {
    const int first = ((leaf >> level) ^ 1) << level;  // the first leaf of the other half
    float2 other = make_float2(0.f, 0.f);
    for (int l = first; l < first + (1 << level); ++l) add_to(other, *reinterpret_cast<const float2*>(leaf_logs + l * D + channel));
    add_to(leaf >> level & 1 ? before : after, other);
  }
  // The same with fewer instructions: a choice between two references is a choice between addresses.
  __device__ __forceinline__ void widen_both(const float* leaf_logs, int level, int leaf, int channel) {
    const int first = ((leaf >> level) ^ 1) << level;
    const float* at = leaf_logs + first * D + channel;
    float2 other = *reinterpret_cast<const float2*>(at);
#pragma unroll
    for (int l = 1; l < 1 << level; ++l) add_to(other, *reinterpret_cast<const float2*>(at + l * D));
    const bool row = leaf >> level & 1;
    add_to(before, row ? other : make_float2(0.f, 0.f));
    add_to(after, row ? make_float2(0.f, 0.f) : other);
  }
};

// The operands of one level, k^ = f k and q^ = f q. From row 2 h n on, `rows` holds the second half of group n: h tokens of k^, then
// the same h tokens of q^. From row h n on, `columns` holds k^ of its first half. A factor f is the product inside the leaf times
// the reach.
struct Level {
  using Rows = Tile<Operand, C, D>;
  using Columns = Tile<Operand, C / 2, D>;
  static constexpr int rows = 0;
  static constexpr int columns = Rows::bytes;
  static constexpr int bytes = Rows::bytes + Columns::bytes;

  static __device__ __forceinline__ bool is_row(int level, int leaf) { return leaf >> level & 1; }
  // The first row of k^ of a leaf in the second half; that of q^ is LEAF << level further.
  static __device__ __forceinline__ int first_row(int level, int leaf) {
    return ((leaf >> (level + 1) << (level + 1)) + (leaf & ((1 << level) - 1))) * LEAF;
  }
  // The first row in `columns` of a leaf in the first half.
  static __device__ __forceinline__ int first_column(int level, int leaf) {
    return ((leaf >> (level + 1) << level) + (leaf & ((1 << level) - 1))) * LEAF;
  }

  // x: k (q with of_q), each token times the product of E from the leaf's first token through it.
  static __device__ __forceinline__ void write_rows(char* tile, int level, int leaf, int channel, float2 reach, const float2 (&x)[LEAF], bool of_q) {
    char* to = Rows::from(tile + rows, first_row(level, leaf) + (of_q ? LEAF << level : 0));
#pragma unroll
    for (int i = 0; i < LEAF; ++i) store_pair(Rows::at(to, i, channel), times(reach, x[i]));
  }
  // k: each token times the product of E after it to the leaf's end.
  static __device__ __forceinline__ void write_columns(char* tile, int level, int leaf, int channel, float2 reach, const float2 (&k)[LEAF]) {
    char* to = Columns::from(tile + columns, first_column(level, leaf));
#pragma unroll
    for (int j = 0; j < LEAF; ++j) store_pair(Columns::at(to, j, channel), times(reach, k[j]));
  }

  // The same for pairs of float16, for k and q together. f: the factors inside the leaf. On level 0 the reach is 1 and is not multiplied.
  static __device__ __forceinline__ void write_rows(char* tile, int level, int leaf, int channel, unsigned reach, const unsigned (&f)[LEAF], const Leaf<float16>& q, const Leaf<float16>& k) {
    char* to = Rows::from(tile + rows, first_row(level, leaf));
#pragma unroll
    for (int i = 0; i < LEAF; ++i) {
      const unsigned factor = level == 0 ? f[i] : product_of_pairs(float16{}, reach, f[i]);
      char* at = reinterpret_cast<char*>(Rows::at(to, i, channel));
      *reinterpret_cast<unsigned*>(at) = product_of_pairs(float16{}, factor, k.pair[i]);
      *reinterpret_cast<unsigned*>(at + Rows::offset(LEAF << level, 0)) = product_of_pairs(float16{}, factor, q.pair[i]);
    }
  }
  static __device__ __forceinline__ void write_columns(char* tile, int level, int leaf, int channel, unsigned reach, const unsigned (&k)[LEAF]) {
    char* to = Columns::from(tile + columns, first_column(level, leaf));
#pragma unroll
    for (int j = 0; j < LEAF; ++j) *reinterpret_cast<unsigned*>(Columns::at(to, j, channel)) = level == 0 ? k[j] : product_of_pairs(float16{}, reach, k[j]);
  }
};
