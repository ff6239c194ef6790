// As lkda/ops/include/cluster.cuh, for a host compiler.
#pragma once
#include "async_copy.cuh"

void meet_cluster();
void give_way();
void do_later(std::function<void()>);
// The same place in the shared memory of another block of the cluster.
void* place_in(const void* at, int rank);

struct alignas(8) Signal {
  unsigned char arrivals, missing;  // of each phase; still to come in the present one
  unsigned short phase;
  int bytes;  // announced, and not there yet; less than 0 if they come first

  void prepare(int expected) { arrivals = missing = expected, phase = 0, bytes = 0; }
  void wait(int number) {
    if (number != phase && number + 1 != phase) abort();  // the hardware knows only whether a phase is even
    while (phase == number) give_way();
  }
  void arrive_in(int rank) { static_cast<Signal*>(place_in(this, rank))->count(1, 0); }
  void announce_in(int rank, int more) { static_cast<Signal*>(place_in(this, rank))->count(1, more); }
  void count(int arrived, int more) {
    if (missing < arrived) abort();
    missing -= arrived;
    bytes += more;
    if (missing > 0 || bytes != 0) return;
    missing = arrivals;
    ++phase;
  }
};
static_assert(sizeof(Signal) == 8, "as an mbarrier");
inline void show_signals() {}

inline void copy_to_block(const void* at, int bytes, Signal* signal, int rank) {
  if ((reinterpret_cast<size_t>(at) | bytes) % 16 != 0) abort();
  void* to = place_in(at, rank);
  auto* there = static_cast<Signal*>(place_in(signal, rank));
  do_later([=] {
    memcpy(to, at, bytes);
    there->count(0, -bytes);
  });
}
