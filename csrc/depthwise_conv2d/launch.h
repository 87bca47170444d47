// The depthwise convolution as other operators' host code calls it (CUDA), and the arithmetic of its
// launches.
#pragma once

#include "common/cuda.h"
#include "depthwise_conv2d/kernels.cuh"

namespace segkernels::cuda {

using Ints = std::vector<int64_t>;

// y [B, R·C, H', W'] in x's memory format; with mean and var [R·C], also the moments of y per channel.
Tensor depthwise(const Queue& queue, const Tensor& x, const Tensor& w, const std::optional<Tensor>& b,
                 const Ints& stride, const Ints& padding, const Ints& dilation, Tensor* mean = nullptr,
                 Tensor* var = nullptr);

// dx, dw, db; those that `need` leaves out are empty.
std::tuple<Tensor, Tensor, Tensor> depthwise_backward(const Queue& queue, const Tensor& dy, const Tensor& x,
                                                      const Tensor& w, const Ints& stride,
                                                      const Ints& padding, const Ints& dilation,
                                                      const Ints& need);

// mean and biased variance [channels] from the moments of `splits` blocks.
void merge_moments(const Queue& queue, const Tensor& moments, Tensor* mean, Tensor* var);

// Sizes of the convolution of x with w [R, C, kh, kw]. Guards what the kernels' addresses rest on.
inline Correlation correlation(const Tensor& x, const Tensor& w, const Ints& stride, const Ints& padding,
                               const Ints& dilation) {
  STD_TORCH_CHECK(x.dim() == 4 && w.dim() == 4 && w.size(1) == x.size(1),
                  "segkernels: x [B, C, H, W] and w [R, C, kh, kw] do not fit");
  const int64_t R = w.size(0), limit = int64_t(1) << 30;
  STD_TORCH_CHECK(w.scalar_type() == x.scalar_type() && w.is_contiguous(),
                  "segkernels: w must be contiguous and of x's type");
  STD_TORCH_CHECK(R >= 1 && R <= MAX_RATES, "segkernels: 1 to ", MAX_RATES, " rates in one call, got ", R);
  STD_TORCH_CHECK(stride.size() == 2 && int64_t(padding.size()) == 2 * R && int64_t(dilation.size()) == 2 * R,
                  "segkernels: stride [2], padding and dilation [2R]");
  STD_TORCH_CHECK(x.size(2) * x.size(3) < limit, "segkernels: H·W must be below 2^30");
  Correlation k = {};
  k.channels = int(w.size(1)), k.rows = int(x.size(2)), k.columns = int(x.size(3));
  k.kh = int(w.size(2)), k.kw = int(w.size(3)), k.stride_h = int(stride[0]), k.stride_w = int(stride[1]);
  for (int64_t i = 0; i < R; ++i) {
    const int64_t ph = padding[2 * i], pw = padding[2 * i + 1], rh = dilation[2 * i],
                  rw = dilation[2 * i + 1];
    STD_TORCH_CHECK(ph >= 0 && pw >= 0 && rh > 0 && rw > 0 && ph < limit && pw < limit && rh * k.kh < limit &&
                        rw * k.kw < limit,
                    "segkernels: padding or dilation out of range");
    k.pad_h[i] = int(ph), k.pad_w[i] = int(pw), k.rate_h[i] = int(rh), k.rate_w[i] = int(rw);
  }
  k.out_rows =
      int((k.rows + 2 * int64_t(k.pad_h[0]) - int64_t(k.rate_h[0]) * (k.kh - 1) - 1) / k.stride_h + 1);
  k.out_columns =
      int((k.columns + 2 * int64_t(k.pad_w[0]) - int64_t(k.rate_w[0]) * (k.kw - 1) - 1) / k.stride_w + 1);
  STD_TORCH_CHECK(k.out_rows > 0 && k.out_columns > 0 && int64_t(k.out_rows) * k.out_columns < limit,
                  "segkernels: bad output size");
  return k;
}

// The correlation of dy (with the kernel turned round) that is the gradient of x; stride 1.
inline Correlation reversed(Correlation k, int rates) {
  std::swap(k.rows, k.out_rows);
  std::swap(k.columns, k.out_columns);
  for (int i = 0; i < rates; ++i) {
    k.pad_h[i] = k.rate_h[i] * (k.kh - 1) - k.pad_h[i];
    k.pad_w[i] = k.rate_w[i] * (k.kw - 1) - k.pad_w[i];
  }
  return k;
}

inline bool walks(const Correlation& k) {
  return k.kh == k.kw && (k.kh == 3 || k.kh == 5) && k.stride_h == 1 && k.stride_w == 1;
}
// Every output pixel lies under the centre of its window.
inline bool centred(const Correlation& k, int rates) {
  for (int i = 0; i < rates; ++i)
    if (2 * k.pad_h[i] != k.rate_h[i] * (k.kh - 1) || 2 * k.pad_w[i] != k.rate_w[i] * (k.kw - 1))
      return false;
  return true;
}

// Channels per thread: 16 bytes, or fewer where K² weights (and as many sums) would not fit the registers.
template <class T>
constexpr int whole = int(16 / sizeof(T));
template <class T, int K>
constexpr int walk_width = sizeof(T) == 8 ? 1
                           : K == 3       ? whole<T>
                                          : 4;
template <class T, int K>
constexpr int walk_backward_width = sizeof(T) == 8 ? 1
                                    : K == 3       ? 4
                                                   : 2;

// How long a walk is, and how blocks lie over the walks. Long walks load fewer rows twice; short ones fill
// the device. What a thread does once (loading its weights, the block's reductions) is spread over several
// turns where there are blocks enough.
struct WalkTiling {
  Tiling tiling;
  int length;
};
inline WalkTiling tile_walks(const Correlation& k, int64_t B, int rates, int width, int bytes,
                             bool channels_last) {
  constexpr int64_t enough_blocks = 132 * 8;
  const auto tiled = [&](int length, int turns) {
    int64_t items = 0;
    for (int i = 0; i < rates; ++i) {
      const int64_t classes = std::min(k.rate_h[i], k.out_rows);
      items = std::max(items, classes * ceil_div(ceil_div(k.out_rows, k.rate_h[i]), length) * k.out_columns);
    }
    return tile(items, k.channels, rates, width, bytes, channels_last, turns);
  };
  int rate = k.rate_h[0], turns = 1;
  for (int i = 1; i < rates; ++i) rate = std::min(rate, k.rate_h[i]);
  int length = std::min(64, int(ceil_div(k.out_rows, rate)));
  while (length > 8 && tiled(length, 1).blocks(B) < enough_blocks) length = (length + 1) / 2;
  while (turns * length < 32 && tiled(length, 2 * turns).blocks(B) >= enough_blocks) turns *= 2;
  return {tiled(length, turns), length};
}

// The same for one pixel per thread and turn.
inline Tiling tile_pixels(int64_t pixels, int64_t channels, int64_t B, int rates, int width, int bytes,
                          bool channels_last, bool sums) {
  int turns = 1;
  while (sums && turns < 64 &&
         tile(pixels, channels, rates, width, bytes, channels_last, 2 * turns).blocks(B) >= 132 * 8)
    turns *= 2;
  return tile(pixels, channels, rates, width, bytes, channels_last, turns);
}

}  // namespace segkernels::cuda
