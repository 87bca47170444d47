// Barriers among some threads of a block, among the blocks of a cluster, which see each other's shared
// memory, and among blocks that count themselves.
#pragma once

#ifdef __CUDACC__

#include <cuda_runtime.h>

namespace segkernels::cuda {

// Barrier 1 … 15 of the block, for `threads` (whole warps) of it: those that wait, and those that only
// arrive.
__device__ inline void named_barrier_wait(int name, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}
__device__ inline void named_barrier_arrive(int name, int threads) {
  asm volatile("barrier.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// *p, and what was done before the atomics that made it so.
__device__ inline unsigned load_acquire(const unsigned* p) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ inline unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ inline unsigned cluster_blocks() {
  unsigned blocks;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return blocks;
}

// All threads of the cluster arrive; what they did before is seen by those that have waited. No block may end
// while others read its shared memory.
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// The place in block `rank`'s shared memory of p in this block's.
template <class T>
__device__ inline T* shared_of(T* p, unsigned rank) {
  T* there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(p), "r"(rank));
  return there;
}

#else  // no clusters: kernels of them are compiled, and not launched

__device__ inline void cluster_arrive() { __trap(); }
__device__ inline void cluster_wait() { __trap(); }

#endif

}  // namespace segkernels::cuda

#else
#include "simt_barriers.h"  // the host executor's definitions, tests/simt/include
#endif

namespace segkernels::cuda {

// For `blocks` blocks that are resident together and count themselves in *arrived, zero at first: what they
// did before is seen by those that have waited.
__device__ inline void counted_barrier(unsigned* arrived, unsigned blocks) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    const unsigned before = atomicAdd(arrived, 1u), all = before - before % blocks + blocks;
    while (load_acquire(arrived) < all) {
    }
  }
  __syncthreads();
}

}  // namespace segkernels::cuda
