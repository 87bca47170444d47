// One call of the fused separable convolution as its CPU kernels see it: sizes, how the work is cut, and
// where things lie.
//
// A tile is a range of at most kPixels output pixels of one image, cut at multiples of kUnit; channels of d
// and h are taken kChannels at a time. A tile of d or h is a small matrix in the L2 cache, [pixels][channels]
// in channels_last and [channels][pixels] in NCHW. How the work is cut depends on the sizes alone, so results
// depend neither on the number of threads nor (forward) on the batch.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "common/engine.h"
#include "depthwise_conv2d/plan.h"

namespace segkernels {
namespace separable {

constexpr int64_t kPixels = 128, kChannels = 256;
constexpr int64_t kUnit = 32;  // pixels that matrix products take at once


struct Tile {
  int64_t image, first, last;
  int64_t size() const { return last - first; }
};

struct Sizes {
  int64_t B, C, D, R, H_out, W_out;
  bool channels_last;

  int64_t pixels() const { return H_out * W_out; }
  int64_t units() const { return ceil_div(pixels(), kUnit); }
  int64_t image_tiles() const {  // even, so that two threads share an image of few tiles evenly
    const int64_t n = ceil_div(units(), kPixels / kUnit);
    return std::min(units(), n + n % 2);
  }
  int64_t tiles() const { return B * image_tiles(); }
  Tile tile(int64_t t) const {  // the larger ones first: the last ones even out what threads have left to do
    const int64_t n = image_tiles(), i = t % n, size = units() / n, larger = units() % n;
    const auto bound = [&](int64_t at) {
      return std::min(pixels(), (at * size + std::min(at, larger)) * kUnit);
    };
    return {t / n, bound(i), bound(i + 1)};
  }
  int64_t chunks() const { return ceil_div(C, kChannels); }
  int64_t chunk_begin(int64_t i) const { return i * kChannels; }
  int64_t chunk_end(int64_t i) const { return std::min(C, (i + 1) * kChannels); }

  // Consecutive tiles whose sums are taken together. The backward keeps a part of dv for each of its groups.
  int64_t forward_groups() const { return std::min<int64_t>(tiles(), 128); }
  int64_t backward_groups() const {
    return std::clamp<int64_t>(std::min(tiles() / 4, 64 / (R * chunks())), std::min<int64_t>(tiles(), 1),
                               tiles());
  }
  // A tile of a dense map with `channels` channels, from `channel` on, in the map's memory.
  int64_t offset(Tile t, int64_t channels, int64_t channel) const {
    return channels_last ? (t.image * pixels() + t.first) * channels + channel
                         : (t.image * channels + channel) * pixels() + t.first;
  }
  int64_t step(int64_t channels) const { return channels_last ? channels : pixels(); }
};

// An activation clips to [low, high]; NaN stands for no bound.
template <class A>
struct Clip {
  A low = std::numeric_limits<A>::quiet_NaN(), high = std::numeric_limits<A>::quiet_NaN();
};

// Numbers per channel of an affine stage u → φ(scale·(u − mean) + shift), and of its backward
// scale·(g − mean_g − n·mean_gn), n = (u − mean)·invstd. Arrays are readable a vector beyond their end.
template <class A>
struct Affine {
  const A *mean, *scale, *shift, *invstd, *mean_g, *mean_gn;
  Clip<A> clip;
  bool standardised;
  Affine from(int64_t c) const {
    return {mean + c, scale + c, shift + c, invstd + c, mean_g + c, mean_gn + c, clip, standardised};
  }
};

// Sums per channel, one row per group: of forward moments (mean, Σ(u − mean)²), of backward (Σg, Σg·n).
template <class A>
struct Sums {
  A *first, *second;
};

enum class Stage {
  pack_forward,
  pack_backward,
  inner_moments,
  forward,
  finish,
  outer_sums,
  backward,
  inner_finish
};

template <class T>
struct Call {
  using A = acc_t<T>;
  Sizes sizes;
  const ForwardPlan* plan;  // of the depthwise stage
  const T *x, *w;           // w packed for the depthwise kernels
  const A* v;               // [R, D, C]; times gamma2 in the backward of a plain affine
  char* weights;            // v packed for the matrix products, a slot of weight_bytes per (rate, chunk)
  int64_t weight_bytes;
  Affine<A> inner, outer;
  T *y, *o, *dd;
  const T* dy;
  Sums<A> sums1, sums2;  // [groups, R·C], [groups, R·D]
  A* dv;                 // [groups, R, D, C]: gᵀh
  bool want_dv, want_inner;
  Engine engine;
};

}  // namespace separable
}  // namespace segkernels
