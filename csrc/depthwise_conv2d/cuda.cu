// depthwise_conv2d on CUDA: allocate, launch, register.
#include "depthwise_conv2d/launch.h"

#include <tuple>

namespace segkernels::cuda {
namespace {

// Calls f(width) with the width of vectors as a constant.
template <int WIDTH, class F>
void by_width(bool vectors, F&& f) {
  if (WIDTH > 1 && vectors) return f(std::integral_constant<int, WIDTH>());
  return f(std::integral_constant<int, 1>());
}
template <class F>
void by_kernel(int k, F&& f) {
  return k == 3 ? f(std::integral_constant<int, 3>()) : f(std::integral_constant<int, 5>());
}

// y = w ⊛ x + b by walks: the forward pass, or, reversed, the gradient of x at one rate.
template <class T, int K, bool MOMENTS>
Tensor walk(const Queue& queue, const Correlation& k, const Tensor& x, const Tensor& w,
            const std::optional<Tensor>& b, const Tensor& y, bool channels_last, bool reversed) {
  using A = acc_t<T>;
  constexpr int WIDTH = walk_width<T, K>;
  const int64_t B = x.size(0);
  const int rates = int(w.size(0));
  Tensor moments;
  by_width<WIDTH>(vectorises(WIDTH, k.channels, {&x, &y}), [&](auto width) {
    constexpr int V = width;
    const auto [tiling, length] = tile_walks(k, B, rates, V, sizeof(T), channels_last);
    if (MOMENTS)
      moments = empty(x, {tiling.splits(B), 3, rates * int64_t(k.channels)}, acc_type(x.scalar_type()));
    queue.launch(&depthwise_conv2d_walk_kernel<T, V, K, MOMENTS>, tiling.blocks(B), BLOCK,
                 MOMENTS ? column_sums(tiling, 3 * V, sizeof(A)) : 0, const_data<T>(x), strides_of(x),
                 const_data<T>(w), data<T>(b), mutable_data<T>(y), strides_of(y), k, tiling, length, reversed,
                 MOMENTS ? mutable_data<A>(moments) : nullptr);
  });
  return moments;
}

template <class T, bool MOMENTS>
Tensor gather(const Queue& queue, const Correlation& k, const Tensor& x, const Tensor& w,
              const std::optional<Tensor>& b, const Tensor& y, bool channels_last) {
  using A = acc_t<T>;
  const int64_t B = x.size(0), pixels = int64_t(k.out_rows) * k.out_columns;
  const int rates = int(w.size(0));
  Tensor moments;
  by_width<whole<T>>(vectorises(whole<T>, k.channels, {&x, &y}), [&](auto width) {
    constexpr int V = width;
    const Tiling tiling = tile_pixels(pixels, k.channels, B, rates, V, sizeof(T), channels_last, MOMENTS);
    if (MOMENTS)
      moments = empty(x, {tiling.splits(B), 3, rates * int64_t(k.channels)}, acc_type(x.scalar_type()));
    queue.launch(&depthwise_conv2d_gather_kernel<T, V, MOMENTS>, tiling.blocks(B), BLOCK,
                 MOMENTS ? column_sums(tiling, 3 * V, sizeof(A)) : 0, const_data<T>(x), strides_of(x),
                 const_data<T>(w), data<T>(b), mutable_data<T>(y), strides_of(y), k, tiling,
                 MOMENTS ? mutable_data<A>(moments) : nullptr);
  });
  return moments;
}

template <class T, bool MOMENTS>
Tensor forward(const Queue& queue, const Correlation& k, const Tensor& x, const Tensor& w,
               const std::optional<Tensor>& b, const Tensor& y, bool channels_last) {
  if (!walks(k)) return gather<T, MOMENTS>(queue, k, x, w, b, y, channels_last);
  Tensor moments;
  by_kernel(k.kh,
            [&](auto size) { moments = walk<T, size, MOMENTS>(queue, k, x, w, b, y, channels_last, false); });
  return moments;
}

// dx, summed over the rates.
template <class T>
void gather_dx(const Queue& queue, const Correlation& k, const Tensor& dy, const Tensor& w, const Tensor& dx,
               bool channels_last) {
  const int64_t B = dx.size(0), pixels = int64_t(k.rows) * k.columns;
  by_width<whole<T>>(vectorises(whole<T>, k.channels, {&dy, &dx}), [&](auto width) {
    constexpr int V = width;
    const Tiling tiling = tile_pixels(pixels, k.channels, B, 1, V, sizeof(T), channels_last, false);
    queue.launch(&depthwise_conv2d_gather_dx_kernel<T, V>, tiling.blocks(B), BLOCK, 0, const_data<T>(dy),
                 strides_of(dy), const_data<T>(w), mutable_data<T>(dx), strides_of(dx), k, int(w.size(0)),
                 tiling);
  });
}

// Partial sums [splits, R, taps + 1, C] of dw and db, and dx where DX.
template <class T, int K, bool DX>
Tensor walk_backward(const Queue& queue, const Correlation& k, const Tensor& dy, const Tensor& x,
                     const Tensor& w, const Tensor& dx, bool channels_last) {
  using A = acc_t<T>;
  constexpr int WIDTH = walk_backward_width<T, K>;
  const int64_t B = x.size(0);
  const int rates = int(w.size(0));
  const Correlation back = reversed(k, rates);
  Tensor partial;
  const bool vectors =
      vectorises(WIDTH, k.channels, {&dy, &x}) && (!DX || vectorises(WIDTH, k.channels, {&dx}));
  by_width<WIDTH>(vectors, [&](auto width) {
    constexpr int V = width;
    const auto [tiling, length] = tile_walks(back, B, rates, V, sizeof(T), channels_last);
    partial = empty(x, {tiling.splits(B), rates, K * K + 1, k.channels}, acc_type(x.scalar_type()));
    queue.launch(&depthwise_conv2d_walk_backward_kernel<T, V, K, DX>, tiling.blocks(B), BLOCK,
                 column_sums(tiling, (K * K + 1) * V, sizeof(A)), const_data<T>(dy), strides_of(dy),
                 const_data<T>(x), strides_of(x), const_data<T>(w), DX ? mutable_data<T>(dx) : nullptr,
                 DX ? strides_of(dx) : Strides(), mutable_data<A>(partial), back, tiling, length);
  });
  return partial;
}

template <class T>
Tensor gather_dw(const Queue& queue, const Correlation& k, const Tensor& dy, const Tensor& x, int rates,
                 bool channels_last) {
  using A = acc_t<T>;
  const int64_t B = x.size(0), pixels = int64_t(k.out_rows) * k.out_columns;
  const Tiling tiling = tile_pixels(pixels, k.channels, B, rates, 1, sizeof(T), channels_last, true);
  const Tensor partial =
      empty(x, {tiling.splits(B), rates, k.kh * k.kw + 1, k.channels}, acc_type(x.scalar_type()));
  queue.launch(&depthwise_conv2d_gather_dw_kernel<T>, tiling.blocks(B), BLOCK,
               column_sums(tiling, 1, sizeof(A)), const_data<T>(dy), strides_of(dy), const_data<T>(x),
               strides_of(x), mutable_data<A>(partial), k, tiling);
  return partial;
}

template <class T>
void backward(const Queue& queue, const Correlation& k, const Tensor& dy, const Tensor& x, const Tensor& w,
              const Tensor& dx, const Tensor& dw, const Tensor& db, const Ints& need, bool channels_last) {
  const int rates = int(w.size(0)), taps = k.kh * k.kw;
  const bool walking = walks(k), sums = need[1] || need[2],
             sums_by_walk = walking && (!need[2] || centred(k, rates));
  const bool together = need[0] && sums_by_walk && sums && rates == 1;
  if (need[0] && !together) {
    if (walking && rates == 1)
      by_kernel(k.kh, [&](auto size) {
        walk<T, size, false>(queue, reversed(k, 1), dy, w, std::nullopt, dx, channels_last, true);
      });
    else
      gather_dx<T>(queue, k, dy, w, dx, channels_last);
  }
  if (!sums) return;
  Tensor partial;
  if (sums_by_walk)
    by_kernel(k.kh, [&](auto size) {
      partial = together ? walk_backward<T, size, true>(queue, k, dy, x, w, dx, channels_last)
                         : walk_backward<T, size, false>(queue, k, dy, x, w, dx, channels_last);
    });
  else
    partial = gather_dw<T>(queue, k, dy, x, rates, channels_last);
  queue.launch(&depthwise_conv2d_finish_kernel<T>, ceil_div(k.channels, WARP) * rates * (taps + 1), BLOCK, 0,
               const_data<acc_t<T>>(partial), partial.size(0), k.channels, taps,
               need[1] ? mutable_data<T>(dw) : nullptr, need[2] ? mutable_data<T>(db) : nullptr);
}

}  // namespace

Tensor depthwise(const Queue& queue, const Tensor& x, const Tensor& w, const std::optional<Tensor>& b,
                 const Ints& stride, const Ints& padding, const Ints& dilation, Tensor* mean, Tensor* var) {
  const Correlation k = correlation(x, w, stride, padding, dilation);
  const bool channels_last = is_channels_last(map_of(x));
  const Tensor y =
      empty_map(x, {x.size(0), w.size(0) * k.channels, k.out_rows, k.out_columns}, channels_last);
  STD_TORCH_CHECK(!b || (b->numel() == w.size(0) * k.channels && b->is_contiguous() &&
                         b->scalar_type() == x.scalar_type()),
                  "segkernels: bias must be [R, C], contiguous, of x's type");
  by_storage(x, [&](auto storage) {
    using T = decltype(storage);
    if (mean)
      merge_moments(queue, forward<T, true>(queue, k, x, w, b, y, channels_last), mean, var);
    else
      forward<T, false>(queue, k, x, w, b, y, channels_last);
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> depthwise_backward(const Queue& queue, const Tensor& dy, const Tensor& x,
                                                      const Tensor& w, const Ints& stride,
                                                      const Ints& padding, const Ints& dilation,
                                                      const Ints& need) {
  const Correlation k = correlation(x, w, stride, padding, dilation);
  STD_TORCH_CHECK(need.size() == 3 && dy.dim() == 4 && dy.size(0) == x.size(0) &&
                      dy.size(1) == w.size(0) * k.channels && dy.size(2) == k.out_rows &&
                      dy.size(3) == k.out_columns && dy.scalar_type() == x.scalar_type(),
                  "segkernels: dy does not fit x and w");
  const bool channels_last = is_channels_last(map_of(x));
  const Tensor dx =
      need[0] ? empty_map(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, channels_last) : empty(x, {0});
  const Tensor dw = need[1] ? empty(w, {w.size(0), w.size(1), w.size(2), w.size(3)}) : empty(w, {0});
  const Tensor db = need[2] ? empty(w, {w.size(0), w.size(1)}) : empty(w, {0});
  by_storage(x, [&](auto storage) {
    backward<decltype(storage)>(queue, k, dy, x, w, dx, dw, db, need, channels_last);
  });
  return {dx, dw, db};
}

void merge_moments(const Queue& queue, const Tensor& moments, Tensor* mean, Tensor* var) {
  const int64_t splits = moments.size(0), channels = moments.size(2);
  *mean = empty(moments, {channels});
  *var = empty(moments, {channels});
  const auto launch = [&](auto a) {
    using A = decltype(a);
    queue.launch(&merge_moments_kernel<A>, ceil_div(channels, WARP), BLOCK, 0, const_data<A>(moments), splits,
                 int(channels), mutable_data<A>(*mean), mutable_data<A>(*var));
  };
  moments.scalar_type() == ScalarType::Double ? launch(double()) : launch(float());
}

namespace {

Tensor depthwise_conv2d(Tensor x, Tensor w, std::optional<Tensor> b, Ints stride, Ints padding,
                        Ints dilation) {
  return depthwise(Queue(x), x, w, b, stride, padding, dilation);
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_backward(Tensor dy, Tensor x, Tensor w, Ints stride,
                                                             Ints padding, Ints dilation, Ints need) {
  return depthwise_backward(Queue(x), dy, x, w, stride, padding, dilation, need);
}

STABLE_TORCH_LIBRARY_IMPL(segkernels, CUDA, m) {
  m.impl("depthwise_conv2d", TORCH_BOX(&depthwise_conv2d));
  m.impl("depthwise_conv2d_backward", TORCH_BOX(&depthwise_conv2d_backward));
}

}  // namespace
}  // namespace segkernels::cuda
