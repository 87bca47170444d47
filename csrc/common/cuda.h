// What every cuda.cu needs of the host: launching, the device and stream of a tensor, storage types, choice
// of vectors.
#pragma once

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <initializer_list>

#include "common/device.cuh"
#include "common/tensor.h"

namespace segkernels::cuda {

// Blocks of a launch that are resident together, and may wait for each other: those of a cluster, or all.
struct Together {
  int cluster = 0;  // blocks; 0: no cluster is asked for
  bool cooperative = false;
};

// Work is queued on the current stream of x's device, which is the current device while this lives.
class __attribute__((visibility("hidden"))) Queue {
 public:
  explicit Queue(const Tensor& x) : device_(x.get_device_index()), guard_(device_) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // kernel<<<blocks, threads, shared bytes>>>(arguments)
  template <class... P, class... A>
  void launch(void (*kernel)(P...), int64_t blocks, int threads, size_t shared, A&&... arguments) const {
    launch_together({}, kernel, blocks, threads, shared, std::forward<A>(arguments)...);
  }
  template <class... P, class... A>
  void launch_together(Together together, void (*kernel)(P...), int64_t blocks, int threads, size_t shared,
                       A&&... arguments) const {
    if (blocks == 0) return;
    STD_TORCH_CHECK(blocks <= INT32_MAX, "segkernels: the map is too large for one launch");
    allow(kernel, shared);
    const Configuration made(stream_, together, unsigned(blocks), unsigned(threads), shared);
    STD_CUDA_CHECK(cudaLaunchKernelEx(&made.config, kernel, std::forward<A>(arguments)...));
  }

  // How many blocks of a kernel can be together.
  template <class... P>
  int64_t most_together(void (*kernel)(P...), int threads, size_t shared) const {
    if (int64_t(shared) > attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)) return 0;
    allow(kernel, shared);
    int each = 0;
    STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared));
    return attribute(cudaDevAttrCooperativeLaunch) * attribute(cudaDevAttrMultiProcessorCount) * each;
  }
  // Whether there are clusters of so many blocks of a kernel: up to 8 have them on every device and in all
  // code from sm_90 on.
  template <class... P>
  bool has_clusters(void (*kernel)(P...), int blocks, int threads, size_t shared) const {
    cudaFuncAttributes code = {};
    STD_CUDA_CHECK(cudaFuncGetAttributes(&code, kernel));
    if (code.ptxVersion < 90 || blocks > 8) return false;
    if (int64_t(shared) > attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)) return false;
    allow(kernel, shared);
    const Configuration made(stream_, {blocks}, unsigned(blocks), unsigned(threads), shared);
    int clusters = 0;
    STD_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&clusters, kernel, &made.config));
    return clusters > 0;
  }
  int64_t attribute(cudaDeviceAttr which) const {
    int value = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device_));
    return value;
  }

 private:
  struct Configuration {
    cudaLaunchAttribute attribute = {};
    cudaLaunchConfig_t config = {};

    Configuration(cudaStream_t stream, Together together, unsigned blocks, unsigned threads, size_t shared) {
      config.gridDim = dim3(blocks), config.blockDim = dim3(threads);
      config.dynamicSmemBytes = shared, config.stream = stream;
      config.attrs = &attribute, config.numAttrs = together.cooperative || together.cluster;
      if (together.cooperative) {
        attribute.id = cudaLaunchAttributeCooperative;
        attribute.val.cooperative = 1;
      } else {
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = unsigned(together.cluster);
        attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
      }
    }
    Configuration(const Configuration&) = delete;
  };

  template <class... P>
  static void allow(void (*kernel)(P...), size_t shared) {
    if (shared > 48 * 1024)
      STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                          cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
  }

  int device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// Calls f(T()) with the storage type T.
template <class F>
void by_storage(const Tensor& x, F&& f) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return f(double());
    case ScalarType::Float:
      return f(float());
    case ScalarType::BFloat16:
      return f(__nv_bfloat16());
    case ScalarType::Half:
      return f(__half());
    default:
      STD_TORCH_CHECK(false, "segkernels: unsupported type ", torch::headeronly::toString(x.scalar_type()));
  }
}

// The same for the types that are summed in float.
template <class F>
void by_narrow_storage(const Tensor& x, F&& f) {
  by_storage(x, [&](auto storage) {
    if constexpr (!std::is_same_v<decltype(storage), double>) f(storage);
  });
}

inline Strides strides_of(const Tensor& t) {
  const auto s = t.strides();
  return {s[0], s[1], s[2], s[3]};
}

template <class T>
const T* data(const std::optional<Tensor>& t) {
  return t ? const_data<T>(*t) : nullptr;
}

// Whether vectors of `width` channels can be moved whole in every map given: channels dense, everything else
// aligned.
inline bool vectorises(int width, int64_t channels, std::initializer_list<const Tensor*> maps) {
  if (channels % width) return false;
  for (const Tensor* t : maps) {
    const auto n = t->sizes(), s = t->strides();
    if (s[1] != 1 || reinterpret_cast<uintptr_t>(t->const_data_ptr()) % (width * t->element_size()))
      return false;
    for (const int d : {0, 2, 3})
      if (n[d] > 1 && s[d] % width) return false;
  }
  return true;
}

// How blocks lie over `items` per map (pixels or walks) and `channels`; see Tiling. turns > 1 (fewer, longer
// blocks) only where a block's sums cost something.
inline Tiling tile(int64_t items, int64_t channels, int rates, int width, int bytes, bool channels_last,
                   int turns) {
  Tiling t;
  t.lanes = 1;
  if (channels_last)
    while (t.lanes < WARP && t.lanes * width * bytes < 128 && t.lanes * width < channels) t.lanes *= 2;
  t.turns = turns;
  t.tiles = int(ceil_div(items, int64_t(BLOCK / t.lanes) * turns));
  t.channel_tiles = int(ceil_div(channels, int64_t(t.lanes) * width));
  t.rates = rates;
  return t;
}

// Bytes of shared memory for one value per (warp, lane, channel of a vector) and `values` of them.
inline size_t column_sums(const Tiling& t, int values, size_t bytes) {
  return size_t(BLOCK / WARP) * t.lanes * values * bytes;
}

}  // namespace segkernels::cuda
