// separable_conv2d on CUDA: allocate, launch, register.
#include "separable_conv2d/launch.h"

#include <string>
#include <tuple>

namespace segkernels::cuda {
namespace {

using MaybeTensor = std::optional<Tensor>;

// One of the two affine maps with its activation.
struct AffineTensors {
  MaybeTensor gamma, beta, mean, var;
  double eps = 0;
  Activation act = Activation::none;

  template <class A>
  Affine<A> on_device() const {
    return {data<A>(gamma), data<A>(beta), data<A>(mean), data<A>(var), A(eps), act};
  }
  bool is_identity() const { return !gamma && !beta && !mean && act == Activation::none; }
};

AffineTensors affine_of(const Tensor& x, int64_t channels, const MaybeTensor& gamma, const MaybeTensor& beta,
                        const std::string& act, std::optional<double> eps) {
  for (const MaybeTensor& t : {gamma, beta})
    STD_TORCH_CHECK(
        !t || (t->numel() == channels && t->is_contiguous() && t->scalar_type() == acc_type(x.scalar_type())),
        "segkernels: gamma and beta must be [channels], contiguous, of the accumulation type");
  return {gamma, beta, std::nullopt, std::nullopt, eps.value_or(0), activation(act)};
}

Tensor empty_sums(const Tensor& x, std::vector<int64_t> sizes) {
  return empty(x, sizes, acc_type(x.scalar_type()));
}

// What the product reads at its left: x through the depthwise kernel, or a map [B, R·K, H', W'] as it is (w
// absent).
struct Left {
  Tensor x;
  MaybeTensor w;
  Correlation geometry;
  AffineTensors affine;
};

// y = φ₂(γ₂·N₂(h·vᵀ) + β₂) into the map y [B, R·N, H', W']; v [R, N, K], or [R, K, N] read as its transpose.
// Returns the moments [pixel tiles, 3, R·N] of what was stored if they are asked for.
template <class T>
Tensor product(const Queue& queue, const Left& left, const Tensor& v, bool transposed,
               const AffineTensors& affine, const Tensor& y, bool moments) {
  using A = acc_t<T>;
  const int64_t rates = v.size(0), N = v.size(transposed ? 2 : 1), K = v.size(transposed ? 1 : 2);
  const Correlation& g = left.geometry;
  ProductShape shape = {
      y.size(0) * g.out_rows * g.out_columns, int(K), int(N), int(rates), 0, is_channels_last(map_of(y))};
  const bool vectors = vectorises(whole<T>, K, {&left.x}) &&
                       (transposed || reinterpret_cast<uintptr_t>(v.const_data_ptr()) % 16 == 0);
  Tensor sums = empty_sums(y, {0, 3, rates * N});
  by_tile<T>(vectors, N, [&](auto width, auto columns) {
    constexpr int V = width, PC = columns;
    using Stage = ProductStage<T, PIXEL_WARPS, PC>;
    shape.outer_tiles = int(ceil_div(N, Stage::COLUMNS));
    const int64_t tiles = ceil_div(shape.pixels, Stage::ROWS);
    if (moments) sums = empty_sums(y, {tiles, 3, rates * N});
    const Strides xs = strides_of(left.x);
    const Inner<T> inner = {const_data<T>(left.x), xs, left.w ? 0 : K * xs.c,
                            data<T>(left.w),       g,  left.affine.on_device<A>()};
    const Weights<T> weights = {const_data<T>(v), N * K, transposed ? 1 : K, transposed ? N : 1};
    const Outer<T> outer = {mutable_data<T>(y), strides_of(y), affine.on_device<A>(),
                            moments ? mutable_data<A>(sums) : nullptr, vectorises(2, N, {&y})};
    queue.launch(&separable_conv2d_kernel<T, V, PIXEL_WARPS, PC>, tiles * rates * shape.outer_tiles,
                 Stage::THREADS, Stage::bytes(g.kh * g.kw), inner, weights, outer, shape);
  });
  return sums;
}

// The three elementwise kernels over a map, by vectors of channels where every map allows it.
template <class T, class F>
void over_map(const Tensor& like, std::vector<const Tensor*> maps, bool sums, F&& f) {
  bool vectors = whole<T> > 1;
  for (const Tensor* map : maps) vectors = vectors && vectorises(whole<T>, like.size(1), {map});
  const auto run = [&](auto width) {
    constexpr int V = width;
    f(width, tile_pixels(like.size(2) * like.size(3), like.size(1), like.size(0), 1, V, sizeof(T),
                         is_channels_last(map_of(like)), sums));
  };
  vectors ? run(std::integral_constant<int, whole<T>>()) : run(std::integral_constant<int, 1>());
}

template <class T>
Tensor apply(const Queue& queue, const Tensor& a, const AffineTensors& affine) {
  const Tensor h = empty_map(a, {a.size(0), a.size(1), a.size(2), a.size(3)}, is_channels_last(map_of(a)));
  over_map<T>(h, {&a, &h}, true, [&](auto width, const Tiling& tiling) {
    queue.launch(&affine_kernel<T, width>, tiling.blocks(a.size(0)), BLOCK, 0, const_data<T>(a),
                 strides_of(a), mutable_data<T>(h), strides_of(h), affine.on_device<acc_t<T>>(),
                 int(a.size(1)), int(a.size(2)), int(a.size(3)), tiling);
  });
  return h;
}

std::vector<const Tensor*> present(std::initializer_list<const MaybeTensor*> maps) {
  std::vector<const Tensor*> out;
  for (const MaybeTensor* map : maps)
    if (*map) out.push_back(&**map);
  return out;
}
Strides strides_or_none(const MaybeTensor& map) { return map ? strides_of(*map) : Strides{}; }

// Σ g and Σ g·N, [channels].
struct AffineSums {
  Tensor g, gn;
};

// a: the input of the affine map, h: its output; see Slope.
template <class T>
AffineSums affine_sums(const Queue& queue, const Tensor& dh, const MaybeTensor& a, const MaybeTensor& h,
                       const AffineTensors& affine) {
  using A = acc_t<T>;
  const int64_t B = dh.size(0), channels = dh.size(1);
  const AffineSums sums = {empty_sums(dh, {channels}), empty_sums(dh, {channels})};
  const MaybeTensor up = dh;
  over_map<T>(dh, present({&up, &a, &h}), true, [&](auto width, const Tiling& tiling) {
    constexpr int V = width;
    const Tensor partial = empty_sums(dh, {tiling.splits(B), 2, channels});
    queue.launch(&affine_sums_kernel<T, V>, tiling.blocks(B), BLOCK, column_sums(tiling, 2 * V, sizeof(A)),
                 const_data<T>(dh), strides_of(dh), data<T>(a), strides_or_none(a), data<T>(h),
                 strides_or_none(h), affine.on_device<A>(), mutable_data<A>(partial), int(channels),
                 int(dh.size(2)), int(dh.size(3)), tiling);
    queue.launch(&affine_sums_finish_kernel<A>, ceil_div(2 * channels, WARP), BLOCK, 0,
                 const_data<A>(partial), tiling.splits(B), int(channels), mutable_data<A>(sums.g),
                 mutable_data<A>(sums.gn));
  });
  return sums;
}

// da into `da`, which may be dh itself. sums: of affine_sums, used with standardisation.
template <class T>
void affine_backward(const Queue& queue, const Tensor& dh, const MaybeTensor& a, const MaybeTensor& h,
                     const AffineTensors& affine, const std::optional<AffineSums>& sums, const Tensor& da) {
  using A = acc_t<T>;
  const MaybeTensor up = dh, down = da;
  const A count = A(da.size(0) * da.size(2) * da.size(3));
  over_map<T>(da, present({&up, &a, &h, &down}), true, [&](auto width, const Tiling& tiling) {
    queue.launch(&affine_backward_kernel<T, width>, tiling.blocks(da.size(0)), BLOCK, 0, const_data<T>(dh),
                 strides_of(dh), data<T>(a), strides_or_none(a), data<T>(h), strides_or_none(h),
                 affine.on_device<A>(), sums ? const_data<A>(sums->g) : nullptr,
                 sums ? const_data<A>(sums->gn) : nullptr, count, mutable_data<T>(da), strides_of(da),
                 int(da.size(1)), int(da.size(2)), int(da.size(3)), tiling);
  });
}

// dv = γ₂·gᵀh and dγ₂ = Σ v·gᵀh; either may be absent.
template <class T>
void pointwise_weights(const Queue& queue, const Tensor& g, const Tensor& d, const AffineTensors& inner,
                       const Tensor& v, const MaybeTensor& gamma, const MaybeTensor& dv,
                       const MaybeTensor& dgamma) {
  using A = acc_t<T>;
  using Stage = GramStage<T, 2, 2>;
  const int64_t rates = v.size(0), N = v.size(1), K = v.size(2);
  const int64_t pixels = d.size(0) * d.size(2) * d.size(3);
  ProductShape shape = {
      pixels, int(K), int(N), int(rates), int(ceil_div(N, Stage::ROWS)), is_channels_last(map_of(d))};
  const int64_t tiles = shape.outer_tiles * ceil_div(K, Stage::COLUMNS) * rates;
  const int64_t split = dv_split(pixels, tiles), splits = ceil_div(pixels, split);
  const Tensor partial = empty_sums(d, {splits, rates, N, K});
  const auto run = [&](auto width) {
    queue.launch(&separable_conv2d_dv_kernel<T, width, 2, 2>, splits * tiles, Stage::THREADS, sizeof(Stage),
                 const_data<T>(g), strides_of(g), const_data<T>(d), strides_of(d), inner.on_device<A>(),
                 mutable_data<A>(partial), pixels, int(d.size(2)), int(d.size(3)), split, shape);
  };
  constexpr int WIDTH = sizeof(T) == 8 ? 1 : whole<T>;
  if (vectorises(WIDTH, N, {&g}) && vectorises(WIDTH, K, {&d}))
    run(std::integral_constant<int, WIDTH>());
  else
    run(std::integral_constant<int, 1>());
  queue.launch(&separable_conv2d_dv_finish_kernel<T>, rates * N, BLOCK, BLOCK / WARP * sizeof(A),
               const_data<A>(partial), splits, int(K), const_data<T>(v), data<A>(gamma),
               dv ? mutable_data<T>(*dv) : nullptr, dgamma ? mutable_data<A>(*dgamma) : nullptr);
}

using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Seven = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

void check_pointwise(const Tensor& x, const Tensor& w, const Tensor& v) {
  STD_TORCH_CHECK(v.dim() == 3 && v.size(0) == w.size(0) && v.size(2) == x.size(1) && v.is_contiguous() &&
                      v.scalar_type() == x.scalar_type(),
                  "segkernels: v must be [R, D, C], contiguous, of x's type");
}

Six separable_conv2d(Tensor x, Tensor w, Tensor v, MaybeTensor gamma1, MaybeTensor beta1, MaybeTensor gamma2,
                     MaybeTensor beta2, std::string act1, std::string act2, std::optional<double> eps1,
                     std::optional<double> eps2, Ints stride, Ints padding, Ints dilation) {
  const Queue queue(x);
  Left left = {x, w, correlation(x, w, stride, padding, dilation), {}};
  check_pointwise(x, w, v);
  const int64_t outer_channels = v.size(0) * v.size(1);
  left.affine = affine_of(x, w.size(0) * w.size(1), gamma1, beta1, act1, eps1);
  AffineTensors outer = affine_of(x, outer_channels, gamma2, beta2, act2, eps2);
  const bool channels_last = is_channels_last(map_of(x));
  Tensor o = empty(x, {0}), mean1 = empty_sums(x, {0}), var1 = empty_sums(x, {0}), mean2 = empty_sums(x, {0}),
         var2 = empty_sums(x, {0});
  if (eps1) {  // the moments of d must be known before h can be made
    left.x = depthwise(queue, x, w, std::nullopt, stride, padding, dilation, &mean1, &var1);
    left.w = std::nullopt, left.geometry = pointwise(left.x);
    left.affine.mean = mean1, left.affine.var = var1;
  }
  Tensor y = empty_map(x, {x.size(0), outer_channels, left.geometry.out_rows, left.geometry.out_columns},
                       channels_last);
  by_storage(x, [&](auto storage) {
    using T = decltype(storage);
    const Tensor moments =
        product<T>(queue, left, v, false, eps2 ? AffineTensors() : outer, y, eps2.has_value());
    if (!eps2) return;
    o = y;
    merge_moments(queue, moments, &mean2, &var2);
    outer.mean = mean2, outer.var = var2;
    y = apply<T>(queue, o, outer);
  });
  return {y, o, mean1, var1, mean2, var2};
}

// What the backward pass returns, allocated where it is wanted, empty elsewhere.
struct Gradients {
  Tensor dx, dw, dv, dgamma1, dbeta1, dgamma2, dbeta2;
};

template <class T>
void backward(const Queue& queue, const Tensor& dy, const Tensor& x, const MaybeTensor& y,
              const MaybeTensor& o, const Tensor& w, const Tensor& v, const AffineTensors& inner,
              const AffineTensors& outer, const Ints& stride, const Ints& padding, const Ints& dilation,
              const Ints& need, Gradients& out) {
  const bool standardised = outer.mean.has_value();
  const bool need_dd = need[0] || need[1] || need[3] || need[4];

  // g: the gradient of o with standardisation, else of γ₂·o + β₂ (γ₂ then joins the products).
  Tensor g = dy;
  std::optional<AffineSums> sums;
  if (standardised || need[6]) sums = affine_sums<T>(queue, dy, o, y, outer);
  if (need[5] && standardised) out.dgamma2 = sums->gn;
  if (need[6]) out.dbeta2 = sums->g;
  if (standardised || outer.act != Activation::none) {
    g = empty_map(x, {dy.size(0), dy.size(1), dy.size(2), dy.size(3)}, is_channels_last(map_of(x)));
    AffineTensors slope = outer;
    if (!standardised) slope.gamma = slope.beta = std::nullopt;
    affine_backward<T>(queue, dy, o, y, slope, sums, g);
  }
  const bool need_dgamma2 = need[5] && !standardised;
  if (!need_dd && !need[2] && !need_dgamma2) return;

  const Tensor d = depthwise(queue, x, w, std::nullopt, stride, padding, dilation);
  const MaybeTensor gamma2 = standardised ? std::nullopt : outer.gamma;
  if (need_dgamma2) out.dgamma2 = empty_sums(x, {v.size(0) * v.size(1)});
  if (need[2] || need_dgamma2)
    pointwise_weights<T>(queue, g, d, inner, v, gamma2, need[2] ? MaybeTensor(out.dv) : std::nullopt,
                         need_dgamma2 ? MaybeTensor(out.dgamma2) : std::nullopt);
  if (!need_dd) return;

  // dh = (γ₂·g)·v, then dd in its place.
  const Tensor dh = empty_map(d, {d.size(0), d.size(1), d.size(2), d.size(3)}, is_channels_last(map_of(x)));
  AffineTensors scale;
  scale.gamma = gamma2;
  product<T>(queue, {g, std::nullopt, pointwise(g), scale}, v, true, {}, dh, false);
  std::optional<AffineSums> inner_sums;
  if (inner.mean || need[3] || need[4]) inner_sums = affine_sums<T>(queue, dh, d, std::nullopt, inner);
  if (need[3]) out.dgamma1 = inner_sums->gn;
  if (need[4]) out.dbeta1 = inner_sums->g;
  if (!need[0] && !need[1]) return;
  if (!inner.is_identity()) affine_backward<T>(queue, dh, d, std::nullopt, inner, inner_sums, dh);
  std::tie(out.dx, out.dw, std::ignore) =
      depthwise_backward(queue, dh, x, w, stride, padding, dilation, {need[0], need[1], 0});
}

Seven separable_conv2d_backward(Tensor dy, Tensor x, MaybeTensor y, MaybeTensor o, Tensor w, Tensor v,
                                MaybeTensor gamma1, MaybeTensor beta1, MaybeTensor gamma2, MaybeTensor beta2,
                                Tensor mean1, Tensor var1, Tensor mean2, Tensor var2, std::string act1,
                                std::string act2, std::optional<double> eps1, std::optional<double> eps2,
                                Ints stride, Ints padding, Ints dilation, Ints need) {
  const Queue queue(x);
  const Correlation k = correlation(x, w, stride, padding, dilation);
  check_pointwise(x, w, v);
  AffineTensors inner = affine_of(x, w.size(0) * w.size(1), gamma1, beta1, act1, eps1);
  AffineTensors outer = affine_of(x, v.size(0) * v.size(1), gamma2, beta2, act2, eps2);
  STD_TORCH_CHECK(need.size() == 7 && dy.dim() == 4 && dy.scalar_type() == x.scalar_type() &&
                      dy.size(0) == x.size(0) && dy.size(1) == v.size(0) * v.size(1) &&
                      dy.size(2) == k.out_rows && dy.size(3) == k.out_columns,
                  "segkernels: dy does not fit x, w and v");
  STD_TORCH_CHECK(!eps2 || o, "segkernels: the gradient of batch standardisation needs o");
  STD_TORCH_CHECK(eps2 || outer.act == Activation::none || y, "segkernels: the gradient of act2 needs y");
  for (const MaybeTensor& map : {y, o})
    STD_TORCH_CHECK(
        !map || (map->dim() == 4 && map->numel() == dy.numel() && map->scalar_type() == x.scalar_type()),
        "segkernels: y and o must be of dy's shape and type");
  if (eps1) inner.mean = mean1, inner.var = var1;
  if (eps2) outer.mean = mean2, outer.var = var2;

  Gradients out = {empty(x, {0}),      empty(x, {0}),      empty(x, {0}),     empty_sums(x, {0}),
                   empty_sums(x, {0}), empty_sums(x, {0}), empty_sums(x, {0})};
  if (need[2]) out.dv = empty(v, {v.size(0), v.size(1), v.size(2)});
  by_storage(x, [&](auto storage) {
    backward<decltype(storage)>(queue, dy, x, eps2 ? std::nullopt : y, eps2 ? o : std::nullopt, w, v, inner,
                                outer, stride, padding, dilation, need, out);
  });
  return {out.dx, out.dw, out.dv, out.dgamma1, out.dbeta1, out.dgamma2, out.dbeta2};
}

STABLE_TORCH_LIBRARY_IMPL(segkernels, CUDA, m) {
  m.impl("separable_conv2d", TORCH_BOX(&separable_conv2d));
  m.impl("separable_conv2d_backward", TORCH_BOX(&separable_conv2d_backward));
}

}  // namespace
}  // namespace segkernels::cuda
