// Blocks of a cluster, which run at the same time and reach each other's shared memory (sm_90a). Addresses are those of the own block; `rank`
// says in which block's memory the same place is meant.
#pragma once
#include "async_copy.cuh"

// Waits until all threads of all blocks have come. What they wrote before is visible to all.
__device__ __forceinline__ void meet_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

__device__ __forceinline__ unsigned address_in(const void* at, int rank) {
  unsigned address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(at)), "r"(rank));
  return address;
}

// An mbarrier. Its phases are numbered from 0 on. A phase ends when as many arrivals as `prepare` says have come, and all bytes that they
// announced, which are then visible to who has waited. An arrival also says that the thread has read what it read before.
//
// Arrivals and waits have the scope of a block, which is the default, and as CUTLASS has it for clusters. With the scope of the cluster an
// arrival would first wait for all that its thread has written to global memory, and a wait would empty the L1 cache. Neither is needed:
// only copies write to another block, and the signal counts their bytes.
struct alignas(8) Signal {
  unsigned long long word;

  // By one thread, before any use. Then show_signals, then meet_cluster.
  __device__ __forceinline__ void prepare(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals) : "memory");
  }
  // Waits until a phase has ended. It is the present one or the one before.
  __device__ __forceinline__ void wait(int phase) {
    unsigned ended;
    do {
      asm volatile("{.reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;}"
                   : "=r"(ended)
                   : "r"(shared_address(this)), "r"(phase & 1)
                   : "memory");
    } while (!ended);
  }
  // Arrives at the signal of another block.
  __device__ __forceinline__ void arrive_in(int rank) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address_in(this, rank)) : "memory");
  }
  // The same, and announces bytes that copies to this block will bring.
  __device__ __forceinline__ void announce_in(int rank, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cluster.b64 _, [%0], %1;" ::"r"(address_in(this, rank)), "r"(bytes) : "memory");
  }
};

__device__ __forceinline__ void show_signals() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Starts copying `bytes`, a multiple of 16, to the same place of another block's shared memory. They count for its `signal`. What other
// threads wrote there is copied if they have called show_to_products (warpgroup.cuh) before a barrier.
__device__ __forceinline__ void copy_to_block(const void* at, int bytes, Signal* signal, int rank) {
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(address_in(at, rank)), "r"(shared_address(at)), "r"(bytes), "r"(address_in(signal, rank))
               : "memory");
}
