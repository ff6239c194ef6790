// As lkda/ops/include/async_copy.cuh, for a host compiler: copies land at once.
#pragma once
#include "cuda.h"

inline void copy_16_async(void* to, const void* from, bool valid = true) {
  if ((reinterpret_cast<size_t>(to) | reinterpret_cast<size_t>(from)) % 16 != 0) abort();
  valid ? memcpy(to, from, 16) : memset(to, 0, 16);
}
template <int BYTES>
void copy_async(void* to, const void* from, bool valid = true) {
  if ((reinterpret_cast<size_t>(to) | reinterpret_cast<size_t>(from)) % BYTES != 0) abort();
  valid ? memcpy(to, from, BYTES) : memset(to, 0, BYTES);
}
inline void copy_8_async(void* to, const void* from, bool valid = true) { copy_async<8>(to, from, valid); }
inline void copy_4_async(void* to, const void* from) { copy_async<4>(to, from); }
inline void commit_copies() {}
template <int NEWEST>
void wait_copies() {}
inline void prefetch(const void*) {}
