// Tensors as the kernels over pixels and nodes take them.
#pragma once

#include "common/cuda.h"
#include "common/node_product.cuh"

namespace segkernels::cuda {

template <class T>
PixelMap<T> pixel_map(const Tensor& map) {
  const bool vectors = vectorises(16 / int(sizeof(T)), map.size(1), {&map});
  if constexpr (std::is_const_v<T>)
    return {const_data<std::remove_const_t<T>>(map), strides_of(map), vectors};
  else
    return {mutable_data<T>(map), strides_of(map), vectors};
}
template <class T>
PixelMap<T> pixel_map(const std::optional<Tensor>& map) {
  return map ? pixel_map<T>(*map) : PixelMap<T>{};
}

// Whether rows of nodes [.., C] can be read by 16 bytes.
inline bool nodes_vectorise(const Tensor& nodes) {
  const int64_t C = nodes.size(nodes.dim() - 1);
  return C * nodes.element_size() % 16 == 0 && reinterpret_cast<uintptr_t>(nodes.const_data_ptr()) % 16 == 0;
}

inline NodeShape shape_of(const Tensor& map, int64_t nodes) {
  STD_TORCH_CHECK(map.size(2) * map.size(3) < int64_t(1) << 30, "segkernels: H·W must be below 2^30");
  return {int(map.size(2) * map.size(3)), int(map.size(3)), int(map.size(1)), int(nodes)};
}

}  // namespace segkernels::cuda
