// Maps as pixels with channels: the CPU operators over pixels and nodes cut them into blocks that stay in the
// L2 cache.
#pragma once

#include "common/tensor.h"

namespace segkernels {

constexpr int64_t kPixels = 64;  // of a block

// A row of numbers with `channels` vectors' worth of zeros behind it, an odd number of cache lines long, so that
// rows do not fall into the same sets of the L1 cache.
inline int64_t padded(int64_t channels) { return round_up(channels, 16) + 16 * (round_up(channels, 16) / 16 % 2 == 0); }

// Where the pixels of a map lie; one of the last two strides is 1.
struct Pixels {
  int64_t B, C, N, sample, channel, pixel;
  int64_t blocks() const { return ceil_div(N, kPixels); }  // of an image
};

inline Pixels pixels_of(const Tensor& t) {
  const Map m = map_of(t);
  return {m.B, m.C, m.H * m.W, m.sB, m.C > 1 ? m.sC : 1, m.W > 1 ? m.sW : m.H > 1 ? m.sH : 1};
}

// `t` itself where its pixels lie at one distance and channels or pixels are dense, else a copy.
inline Tensor as_pixels(const Tensor& t) {
  const Map m = map_of(t);
  const Pixels p = pixels_of(t);
  const bool regular = m.H == 1 || m.W == 1 || m.sH == m.W * m.sW;
  if (t.numel() == 0 || (regular && (p.channel == 1 || p.pixel == 1))) return t;
  return torch::stable::contiguous(t, format_of(is_channels_last(m)));
}

}  // namespace segkernels
