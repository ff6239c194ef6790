// Runs a kernel's blocks one after another, a block's threads as fibers. Shared memory starts as NaN.
#pragma once

Dim threadIdx, blockIdx, gridDim;
alignas(1024) unsigned char shared_memory[256 * 1024];

constexpr size_t STACK = 256 * 1024;  // bytes; only those that are used take memory
struct Fiber {
  ucontext_t context;
  jmp_buf resume;
  bool started, done;
  std::unique_ptr<char[]> stack{new char[STACK]};
};
struct Barrier {
  int arrived, generation;
};
static std::vector<Fiber> fibers;
static jmp_buf scheduler;
static int current, alive;
static Barrier block_barrier, warp_barriers[32], named_barriers[16];
static Exchange exchanges[32];
static void (*entry)(void*);
static void* argument;

static void give_way() {
  if (!_setjmp(fibers[current].resume)) _longjmp(scheduler, 1);
  threadIdx.x = current;
}
static void wait_at(Barrier& barrier, int expected) {
  const int generation = barrier.generation;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation) give_way();
}
Exchange& exchange() { return exchanges[threadIdx.x / 32]; }
void warp_barrier() { wait_at(warp_barriers[threadIdx.x / 32], 32); }
void __syncthreads() { wait_at(block_barrier, alive); }
void wait_at_barrier(int number, int threads) { wait_at(named_barriers[number], threads); }

static void run_fiber() {
  entry(argument);
  fibers[current].done = true;
  if (block_barrier.arrived == --alive && alive > 0) {
    block_barrier.arrived = 0;
    ++block_barrier.generation;
  }
  _longjmp(scheduler, 1);
}

template <class Kernel>
void launch(int blocks, int threads, Kernel kernel) {
  entry = [](void* p) { (*static_cast<Kernel*>(p))(); };
  argument = &kernel;
  fibers = std::vector<Fiber>(threads);
  gridDim = {static_cast<unsigned>(blocks), 1, 1};
  for (int block = 0; block < blocks; ++block) {
    blockIdx = {static_cast<unsigned>(block), 0, 0};
    memset(shared_memory, 0xff, sizeof(shared_memory));
    alive = threads;
    for (Fiber& fiber : fibers) fiber.started = fiber.done = false;
    while (alive > 0) {
      for (current = 0; current < threads; ++current) {
        Fiber& fiber = fibers[current];
        if (fiber.done) continue;
        threadIdx = {static_cast<unsigned>(current), 0, 0};
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
