// How one call of the depthwise convolution on the CPU runs over its map.
#pragma once

#include "common/tensor.h"
#include "depthwise_conv2d/geometry.h"

namespace segkernels {

constexpr int64_t kMaxKernel = 7;

inline Geometry geometry_of(const Map& x, const Tensor& w, const std::vector<int64_t>& stride,
                            const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  STD_TORCH_CHECK(w.dim() == 4 && w.size(1) == x.C,
                  "depthwise_conv2d: w must be [R, C, k_h, k_w] with x's C channels");
  Geometry g{x.B, x.C, w.size(0), {}, {}};
  const int64_t kh = w.size(2), kw = w.size(3), R = g.R;
  STD_TORCH_CHECK(R >= 1 && kh >= 1 && kw >= 1 && kh <= kMaxKernel && kw <= kMaxKernel,
                  "depthwise_conv2d: kernels of 1 to 7 rows and columns are supported, got ", kh, " x ", kw);
  STD_TORCH_CHECK(stride.size() == 2 && int64_t(padding.size()) == 2 * R && int64_t(dilation.size()) == 2 * R,
                  "depthwise_conv2d: stride needs 2 numbers, padding and dilation 2 per rate");
  const auto axis = [](int64_t in, int64_t k, int64_t s, int64_t p, int64_t r) {
    STD_TORCH_CHECK(s >= 1 && r >= 1 && p >= 0, "depthwise_conv2d: stride and dilation must be positive");
    const int64_t room = in + 2 * p - r * (k - 1) - 1;
    return Axis{in, room < 0 ? 0 : room / s + 1, k, s, p, r};
  };
  for (int64_t i = 0; i < R; ++i) {
    g.rows.push_back(axis(x.H, kh, stride[0], padding[2 * i], dilation[2 * i]));
    g.columns.push_back(axis(x.W, kw, stride[1], padding[2 * i + 1], dilation[2 * i + 1]));
    STD_TORCH_CHECK(g.rows[i].out == g.H_out() && g.columns[i].out == g.W_out(),
                    "depthwise_conv2d: all rates must give outputs of one size");
  }
  return g;
}

// Channels that are worked on together in channels_last: so many that the rows between a row's outermost taps
// stay in the second cache.
inline int64_t slab_of(const Geometry& g, int64_t element_size) {
  constexpr int64_t kCache = 1 << 20, kLeast = 64;
  int64_t reach = 0;
  for (const Axis& x : g.rows) reach = std::max(reach, (x.k - 1) * x.r);
  const int64_t rows = std::min(g.H(), reach / g.common_rate() + 1);
  const int64_t channels = kCache / std::max<int64_t>(1, rows * g.W() * element_size);
  return std::max(kLeast, channels / kLeast * kLeast);
}

// Whether the rows at i and i + 1 of an order are a rate apart and have three row taps each, of which they
// share two.
inline bool share_rows(const Geometry& g, const RowTaps& rows, const std::vector<int64_t>& order, int64_t i) {
  const auto taps = [&](int64_t at) { return rows.end(order[at]) - rows.begin(order[at]); };
  return g.R == 1 && g.kh() == 3 && g.rows[0].s == 1 && i + 1 < int64_t(order.size()) &&
         order[i + 1] == order[i] + g.rows[0].r && taps(i) == 3 && taps(i + 1) == 3;
}

struct ForwardPlan {
  Geometry geometry;
  Map x;
  std::vector<RowTaps> rows;           // [rate]
  std::vector<std::vector<Run>> runs;  // channels_last: [rate]
  std::vector<int64_t> order;
  int64_t slab;

  ForwardPlan(Geometry g, const Map& x, int64_t element_size)
      : geometry(std::move(g)), x(x), order(geometry.output_order()), slab(slab_of(geometry, element_size)) {
    for (int64_t rate = 0; rate < geometry.R; ++rate) {
      rows.push_back(geometry.forward_rows(rate));
      runs.push_back(runs_of(geometry.forward_columns(rate), geometry.W_out()));
    }
  }
};

struct BackwardPlan {
  Geometry geometry;
  Map x, dy;
  RowTaps rows;
  std::vector<std::vector<Run>> runs;  // channels_last: [residue of the column modulo the stride]
  std::vector<int64_t> order, order_out;
  int64_t next;  // from a row of the order to the one that follows
  int64_t slab, padded_C, parts;

  BackwardPlan(Geometry g, const Map& x, const Map& dy, int64_t element_size)
      : geometry(std::move(g)),
        x(x),
        dy(dy),
        rows(geometry.backward_rows()),
        order(geometry.input_order()),
        order_out(geometry.output_order()),
        next(geometry.common_rate()),
        slab(slab_of(geometry, element_size)),
        padded_C(ceil_div(geometry.C, 32) * 32) {
    const int64_t s = geometry.columns[0].s;
    for (int64_t c = 0; c < s; ++c)
      runs.push_back(runs_of(geometry.backward_columns(c), ceil_div(geometry.W() - c, s)));
    // dW is summed in parts of at least 256 pixels, whose number depends on the sizes alone.
    const int64_t rows = geometry.B * geometry.H();
    parts = std::max<int64_t>(1, std::min<int64_t>({64, rows, rows * geometry.W() / 256}));
  }
};

}  // namespace segkernels
