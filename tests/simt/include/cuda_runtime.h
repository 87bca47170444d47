// The part of the CUDA runtime that the launching code uses, on the executor.
#pragma once

#include "simt.h"

using cudaError_t = int;
using cudaStream_t = struct simt_stream*;
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrCooperativeLaunch = 95,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
struct cudaFuncAttributes {
  int ptxVersion;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative = 2, cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
namespace simt {
// cudaErrorInvalid…, cudaErrorCooperativeLaunchTooLarge
constexpr int kInvalidValue = 1, kInvalidConfiguration = 9, kTooLarge = 720;
}  // namespace simt

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  const simt::Device& device = simt::device();
  switch (which) {
    case cudaDevAttrMultiProcessorCount:
      *value = device.multiprocessors;
      break;
    case cudaDevAttrL2CacheSize:
      *value = device.l2_bytes;
      break;
    case cudaDevAttrCooperativeLaunch:
      *value = 1;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = int(device.shared_bytes);
      break;
  }
  return 0;
}
template <class F>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, F*) {
  attributes->ptxVersion = simt::device().ptx;
  return 0;
}
// What registers allow is not known here.
template <class F>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, F*, int threads, size_t shared_bytes) {
  *blocks = int(simt::resident(unsigned(threads), shared_bytes));
  return 0;
}
template <class F>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, F*, const cudaLaunchConfig_t* config) {
  const unsigned blocks = config->numAttrs ? config->attrs[0].val.clusterDim.x : 1;
  const dim3& block = config->blockDim;
  const size_t each = simt::resident(block.x * block.y * block.z, config->dynamicSmemBytes);
  *clusters = simt::device().ptx < 90 ? 0 : int(each * size_t(simt::device().multiprocessors) / blocks);
  return 0;
}

// As on a GPU, a launch that asks for more than 48 KiB of dynamic shared memory fails unless its kernel was
// allowed to.
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || size_t(bytes) > simt::device().shared_bytes) return simt::kInvalidValue;
  simt::allowed_shared(kernel) = size_t(bytes);
  return 0;
}

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> arguments;
  } call{kernel, {std::forward<A>(arguments)...}};
  simt::Launch launch = {reinterpret_cast<const void*>(kernel),
                         config->gridDim,
                         config->blockDim,
                         1,
                         false,
                         config->dynamicSmemBytes,
                         [](void* p) {
                           Call& c = *static_cast<Call*>(p);
                           std::apply(c.kernel, c.arguments);
                         },
                         &call,
                         sizeof call};
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& a = config->attrs[i];
    if (a.id == cudaLaunchAttributeCooperative)
      launch.cooperative = a.val.cooperative;
    else
      launch.cluster = a.val.clusterDim.x * a.val.clusterDim.y * a.val.clusterDim.z;
  }
  return simt::launch(launch);
}
