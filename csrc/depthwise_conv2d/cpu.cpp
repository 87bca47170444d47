// y[b, ρC + c] = bias[ρ, c] + Σ_ab w[ρ, c, a, b] · x[b, c] at (h·s − p + a·r, w·s − p + b·r), and its
// gradients, on the CPU.

#include "common/tensor.h"
#include "depthwise_conv2d/cpu.h"
#include "depthwise_conv2d/plan.h"

#define SEGKERNELS_KERNELS "depthwise_conv2d/cpu_kernels.h"
#include "common/foreach_isa.h"

namespace segkernels {
namespace {

Tensor depthwise_conv2d(Tensor x, Tensor w, std::optional<Tensor> b, std::vector<int64_t> stride,
                        std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  const bool channels_last = is_channels_last(map_of(x));
  x = with_dense_rows(x, channels_last);
  w = dense(w);
  const ForwardPlan f(geometry_of(map_of(x), w, stride, padding, dilation), map_of(x), x.element_size());
  const Geometry& g = f.geometry;
  STD_TORCH_CHECK(w.scalar_type() == x.scalar_type(), "depthwise_conv2d: x and w must have one type");
  if (b) {
    b = dense(*b);
    STD_TORCH_CHECK(b->numel() == g.R * g.C && b->scalar_type() == x.scalar_type(),
                    "depthwise_conv2d: the bias must be [R, C] of x's type");
  }
  const Tensor y = empty_map(x, {g.B, g.R * g.C, g.H_out(), g.W_out()}, channels_last);
  if (y.numel() == 0) return y;

  by_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T *x_data = const_data<T>(x), *w_data = const_data<T>(w), *bias = b ? const_data<T>(*b) : nullptr;
    T* y_data = mutable_data<T>(y);
    if (channels_last) {
      const std::vector<T> packed = pack_depthwise_weights(w_data, g.R, g.C, g.taps());
      const int64_t items = g.B * g.slabs(f.slab) * g.H_out();
      parallel_for(items, g.W_out() * std::min(f.slab, g.C) * g.R * g.taps(),
                   [&](int64_t first, int64_t last) {
                     SEGKERNELS_BY_ISA(
                         simd::forward_channels_last(f, x_data, packed.data(), bias, y_data, first, last))
                   });
    } else {
      parallel_for(g.B * g.C, g.H_out() * g.W_out() * g.R * g.taps(), [&](int64_t first, int64_t last) {
        SEGKERNELS_BY_ISA(simd::forward_planes(f, x_data, w_data, bias, y_data, first, last))
      });
    }
  });
  return y;
}

// channels_last: dX, and dW and db as [parts] sums of pixels, added in the order of the parts.
template <class T>
void backward_channels_last(const BackwardPlan& f, const T* x, const T* dy, const T* w, T* dx, T* dw, T* db) {
  using A = acc_t<T>;
  const Geometry& g = f.geometry;
  const int64_t n_slabs = g.slabs(f.slab), n_rows = g.R * (g.taps() + 1);
  const std::vector<T> packed = pack_depthwise_weights(w, g.R, g.C, g.taps());
  std::vector<A> sums(dw || db ? f.parts * n_rows * f.padded_C : 0);
  const auto bound = [&](int64_t n, int64_t part) { return g.B * n * part / f.parts; };

  parallel_for(n_slabs * f.parts, g.B * g.H() * g.W() * g.C * g.R * g.taps() / (n_slabs * f.parts),
               [&](int64_t first, int64_t last) {
                 for (int64_t item = first; item < last; ++item) {
                   const int64_t part = item % f.parts, c0 = item / f.parts * f.slab,
                                 c1 = g.slab_end(c0, f.slab);
                   const int64_t h0 = bound(g.H(), part), h1 = bound(g.H(), part + 1);
                   A* sum = sums.data() + (dw || db ? part * n_rows * f.padded_C : 0);
                   SEGKERNELS_BY_ISA(if (dx || dw) simd::backward_rows(f, x, dy, packed.data(), dx,
                                                                       dw ? sum : nullptr, h0, h1, c0, c1);
                                     if (db) simd::bias_rows<T>(f, dy, sum + g.R * g.taps() * f.padded_C,
                                                                bound(g.H_out(), part),
                                                                bound(g.H_out(), part + 1), c0, c1))
                 }
               });
  if (dw || db)
    parallel_for(n_rows, f.parts * g.C, [&](int64_t first, int64_t last) {
      SEGKERNELS_BY_ISA(simd::add_parts<T>(f, sums.data(), dw, db, first, last))
    });
}

