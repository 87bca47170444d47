// The part of the CUDA runtime that the launching code uses, on the executor.
#pragma once

#include "simt.h"

using cudaError_t = int;
using cudaStream_t = struct simt_stream*;
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
constexpr int kInvalidValue = 1, kInvalidConfiguration = 9;  // cudaErrorInvalid…
}

// As on a GPU, a launch that asks for more than 48 KiB of dynamic shared memory fails unless its kernel was
// allowed to.
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || size_t(bytes) > simt::SHARED_BYTES) return simt::kInvalidValue;
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
