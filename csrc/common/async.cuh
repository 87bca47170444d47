// Copies from global to shared memory that go on while the thread works (cp.async).
#pragma once

#ifdef __CUDACC__

#include <cuda_runtime.h>

#include <cstddef>

namespace segkernels::cuda {

// Begins to copy `bytes` ≤ BYTES (4, 8 or 16) bytes; the rest of the target becomes zero. Both places are
// aligned to BYTES.
template <int BYTES>
__device__ inline void copy_async(void* target, const void* source, int bytes = BYTES) {
  const unsigned place = unsigned(__cvta_generic_to_shared(target));
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place), "l"(source), "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(place), "l"(source), "n"(BYTES),
                 "r"(bytes)
                 : "memory");
}

// Closes the group of copies begun since the last one.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most LEFT of this thread's groups are under way; other threads see them after a barrier.
template <int LEFT>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

}  // namespace segkernels::cuda

#else
#include "simt_async.h"  // the host executor's definitions, tests/simt/include
#endif