// NCHW: dX, and dW and db as one sum per image, added in the order of the images.
template <class T>
void backward_nchw(const BackwardPlan& f, const T* x, const T* dy, const T* w, T* dx, T* dw, T* db) {
  using A = acc_t<T>;
  const Geometry& g = f.geometry;
  const int64_t n_dw = g.R * g.C * g.taps(), n_db = g.R * g.C;
  std::vector<A> dw_sums(dw ? g.B * n_dw : 0), db_sums(db ? g.B * n_db : 0);
  A *dws = dw ? dw_sums.data() : nullptr, *dbs = db ? db_sums.data() : nullptr;
  parallel_for(g.B * g.C, g.H() * g.W() * g.R * g.taps(), [&](int64_t first, int64_t last) {
    SEGKERNELS_BY_ISA(simd::backward_planes(f, x, dy, w, dx, dws, dbs, first, last))
  });
  SEGKERNELS_BY_ISA(if (dw) simd::add_images(dws, g.B, n_dw, dw);
                    if (db) simd::add_images(dbs, g.B, n_db, db))
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_backward(Tensor dy, Tensor x, Tensor w,
                                                             std::vector<int64_t> stride,
                                                             std::vector<int64_t> padding,
                                                             std::vector<int64_t> dilation,
                                                             std::vector<int64_t> need) {
  const bool channels_last = is_channels_last(map_of(x));
  x = with_dense_rows(x, channels_last);
  dy = with_dense_rows(dy, channels_last);
  w = dense(w);
  const BackwardPlan f(geometry_of(map_of(x), w, stride, padding, dilation), map_of(x), map_of(dy),
                       x.element_size());
  const Geometry& g = f.geometry;
  STD_TORCH_CHECK(w.scalar_type() == x.scalar_type() && dy.scalar_type() == x.scalar_type(),
                  "depthwise_conv2d_backward: dy, x and w must have one type");
  STD_TORCH_CHECK(f.dy.B == g.B && f.dy.C == g.R * g.C && f.dy.H == g.H_out() && f.dy.W == g.W_out(),
                  "depthwise_conv2d_backward: dy must have the output's sizes");
  STD_TORCH_CHECK(need.size() == 3, "depthwise_conv2d_backward: need has 3 numbers");
  const Tensor dx = need[0] ? empty_map(x, {g.B, g.C, g.H(), g.W()}, channels_last) : empty(x, {0});
  const Tensor dw =
      empty(x, need[1] ? std::vector<int64_t>{g.R, g.C, g.kh(), g.kw()} : std::vector<int64_t>{0});
  const Tensor db = empty(x, need[2] ? std::vector<int64_t>{g.R, g.C} : std::vector<int64_t>{0});

  by_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto out = [](const Tensor& t) { return t.numel() ? mutable_data<T>(t) : nullptr; };
    const auto run = channels_last ? backward_channels_last<T> : backward_nchw<T>;
    run(f, const_data<T>(x), const_data<T>(dy), const_data<T>(w), out(dx), out(dw), out(db));
  });
  return {dx, dw, db};
}

STABLE_TORCH_LIBRARY_IMPL(segkernels, CPU, m) {
  m.impl("depthwise_conv2d", TORCH_BOX(&depthwise_conv2d));
  m.impl("depthwise_conv2d_backward", TORCH_BOX(&depthwise_conv2d_backward));
}

}  // namespace segkernels
