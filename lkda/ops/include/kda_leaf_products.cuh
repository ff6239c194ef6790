// Akk and Aqk inside a leaf on tensor cores: three more levels of the tree (kda_tree.cuh), of groups of 2n tokens with n = 4, 2 and
// 1, and the diagonal of Aqk. As on the other levels decay(j..i) = f_i f_j, with products of E up to the boundary of the halves.
//
// A warp multiplies 64 channels of one leaf, and each of its lanes has two of them. Two products of 16 rows and 8 columns have all
// pairs of the leaf:
//   neighbours  rows 0-3: E_i k_i of tokens 1, 3, 5, 7;   4-7: the same of q;   8-15: q of all tokens.   columns: k of all tokens.
//   farther     rows 0-3: f k of tokens 2, 3, 6, 7;   4-7: the same of q;   8-11: f k of tokens 4 to 7;   12-15: the same of q.
//               columns 0-3: f k of tokens 0, 1, 4, 5;   4-7: f k of tokens 0 to 3.
// Factors and operands are rounded to float16.
#pragma once
#include "kda_tree.cuh"

// What a warp knows after a product: of row lane / 4 (`top`) and row 8 + lane / 4 two columns, 2 (lane % 4) and the next.
struct LeafSums {
  float2 top = {0.f, 0.f}, bottom = {0.f, 0.f};
};

// Operands: where a warp has the operands, a Tile or a class like it: 16 rows, then 8 columns.
template <class Operands = Tile<float16, 24, 64>>
struct LeafProducts {
  static constexpr int bytes = Operands::bytes;

  char* operands;
  int lane;
  unsigned e[LEAF], q[LEAF], k[LEAF];  // float16 pairs

  __device__ __forceinline__ LeafProducts(char* operands, const Gates& gates, const Leaf<float16>& q_leaf, const Leaf<float16>& k_leaf) : operands(operands), lane(opaque(lane_id())) {
#pragma unroll
    for (int i = 0; i < LEAF; ++i) {
      e[i] = pack(float16{}, gates.e[i]);
      q[i] = q_leaf.pair[i];
      k[i] = k_leaf.pair[i];
    }
  }

  __device__ __forceinline__ LeafSums neighbours() const {
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      write(m, times(e[2 * m + 1], k[2 * m + 1]));
      write(4 + m, times(e[2 * m + 1], q[2 * m + 1]));
    }
#pragma unroll
    for (int i = 0; i < LEAF; ++i) {
      write(8 + i, q[i]);
      write(16 + i, k[i]);
    }
    return multiplied();
  }

  __device__ __forceinline__ LeafSums farther(const Gates& gates) const {
    const auto product = [&](int i, int j) { return ::times(gates.e[i], gates.e[j]); };
    const float2 e23 = product(2, 3), e45 = product(4, 5), e67 = product(6, 7);
    const unsigned f3 = pack(float16{}, e23), f5 = pack(float16{}, e45), f7 = pack(float16{}, e67);
    write_row(0, 4, 2, e[2]);
    write_row(1, 5, 3, f3);
    write_row(2, 6, 6, e[6]);
    write_row(3, 7, 7, f7);
    write_row(8, 12, 4, e[4]);
    write_row(9, 13, 5, f5);
    write_row(10, 14, 6, pack(float16{}, ::times(e45, gates.e[6])));
    write_row(11, 15, 7, pack(float16{}, ::times(e45, e67)));
    write(16, times(e[1], k[0]));
    write(17, k[1]);
    write(18, times(e[5], k[4]));
    write(19, k[5]);
    write(20, times(pack(float16{}, ::times(gates.e[1], e23)), k[0]));
    write(21, times(f3, k[1]));
    write(22, times(e[3], k[2]));
    write(23, k[3]);
    return multiplied();
  }

 private:
  static __device__ __forceinline__ unsigned times(unsigned a, unsigned b) { return product_of_pairs(float16{}, a, b); }
  __device__ __forceinline__ void write(int row, unsigned pair) const { *reinterpret_cast<unsigned*>(Operands::at(operands, row, 2 * lane)) = pair; }
  __device__ __forceinline__ void write_row(int row_of_k, int row_of_q, int token, unsigned factor) const {
    write(row_of_k, times(factor, k[token]));
    write(row_of_q, times(factor, q[token]));
  }
  __device__ __forceinline__ LeafSums multiplied() const {
    __syncwarp();
    LeafSums sums;
#pragma unroll
    for (int d = 0; d < 64; d += 32) {
      unsigned columns[4];
      load_matrices(columns, Operands::at(operands, 16 + lane_id() % 8, d + lane_id() / 8 * 8));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Block<float16> rows = Operands::load(operands, 0, d + 16 * half);
        multiply(float16{}, sums.top, sums.bottom, rows.word, columns[2 * half], columns[2 * half + 1]);
      }
    }
    __syncwarp();  // the operands may be overwritten
    return sums;
  }
};

// Calls of_k(i, j, a) and of_q(i, j, a) with the sums over channels a_ij of tokens i and j that a lane has.
template <class OfK, class OfQ>
__device__ __forceinline__ void for_neighbours(const LeafSums& sums, OfK of_k, OfQ of_q) {
  const int lane = opaque(lane_id()), row = lane / 4, m = row % 4, column = lane % 4;
  if (column == m) {
    if (row < 4) {
      of_k(2 * m + 1, 2 * m, sums.top.x);
    } else {
      of_q(2 * m + 1, 2 * m, sums.top.x);
    }
  }
  if (column == row / 2) of_q(row, row, row % 2 ? sums.bottom.y : sums.bottom.x);
}

// The same with two neighbouring tokens j at a time: of_k(i, j, (a_ij, a_i(j+1))).
template <class OfK, class OfQ>
__device__ __forceinline__ void for_farther(const LeafSums& sums, OfK of_k, OfQ of_q) {
  const int lane = opaque(lane_id()), row = lane / 4, m = row % 4, column = lane % 4;
  const bool far = column >= 2;  // n = 4
  if (!far && column != m / 2) return;  // tokens of two groups
  const int i = far ? 4 + m : 2 + m + m / 2 * 2, j = far ? 2 * column - 4 : 4 * column;
  const float2 a = far ? sums.bottom : sums.top;
  if (row < 4) {
    of_k(i, j, a);
  } else {
    of_q(i, j, a);
  }
}
