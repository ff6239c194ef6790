// Runs a kernel's clusters one after another, the threads of a cluster's blocks as fibers. Shared memory starts as NaN.
#pragma once

Dim threadIdx, blockIdx, gridDim;
constexpr int LARGEST_CLUSTER = 2;
constexpr size_t SHARED = 256 * 1024;  // bytes of a block
alignas(1024) static unsigned char shared_memories[LARGEST_CLUSTER][SHARED];
unsigned char* shared_memory;

constexpr size_t STACK = 256 * 1024;  // bytes; only those that are used take memory
struct Fiber {
  ucontext_t context;
  jmp_buf resume;
  bool started, done;
  std::unique_ptr<char[]> stack{new char[STACK]};
  std::vector<std::function<void()>> copies;  // to GPU memory, which are done when the thread waits for them
};
struct Barrier {
  int arrived, generation;
};
struct Threads {
  int alive;
  Barrier all, warps[32], named[16];
  Exchange exchanges[32];
};
static std::vector<Fiber> fibers;  // of one block after the other
static jmp_buf scheduler;
static int current, threads_of_block, first_block;
static Threads blocks_of_cluster[LARGEST_CLUSTER];
static Barrier cluster_barrier;
// Threads of a cluster that run only in every PACE-th round, so that the others are as far ahead of them as barriers and signals let them be.
// Copies between blocks are done in every PACE-th round too.
constexpr int PACE = 10;
static std::vector<std::function<void()>> postponed;
void do_later(std::function<void()> copy) { postponed.push_back(std::move(copy)); }
void do_at_wait(std::function<void()> copy) { fibers[current].copies.push_back(std::move(copy)); }
void do_what_waits() {
  for (auto& copy : fibers[current].copies) copy();
  fibers[current].copies.clear();
}
static int first_late, last_late;
extern "C" void make_late(int first, int last) { first_late = first, last_late = last; }
static void (*entry)(void*);
static void* argument;

static int rank() { return current / threads_of_block; }
static Threads& block() { return blocks_of_cluster[rank()]; }
static void become_current() {
  threadIdx = {static_cast<unsigned>(current % threads_of_block), 0, 0};
  blockIdx = {static_cast<unsigned>(first_block + rank()), 0, 0};
  shared_memory = shared_memories[rank()];
}
void give_way() {
  if (!_setjmp(fibers[current].resume)) _longjmp(scheduler, 1);
  become_current();
}
static void wait_at(Barrier& barrier, int expected) {
  const int generation = barrier.generation;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation) give_way();
}
Exchange& exchange() { return block().exchanges[threadIdx.x / 32]; }
void warp_barrier() { wait_at(block().warps[threadIdx.x / 32], 32); }
void __syncthreads() { wait_at(block().all, block().alive); }
void wait_at_barrier(int number, int threads) { wait_at(block().named[number], threads); }
void meet_cluster() { wait_at(cluster_barrier, static_cast<int>(fibers.size())); }  // all of them: none may end before the last meeting
void* place_in(const void* at, int rank) { return const_cast<unsigned char*>(static_cast<const unsigned char*>(at) - shared_memory + shared_memories[rank]); }

static void run_fiber() {
  entry(argument);
  if (!fibers[current].copies.empty()) abort();  // a block's shared memory ends with it
  fibers[current].done = true;
  if (block().all.arrived == --block().alive && block().alive > 0) {
    block().all.arrived = 0;
    ++block().all.generation;
  }
  _longjmp(scheduler, 1);
}

template <class Kernel>
void launch(int blocks, int cluster, int threads, Kernel kernel) {
  if (cluster > LARGEST_CLUSTER || blocks % cluster != 0) abort();
  entry = [](void* p) { (*static_cast<Kernel*>(p))(); };
  argument = &kernel;
  fibers = std::vector<Fiber>(cluster * threads);
  threads_of_block = threads;
  gridDim = {static_cast<unsigned>(blocks), 1, 1};
  for (first_block = 0; first_block < blocks; first_block += cluster) {
    memset(shared_memories, 0xff, cluster * SHARED);
    int left = 0;  // threads
    for (int n = 0; n < cluster; ++n) left += blocks_of_cluster[n].alive = threads;
    for (Fiber& fiber : fibers) fiber.started = fiber.done = false;
    for (int round = 0; left > 0; ++round) {
      left = 0;
      if (round % PACE == PACE - 1) {
        for (auto& copy : postponed) copy();
        postponed.clear();
      }
      for (current = 0; current < static_cast<int>(fibers.size()); ++current) {
        Fiber& fiber = fibers[current];
        if (fiber.done) continue;
        ++left;
        if (first_late <= current && current < last_late && round % PACE != 0) continue;
        become_current();
        if (_setjmp(scheduler)) continue;
        if (fiber.started) _longjmp(fiber.resume, 1);
        fiber.started = true;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK;
        makecontext(&fiber.context, run_fiber, 0);
        setcontext(&fiber.context);
      }
    }
  }
  fibers = std::vector<Fiber>();  // the library of each kernel has its own, and is never unloaded
}
