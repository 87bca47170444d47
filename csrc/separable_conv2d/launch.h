// The arithmetic of separable_conv2d's launches.
#pragma once

#include "depthwise_conv2d/launch.h"
#include "separable_conv2d/kernels.cuh"

namespace segkernels::cuda {

inline Activation activation(const std::string& name) {
  if (name == "none") return Activation::none;
  if (name == "relu") return Activation::relu;
  STD_TORCH_CHECK(name == "relu6", "segkernels: activation must be none, relu or relu6, got ", name);
  return Activation::relu6;
}

// The geometry of a 1×1 kernel over the pixels of `map`.
inline Correlation pointwise(const Tensor& map) {
  Correlation k = {};
  k.channels = int(map.size(1));
  k.rows = k.out_rows = int(map.size(2));
  k.columns = k.out_columns = int(map.size(3));
  k.kh = k.kw = k.stride_h = k.stride_w = 1;
  for (int i = 0; i < MAX_RATES; ++i) k.rate_h[i] = k.rate_w[i] = 1;
  return k;
}

// Calls f(V, PC): the vector width, and how many times 64 output channels a block owns (its pixels: 128). All
// output channels in one block mean that h is made once; float and double have registers for 128 only.
template <class T, class F>
void by_tile(bool vectors, int64_t outer, F&& f) {
  using std::integral_constant;
  const auto with_columns = [&](auto width) {
    if constexpr (sizeof(T) == 2) {
      if (outer > 128) return f(width, integral_constant<int, 4>());
    }
    return f(width, integral_constant<int, 2>());
  };
  if constexpr (sizeof(T) < 8) {
    if (vectors) return with_columns(integral_constant<int, whole<T>>());
  }
  return with_columns(integral_constant<int, 1>());
}
constexpr int PIXEL_WARPS = 4;

// How many pixels each partial sum of dv covers: few partial sums, but blocks enough to fill the device.
inline int64_t dv_split(int64_t pixels, int64_t tiles) {
  int64_t split = 4096;
  while (split > 512 && ceil_div(pixels, split) * tiles < 132 * 2) split /= 2;
  return split;
}

}  // namespace segkernels::cuda
