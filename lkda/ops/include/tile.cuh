// Matrices in shared memory, and the 16x16 blocks of them that a warp multiplies.
//
// A warp holds a block as four quadrants of 8x8: 0 is rows 0-7 and columns 0-7, 1 is rows 8-15 and columns 0-7, 2 is rows 0-7 and
// columns 8-15, 3 is rows 8-15 and columns 8-15. In each quadrant lane l has a pair: row l / 4, columns 2 (l % 4) and the next.
// Operands and float32 sums (Sum) have the same layout, so a rounded sum is an operand of the next product. A left operand (Block)
// has its quadrants in the order 0 1 2 3, a right operand (Right) in the order 0 2 1 3, so that the registers of one instruction
// are neighbours.
#pragma once
#include "mma.cuh"

__device__ __forceinline__ int lane_id() { return threadIdx.x % 32; }
__device__ __forceinline__ int lane_row() { return lane_id() / 4; }
__device__ __forceinline__ int lane_column() { return 2 * (lane_id() % 4); }
__device__ __forceinline__ int quadrant_row(int quadrant) { return (quadrant & 1) * 8 + lane_row(); }
__device__ __forceinline__ int quadrant_column(int quadrant) { return (quadrant >> 1) * 8 + lane_column(); }

template <class T>
struct Block {  // 16-bit elements
  unsigned word[4];
};
template <>
struct Block<tf32> {
  float2 pair[4];
};
template <>
struct Block<float> {
  float2 pair[4];
};

template <class T>
struct Right {
  unsigned word[4];
};
template <>
struct Right<tf32> {
  float2 pair[4];
};

template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

struct Sum {
  float2 pair[4];
};

__device__ __forceinline__ void clear(Sum& sum) {
#pragma unroll
  for (int q = 0; q < 4; ++q) sum.pair[q] = make_float2(0.f, 0.f);
}

// Loads and stores of elements that numeric.cuh does not have.
__device__ __forceinline__ float2 load_pair(const tf32* at) { return *reinterpret_cast<const float2*>(at); }
__device__ __forceinline__ void store_pair(tf32* at, float2 x) {
  *reinterpret_cast<float2*>(at) = make_float2(round_to_tf32(x.x), round_to_tf32(x.y));
}
template <class Half>
__device__ __forceinline__ void store_one(Half* at, float x) {
  at->bits = static_cast<unsigned short>(pack(Half{}, make_float2(x, 0.f)));
}
__device__ __forceinline__ void store_one(tf32* at, float x) { at->value = round_to_tf32(x); }

// Conversions between numbers and blocks.
template <class T>
__device__ __forceinline__ void set_pair(Block<T>& block, int q, float2 x) { block.word[q] = pack(T{}, x); }
__device__ __forceinline__ void set_pair(Block<tf32>& block, int q, float2 x) {
  block.pair[q] = make_float2(round_to_tf32(x.x), round_to_tf32(x.y));
}
template <class T>
__device__ __forceinline__ float2 get_pair(const Block<T>& block, int q) { return unpack(T{}, block.word[q]); }
__device__ __forceinline__ float2 get_pair(const Block<tf32>& block, int q) { return block.pair[q]; }
__device__ __forceinline__ float2 get_pair(const Block<float>& block, int q) { return block.pair[q]; }

template <class T>
__device__ __forceinline__ void store_quadrant(T* at, const Block<T>& block, int q) { *reinterpret_cast<unsigned*>(at) = block.word[q]; }
__device__ __forceinline__ void store_quadrant(tf32* at, const Block<tf32>& block, int q) { *reinterpret_cast<float2*>(at) = block.pair[q]; }

// Stores a quadrant of sums, rounded to the element type.
template <class T>
__device__ __forceinline__ void store_quadrant(T* at, const Sum& sum, int q) { store_pair(at, sum.pair[q]); }

template <class T>
__device__ __forceinline__ Block<T> round_to(const Sum& sum) {
  Block<T> block;
#pragma unroll
  for (int q = 0; q < 4; ++q) set_pair(block, q, sum.pair[q]);
  return block;
}

