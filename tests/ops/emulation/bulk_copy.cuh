// As lkda/ops/include/bulk_copy.cuh, for a host compiler: a copy reads shared memory only when its thread waits for it.
#pragma once
#include "async_copy.cuh"

void do_at_wait(std::function<void()>);
void do_what_waits();

inline void copy_to_memory(char* to, const void* at, int bytes) {
  if ((reinterpret_cast<size_t>(to) | reinterpret_cast<size_t>(at) | bytes) % 16 != 0) abort();
  do_at_wait([=] { memcpy(to, at, bytes); });
}
inline void wait_until_read() { do_what_waits(); }
inline void wait_until_copied() { do_what_waits(); }
