// The operands of a leaf with factors in float16, which are multiplied two channels at a time: k_in, qg and kg, and those of all levels.
#pragma once
#include "kda_tree.cuh"

// Writes k_in, qg and kg. They and their factors are rounded to float16. place: a thread's `leaf`, and its two channels from `channel` on.
template <class Place>
__device__ __forceinline__ void write_workspace(char* workspace, const Place& place, const Gates& gates, const Reach& reach, const Leaf<float16>& q, const Leaf<float16>& k, float scale) {
  auto write = [&](int matrix, int i, float2 factor, const Leaf<float16>& x) {
    char* at = workspace + static_cast<unsigned>(Rows::offset(place.leaf * LEAF + i, place.channel)) + matrix;
    *reinterpret_cast<unsigned*>(at) = product_of_pairs(float16{}, pack(float16{}, factor), x.pair[i]);
  };
  gates.rows(reach.before, [&](int i, float2 f) {
    write(ChunkWorkspace::k_in, i, f, k);
    write(ChunkWorkspace::qg, i, make_float2(scale * f.x, scale * f.y), q);
  });
  gates.columns(reach.after, [&](int j, float2 f) { write(ChunkWorkspace::kg, j, f, k); });
}

// The operands of all levels, one after another.
struct Tree {
  char* first;

  __device__ __forceinline__ char* at(int level) const { return first + level * Level::bytes; }
};

// Writes the operands of all levels. They and their factors are rounded to float16. near: the reach on each level. levels: where they
// lie, as in Tree.
template <class Levels, class Place>
__device__ __forceinline__ void write_levels(const Levels& levels, const Place& place, const Gates& gates, const unsigned (&near)[LEVELS], const Leaf<float16>& q, const Leaf<float16>& k) {
  unsigned inside[LEAF];  // products inside the leaf
  gates.rows(make_float2(1.f, 1.f), [&](int i, float2 f) { inside[i] = pack(float16{}, f); });
#pragma unroll
  for (int level = 0; level < LEVELS; ++level)
    if (Level::is_row(level, place.leaf)) Level::write_rows(levels.at(level), level, place.leaf, place.channel, near[level], inside, q, k);
  gates.columns(make_float2(1.f, 1.f), [&](int j, float2 f) { inside[j] = product_of_pairs(float16{}, pack(float16{}, f), k.pair[j]); });
#pragma unroll
  for (int level = 0; level < LEVELS; ++level)
    if (!Level::is_row(level, place.leaf)) Level::write_columns(levels.at(level), level, place.leaf, place.channel, near[level], inside);
}

// The reach of a leaf to both ends of the chunk. near: that on each level, in float16, result. leaf_logs: the sums of all leaves' logs,
// from all threads.
template <class Place>
__device__ __forceinline__ Reach find_reach(const float* leaf_logs, const Place& place, unsigned (&near)[LEVELS]) {
  Reach reach;
#pragma unroll
  for (int level = 0; level < LEVELS; ++level) {
    near[level] = pack(float16{}, reach.at(level, place.leaf));
    reach.widen_both(leaf_logs, level, place.leaf, place.channel);
  }
  reach.before = exp2_fast(reach.before);
  reach.after = exp2_fast(reach.after);
  return reach;
}