template <class To, class From>
__device__ __forceinline__ Block<To> convert(const Block<From>& from) {
  if constexpr (same<To, From>) {
    return from;
  } else {
    Block<To> to;
#pragma unroll
    for (int q = 0; q < 4; ++q) set_pair(to, q, get_pair(from, q));
    return to;
  }
}

template <class T>
__device__ __forceinline__ Right<T> as_right(const Block<T>& block) {
  return {{block.word[0], block.word[2], block.word[1], block.word[3]}};
}
__device__ __forceinline__ Right<tf32> as_right(const Block<tf32>& block) {
  return {{block.pair[0], block.pair[2], block.pair[1], block.pair[3]}};
}

// sum[m][n] += sum_k a[m][k] b[n][k]. In both operands the summed index runs along a row.
template <class T>
__device__ __forceinline__ void product(Sum& sum, const Block<T>& a, const Right<T>& b) {
  multiply(T{}, sum.pair[0], sum.pair[1], a.word, b.word[0], b.word[1]);
  multiply(T{}, sum.pair[2], sum.pair[3], a.word, b.word[2], b.word[3]);
}
__device__ __forceinline__ void product(Sum& sum, const Block<tf32>& a, const Right<tf32>& b) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    multiply(tf32{}, sum.pair[0], sum.pair[1], a.pair[2 * half], a.pair[2 * half + 1], b.pair[half]);
    multiply(tf32{}, sum.pair[2], sum.pair[3], a.pair[2 * half], a.pair[2 * half + 1], b.pair[2 + half]);
  }
}

// Sets all elements of a diagonal block to zero but those below the diagonal (row > column) or above it, and with `diagonal` those
// on it.
enum class Triangle { lower, upper };
template <Triangle SIDE, bool diagonal>
__device__ __forceinline__ bool kept(int row, int column) {
  return SIDE == Triangle::lower ? row > column || (diagonal && row == column) : row < column || (diagonal && row == column);
}
template <Triangle SIDE, bool diagonal, class Operand>
__device__ __forceinline__ void keep_words(Operand& block, int empty) {
  const unsigned mask = (kept<SIDE, diagonal>(lane_row(), lane_column()) ? 0x0000ffffu : 0u) |
                        (kept<SIDE, diagonal>(lane_row(), lane_column() + 1) ? 0xffff0000u : 0u);
  block.word[0] &= mask;
  block.word[3] &= mask;
  block.word[empty] = 0u;
}
template <Triangle SIDE, bool diagonal, class Operand>
__device__ __forceinline__ void keep_pairs(Operand& block, int empty) {
  const bool first = kept<SIDE, diagonal>(lane_row(), lane_column()), second = kept<SIDE, diagonal>(lane_row(), lane_column() + 1);
#pragma unroll
  for (int q = 0; q < 4; q += 3) {
    block.pair[q].x = first ? block.pair[q].x : 0.f;
    block.pair[q].y = second ? block.pair[q].y : 0.f;
  }
  block.pair[empty] = make_float2(0.f, 0.f);
}
template <Triangle SIDE, bool diagonal, class T>
__device__ __forceinline__ void keep(Block<T>& block) {
  constexpr int empty = SIDE == Triangle::lower ? 2 : 1;
  if constexpr (sizeof(T) == 2) {
    keep_words<SIDE, diagonal>(block, empty);
  } else {
    keep_pairs<SIDE, diagonal>(block, empty);
  }
}
template <Triangle SIDE, bool diagonal, class T>
__device__ __forceinline__ void keep(Right<T>& block) {
  constexpr int empty = SIDE == Triangle::lower ? 1 : 2;
  if constexpr (sizeof(T) == 2) {
    keep_words<SIDE, diagonal>(block, empty);
  } else {
    keep_pairs<SIDE, diagonal>(block, empty);
  }
}

// A matrix of ROWS x COLUMNS in panels of 128 bytes (64 if the matrix is no wider), each panel row after row. The 16-byte pieces of
// a row are permuted by the row's number, so that eight rows of one column of pieces lie in different banks. A TILED matrix is made
// of contiguous squares of 8x8 instead, which a warp can write fastest from its blocks. A matrix that one kernel passes to another
// has the same image in global memory.
template <class T, int ROWS, int COLUMNS, bool TILED = false>
struct Tile {
  static constexpr int bytes = ROWS * COLUMNS * sizeof(T);
  static constexpr int row_bytes = COLUMNS * sizeof(T);
  static_assert(TILED || row_bytes == 64 || row_bytes % 128 == 0, "a row is 64 bytes or panels of 128");

