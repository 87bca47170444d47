// The part of the CUDA runtime that the launching code uses, on the executor.
#pragma once

#include "simt.h"

using cudaError_t = int;
using cudaStream_t = struct simt_stream*;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

// As on a GPU, a launch that asks for more than 48 KiB of dynamic shared memory fails unless its kernel was
// allowed to.
namespace simt {
size_t& allowed_shared(const void* kernel);
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || size_t(bytes) > simt::SHARED_BYTES) return 1;
  simt::allowed_shared(kernel) = size_t(bytes);
  return 0;
}

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  if (grid.x == 0 || grid.y != 1 || grid.z != 1 || block.y != 1 || block.z != 1) return 9;
  if (block.x == 0 || block.x > 1024 || block.x % simt::LANES) return 9;
  if (config->dynamicSmemBytes > simt::allowed_shared(reinterpret_cast<const void*>(kernel))) return 1;
  simt::launch(grid, block, config->dynamicSmemBytes, kernel,
               std::tuple<P...>(std::forward<A>(arguments)...));
  return 0;
}
