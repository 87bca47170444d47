// Re-projection: what comes after the passes over the pixels (common/scores.cuh, gather.cuh, spread.cuh).
#pragma once

#include "common/node_parameters.cuh"

namespace segkernels::cuda {

// dz [B, K·D] from its partial sums [B, splits, K·D]; one thread per element.
template <class T>
__global__ void __launch_bounds__(BLOCK, 1)
    reproject_finish_kernel(const acc_t<T>* __restrict__ sums, int splits, int64_t size, int64_t images,
                            T* __restrict__ dz) {
  const int64_t i = int64_t(blockIdx.x) * BLOCK + threadIdx.x;
  if (i >= images * size) return;
  dz[i] = narrow<T>(sum_of_parts(sums + i / size * splits * size + i % size, splits, size));
}

}  // namespace segkernels::cuda