  static __device__ __forceinline__ int offset(int row, int column) {  // in bytes
    const int byte = column * static_cast<int>(sizeof(T));
    if constexpr (TILED) {
      return ((row >> 3) * (COLUMNS / 8) + (column >> 3)) * (64 * sizeof(T)) + ((row & 7) * 8 + (column & 7)) * sizeof(T);
    } else if constexpr (row_bytes == 64) {
      return row * 64 + (byte ^ (((row >> 1) & 3) << 4));
    } else {
      return (byte >> 7) * (ROWS * 128) + row * 128 + ((byte & 127) ^ ((row & 7) << 4));
    }
  }
  static __device__ __forceinline__ T* at(void* tile, int row, int column) {
    return reinterpret_cast<T*>(static_cast<char*>(tile) + offset(row, column));
  }
  static __device__ __forceinline__ const T* at(const void* tile, int row, int column) {
    return reinterpret_cast<const T*>(static_cast<const char*>(tile) + offset(row, column));
  }

  // The tile from a row and column on, which are multiples of 8 (not TILED: the column is 0). at(from(tile, row, column), i, j) is
  // at(tile, row + i, column + j), with less address arithmetic for a constant row and column.
  template <class Byte>
  static __device__ __forceinline__ Byte* from(Byte* tile, int row, int column = 0) {
    if constexpr (TILED) return tile + (row / 8 * (COLUMNS / 8) + column / 8) * static_cast<int>(64 * sizeof(T));
    return tile + row * (row_bytes == 64 ? 64 : 128);
  }

  // block[r][c] = tile[row + r][column + c]
  static __device__ __forceinline__ Block<T> load(const void* tile, int row, int column) {
    Block<T> block;
    if constexpr (sizeof(T) == 2) {
      const int lane = lane_id();
      load_matrices(block.word, at(tile, row + lane % 16, column + lane / 16 * 8));
    } else {
      const int lane = opaque(lane_id());
#pragma unroll
      for (int q = 0; q < 4; ++q) block.pair[q] = rounded(load_pair(at(tile, row + q % 2 * 8 + lane / 4, column + q / 2 * 8 + lane % 4 * 2)));
    }
    return block;
  }

  static __device__ __forceinline__ Right<T> load_right(const void* tile, int row, int column) {
    if constexpr (sizeof(T) == 2) {
      Right<T> block;
      const int lane = lane_id();
      load_matrices(block.word, at(tile, row + lane % 8 + lane / 16 * 8, column + (lane / 8 % 2) * 8));
      return block;
    } else {
      return as_right(load(tile, row, column));
    }
  }

  // block[r][c] = tile[row + c][column + r]
  static __device__ __forceinline__ Block<T> load_transposed(const void* tile, int row, int column) {
    Block<T> block;
    if constexpr (sizeof(T) == 2) {
      const int lane = lane_id();
      load_matrices_transposed(block.word, at(tile, row + lane % 8 + lane / 16 * 8, column + (lane / 8 % 2) * 8));
    } else {
      const int lane = opaque(lane_id());
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int r = row + q / 2 * 8 + lane % 4 * 2, c = column + q % 2 * 8 + lane / 4;
        const float* first = reinterpret_cast<const float*>(at(tile, r, c));
        const float* second = reinterpret_cast<const float*>(at(tile, r + 1, c));
        block.pair[q] = rounded(make_float2(*first, *second));
      }
    }
    return block;
  }

  static __device__ __forceinline__ Right<T> load_right_transposed(const void* tile, int row, int column) {
    if constexpr (sizeof(T) == 2) {
      Right<T> block;
      const int lane = lane_id();
      load_matrices_transposed(block.word, at(tile, row + lane % 16, column + lane / 16 * 8));
      return block;
    } else {
      return as_right(load_transposed(tile, row, column));
    }
  }

 private:
  static __device__ __forceinline__ float2 rounded(float2 x) {
    if constexpr (same<T, tf32>) return make_float2(round_to_tf32(x.x), round_to_tf32(x.y));
    return x;
  }
};
