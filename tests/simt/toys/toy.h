// Small kernels y = f(x) that are launched by name, as a test asks.
#pragma once

#include <map>
#include <string>

#include "common/cuda.h"

namespace segkernels::cuda {

using Kernel = void (*)(const float* x, float* y, int n);
using Kernels = std::map<std::string, Kernel>;

// y [n], zero or unwritten, from one launch; x must be dense. cooperative: all blocks are resident.
inline Tensor run(const Kernels& kernels, const std::string& name, const Tensor& x, int64_t n, int64_t blocks,
                  int64_t threads, int64_t shared_bytes, int64_t cluster, bool cooperative, bool zero) {
  const Queue queue(x);
  Tensor y = empty(x, {n});
  if (zero) torch::stable::zero_(y);
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = unsigned(cluster);
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeCooperative;
  attributes[1].val.cooperative = cooperative;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.attrs = attributes, config.numAttrs = cooperative ? 2 : 1;
  STD_CUDA_CHECK(
      cudaLaunchKernelEx(&config, kernels.at(name), const_data<float>(x), mutable_data<float>(y), int(n)));
  return y;
}

// The operator segkernels_toys::<name> for a table of kernels.
#define TOYS(name, kernels)                                                                             \
  Tensor name(std::string kernel, Tensor x, int64_t n, int64_t blocks, int64_t threads, int64_t shared, \
              int64_t cluster, bool cooperative, bool zero) {                                           \
    return run(kernels, kernel, x, n, blocks, threads, shared, cluster, cooperative, zero);             \
  }                                                                                                     \
  STABLE_TORCH_LIBRARY_FRAGMENT(segkernels_toys, m) {                                                   \
    m.def(#name                                                                                         \
          "(str kernel, Tensor x, int n, int blocks, int threads, int shared, int cluster, "            \
          "bool cooperative, bool zero) -> Tensor");                                                    \
  }                                                                                                     \
  STABLE_TORCH_LIBRARY_IMPL(segkernels_toys, CUDA, m) { m.impl(#name, TORCH_BOX(&name)); }

}  // namespace segkernels::cuda
