// The depthwise convolution on the CPU, for operators that contain it.
#pragma once

#include <tuple>
#include <vector>

#include "common/tensor.h"

namespace segkernels {

// w [R, C, k_h·k_w] as [R·k_h·k_w, C], so that a tap's weights are consecutive channels.
template <class T>
std::vector<T> pack_depthwise_weights(const T* w, int64_t R, int64_t C, int64_t taps) {
  std::vector<T> packed(R * C * taps);
  for (int64_t rate = 0; rate < R; ++rate)
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t c = 0; c < C; ++c) packed[(rate * taps + t) * C + c] = w[(rate * C + c) * taps + t];
  return packed;
}

// dX, dW, db as `need` says; [0] for those it does not.
std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_backward(Tensor dy, Tensor x, Tensor w,
                                                             std::vector<int64_t> stride,
                                                             std::vector<int64_t> padding,
                                                             std::vector<int64_t> dilation,
                                                             std::vector<int64_t> need);

}  // namespace segkernels
