// y = φ₂(γ₂·N₂(v·φ₁(γ₁·N₁(w ⊛ x) + β₁)) + β₂) for R rates over one x, and its gradients, on the CPU.

#include "common/scratch.h"
#include "common/tensor.h"
#include "depthwise_conv2d/cpu.h"
#include "separable_conv2d/call.h"

#define SEGKERNELS_KERNELS "separable_conv2d/cpu_kernels.h"
#include "common/foreach_isa.h"

namespace segkernels {
namespace {

using namespace separable;
using Optional = std::optional<Tensor>;
using Ints = std::vector<int64_t>;

template <class A>
Clip<A> clip_of(const std::string& act) {
  Clip<A> clip;
  if (act == "relu" || act == "relu6") clip.low = 0;
  if (act == "relu6") clip.high = 6;
  STD_TORCH_CHECK(act == "none" || act == "relu" || act == "relu6", "separable_conv2d: unknown activation ",
                  act);
  return clip;
}

// The numbers per channel of one stage, n channels.
template <class A>
struct Channels {
  std::vector<A> mean, scale, shift, invstd, mean_g, mean_gn;
  Affine<A> affine;

  // mean and var are null where the stage does not standardise.
  Channels(int64_t n, const A* gamma, const A* beta, const A* batch_mean, const A* batch_var,
           std::optional<double> eps, const std::string& act)
      : mean(n + 64), scale(n + 64), shift(n + 64), invstd(n + 64), mean_g(n + 64), mean_gn(n + 64) {
    for (int64_t c = 0; c < n; ++c) {
      mean[c] = batch_mean ? batch_mean[c] : A(0);
      invstd[c] = batch_mean ? A(1 / std::sqrt(double(batch_var[c]) + *eps)) : A(1);
      scale[c] = (gamma ? gamma[c] : A(1)) * invstd[c];
      shift[c] = beta ? beta[c] : A(0);
    }
    affine = {mean.data(),   scale.data(),   shift.data(),    invstd.data(),
              mean_g.data(), mean_gn.data(), clip_of<A>(act), eps.has_value()};
  }
  Channels(const Channels&) = delete;
};

template <class A>
const A* data_or_null(const Optional& t) {
  return t ? const_data<A>(*t) : nullptr;
}
template <class T>
T* data_or_null(const Tensor& t) {
  return t.numel() ? mutable_data<T>(t) : nullptr;
}
Optional dense_if(const Optional& t) { return t ? Optional(dense(*t)) : std::nullopt; }

// `t` itself where it lies in memory as a new map would, else a copy.
Tensor as_dense(const Tensor& t, bool channels_last) {
  const Map m = map_of(t);
  const int64_t pixel = channels_last ? m.C : 1, plane = channels_last ? 1 : m.H * m.W;
  const bool lies = (m.C == 1 || m.sC == plane) && (m.W == 1 || m.sW == pixel) &&
                    (m.H == 1 || m.sH == m.W * pixel) && (m.B == 1 || m.sB == m.C * m.H * m.W);
  return lies || t.numel() == 0 ? t : torch::stable::contiguous(t, format_of(channels_last));
}

// What forward and backward share: the depthwise plan, sizes, and checks that keep memory safe.
struct Operands {
  Tensor x, w, v;
  Optional gamma1, beta1, gamma2, beta2;
  ForwardPlan plan;
  Sizes sizes;

  static Tensor dense_x(const Tensor& x) { return with_dense_rows(x, is_channels_last(map_of(x))); }

  Operands(const Tensor& given_x, const Tensor& given_w, const Tensor& given_v, const Optional& g1,
           const Optional& b1, const Optional& g2, const Optional& b2, const Ints& stride,
           const Ints& padding, const Ints& dilation)
      : x(dense_x(given_x)),
        w(dense(given_w)),
        v(dense(given_v)),
        gamma1(dense_if(g1)),
        beta1(dense_if(b1)),
        gamma2(dense_if(g2)),
        beta2(dense_if(b2)),
        plan(geometry_of(map_of(x), w, stride, padding, dilation), map_of(x), x.element_size()) {
    const Geometry& g = plan.geometry;
    STD_TORCH_CHECK(v.dim() == 3 && v.size(0) == g.R && v.size(2) == g.C,
                    "separable_conv2d: v must be [R, D, C]");
    STD_TORCH_CHECK(w.scalar_type() == x.scalar_type() && v.scalar_type() == x.scalar_type(),
                    "separable_conv2d: x, w and v must have one type");
    sizes = {g.B, g.C, v.size(1), g.R, g.H_out(), g.W_out(), is_channels_last(map_of(given_x))};
    for (const Optional* t : {&gamma1, &beta1}) check_channels(*t, g.R * g.C);
    for (const Optional* t : {&gamma2, &beta2}) check_channels(*t, g.R * sizes.D);
  }
  void check_channels(const Optional& t, int64_t n) const {
    STD_TORCH_CHECK(!t || (t->numel() == n && t->scalar_type() == acc_type(x.scalar_type())),
                    "separable_conv2d: gamma and beta need one number of the accumulation type per channel");
  }
  Tensor sums(int64_t n) const { return empty(x, {n}, acc_type(x.scalar_type())); }
  Tensor none() const { return empty(x, {0}); }
};

// The call with what every stage reads; memory that belongs to it.
template <class T>
struct Prepared {
  using A = acc_t<T>;
  Call<T> call{};
  std::vector<T> w;
  Tensor v, weights;

  explicit Prepared(const Operands& o) : v(o.none()), weights(o.none()) {
    const Geometry& g = o.plan.geometry;
    call.sizes = o.sizes;
    call.plan = &o.plan;
    call.x = const_data<T>(o.x);
    call.w = const_data<T>(o.w);
    if (o.sizes.channels_last) {
      w = pack_depthwise_weights(call.w, g.R, g.C, g.taps());
      call.w = w.data();
    }
    static const Engine engine = engine_of<T>();
    call.engine = engine;
  }

  // v, its rows times scale where given, packed for the products.
  void pack(const Operands& o, bool backward, const A* scale) {
    const Sizes& s = call.sizes;
    const T* from = const_data<T>(o.v);
    call.v = nullptr;
    if constexpr (std::is_same_v<A, T>)
      if (!scale) call.v = from;
    if (!call.v) {
      v = empty(o.x, {s.R, s.D, s.C}, acc_type(o.x.scalar_type()));
      A* to = mutable_data<A>(v);
      SEGKERNELS_BY_ISA(simd::widen_row<A>(from, s.R * s.D * s.C, to))
      for (int64_t i = 0; scale && i < s.R * s.D; ++i)
        for (int64_t c = 0; c < s.C; ++c) to[i * s.C + c] *= scale[i];
      call.v = to;
    }
    SEGKERNELS_BY_ISA(call.weight_bytes = simd::weight_bytes(call, backward))
    weights = empty(o.x, {s.R * s.chunks() * call.weight_bytes}, ScalarType::Byte);
    call.weights = mutable_data<char>(weights);
    run(backward ? Stage::pack_backward : Stage::pack_forward, s.R * s.chunks(), s.D * s.C / s.chunks());
  }

  void run(Stage stage, int64_t items, int64_t cost) {
    parallel_for(items, cost,
                 [&](int64_t first, int64_t last) { SEGKERNELS_BY_ISA(simd::run(stage, call, first, last)) });
  }
  int64_t cost() const {  // of all pixels, roughly
    const Sizes& s = call.sizes;
    return s.B * s.pixels() * s.R * s.C * (s.D + 16);
  }
  int64_t map_cost() const {
    const Sizes& s = call.sizes;
    return s.B * s.pixels() * s.R * (s.C + s.D);
  }
};

// Moments of all groups, taken together in their order: mean and biased variance per channel.
template <class A>
void merge_moments(const Sizes& s, int64_t channels, const Sums<A>& sums, A* mean, A* var) {
  const int64_t groups = s.forward_groups();
  std::vector<double> m(channels), squares(channels);
  double count = 0;
  for (int64_t group = 0; group < groups; ++group) {
    double n = 0;
    for (int64_t t = group * s.tiles() / groups; t < (group + 1) * s.tiles() / groups; ++t)
      n += s.tile(t).size();
    const double part = n / (count + n);
    for (int64_t c = 0; c < channels; ++c) {
      const double delta = sums.first[group * channels + c] - m[c];
      m[c] += delta * part;
      squares[c] += sums.second[group * channels + c] + delta * delta * part * count;
    }
    count += n;
  }
  for (int64_t c = 0; c < channels; ++c) {
    mean[c] = A(m[c]);
    var[c] = A(squares[c] / count);
  }
}

template <class A>
struct GroupSums {
  std::vector<A> first, second;
  GroupSums(int64_t groups, int64_t channels) : first(groups * channels), second(groups * channels) {}
  Sums<A> get() { return {first.data(), second.data()}; }
};

template <class A>
void add_groups(const std::vector<A>& sums, int64_t groups, int64_t channels, A* total) {
  for (int64_t c = 0; c < channels; ++c) {
    double s = 0;
    for (int64_t group = 0; group < groups; ++group) s += sums[group * channels + c];
    total[c] = A(s);
  }
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs separable_conv2d(Tensor x, Tensor w, Tensor v, Optional gamma1, Optional beta1, Optional gamma2,
                         Optional beta2, std::string act1, std::string act2, std::optional<double> eps1,
                         std::optional<double> eps2, Ints stride, Ints padding, Ints dilation) {
  const Operands in(x, w, v, gamma1, beta1, gamma2, beta2, stride, padding, dilation);
  const Sizes& s = in.sizes;
  const int64_t RC = s.R * s.C, RD = s.R * s.D;
  const Ints shape{s.B, RD, s.H_out, s.W_out};
  const Tensor y = empty_map(in.x, shape, s.channels_last),
               o = eps2 ? empty_map(in.x, shape, s.channels_last) : in.none();
  const Tensor mean1 = in.sums(eps1 ? RC : 0), var1 = in.sums(eps1 ? RC : 0);
  const Tensor mean2 = in.sums(eps2 ? RD : 0), var2 = in.sums(eps2 ? RD : 0);
  if (y.numel() == 0) {
    for (Tensor t : {mean1, var1, mean2, var2}) torch::stable::zero_(t);
    return {y, o, mean1, var1, mean2, var2};
  }

  by_type(in.x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    Prepared<T> p(in);
    Call<T>& call = p.call;
    const int64_t groups = s.forward_groups();
    GroupSums<A> sums1(groups, eps1 ? RC : 0), sums2(groups, eps2 ? RD : 0);
    call.sums1 = sums1.get();
    call.sums2 = sums2.get();
    p.pack(in, false, nullptr);
    call.y = mutable_data<T>(y);
    call.o = data_or_null<T>(o);

    A *m1 = data_or_null<A>(mean1), *s1 = data_or_null<A>(var1), *m2 = data_or_null<A>(mean2),
      *s2 = data_or_null<A>(var2);
    if (eps1) {
      p.run(Stage::inner_moments, groups, p.map_cost() * 10 / groups);
      merge_moments(s, RC, call.sums1, m1, s1);
    }
    const Channels<A> inner(RC, data_or_null<A>(in.gamma1), data_or_null<A>(in.beta1), m1, s1, eps1, act1);
    call.inner = inner.affine;
    if (!eps2) {
      const Channels<A> outer(RD, data_or_null<A>(in.gamma2), data_or_null<A>(in.beta2), nullptr, nullptr,
                              eps2, act2);
      call.outer = outer.affine;
      p.run(Stage::forward, groups, p.cost() / groups);
    } else {
      call.outer.standardised = true;
      p.run(Stage::forward, groups, p.cost() / groups);
      merge_moments(s, RD, call.sums2, m2, s2);
      const Channels<A> outer(RD, data_or_null<A>(in.gamma2), data_or_null<A>(in.beta2), m2, s2, eps2, act2);
      call.outer = outer.affine;
      p.run(Stage::finish, s.tiles(), p.map_cost() / s.tiles());
    }
  });
  return {y, o, mean1, var1, mean2, var2};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients separable_conv2d_backward(Tensor dy, Tensor x, Optional y, Optional o, Tensor w, Tensor v,
                                    Optional gamma1, Optional beta1, Optional gamma2, Optional beta2,
                                    Tensor mean1, Tensor var1, Tensor mean2, Tensor var2, std::string act1,
                                    std::string act2, std::optional<double> eps1, std::optional<double> eps2,
                                    Ints stride, Ints padding, Ints dilation, Ints need) {
  const Operands in(x, w, v, gamma1, beta1, gamma2, beta2, stride, padding, dilation);
  const Sizes& s = in.sizes;
  const int64_t RC = s.R * s.C, RD = s.R * s.D;
  STD_TORCH_CHECK(need.size() == 7, "separable_conv2d_backward: need has 7 numbers");
  STD_TORCH_CHECK(eps2 ? o.has_value() : y.has_value() || act2 == "none",
                  "separable_conv2d_backward: o (standardised) or y (activated) is missing");
  const auto as_map = [&](const Tensor& t) {
    const Map m = map_of(t);
    STD_TORCH_CHECK(
        m.B == s.B && m.C == RD && m.H == s.H_out && m.W == s.W_out && t.scalar_type() == in.x.scalar_type(),
        "separable_conv2d_backward: dy, y and o must have the output's sizes and x's type");
    return as_dense(t, s.channels_last);
  };
  dy = as_map(dy);
  if (eps2) o = as_map(*o);
  const bool masked = !eps2 && act2 != "none";
  if (masked) y = as_map(*y);
  mean1 = dense(mean1), var1 = dense(var1), mean2 = dense(mean2), var2 = dense(var2);
  STD_TORCH_CHECK((!eps1 || (mean1.numel() == RC && var1.numel() == RC)) &&
                      (!eps2 || (mean2.numel() == RD && var2.numel() == RD)),
                  "separable_conv2d_backward: mean and var need one number per channel");

  const bool want_dd = need[0] || need[1], want_inner = want_dd || need[3] || need[4];
  const bool want_dv = need[2] || (need[5] && !eps2);
  const Tensor dv = empty(in.x, need[2] ? Ints{s.R, s.D, s.C} : Ints{0});
  const Tensor dgamma1 = in.sums(need[3] ? RC : 0), dbeta1 = in.sums(need[4] ? RC : 0);
  const Tensor dgamma2 = in.sums(need[5] ? RD : 0), dbeta2 = in.sums(need[6] ? RD : 0);
  const Tensor dd = want_dd ? empty_map(in.x, {s.B, RC, s.H_out, s.W_out}, s.channels_last) : in.none();

  if (dy.numel() == 0) {
    for (Tensor t : {dv, dgamma1, dbeta1, dgamma2, dbeta2, dd}) torch::stable::zero_(t);
  } else {
    by_type(in.x.scalar_type(), [&](auto type) {
      using T = decltype(type);
      using A = acc_t<T>;
      Prepared<T> p(in);
      Call<T>& call = p.call;
      const A *g1 = data_or_null<A>(in.gamma1), *b1 = data_or_null<A>(in.beta1),
              *g2 = data_or_null<A>(in.gamma2), *b2 = data_or_null<A>(in.beta2);
      Channels<A> inner(RC, g1, b1, eps1 ? const_data<A>(mean1) : nullptr,
                        eps1 ? const_data<A>(var1) : nullptr, eps1, act1);
      Channels<A> outer(RD, g2, b2, eps2 ? const_data<A>(mean2) : nullptr,
                        eps2 ? const_data<A>(var2) : nullptr, eps2, act2);
      call.inner = inner.affine;
      call.outer = outer.affine;
      call.dy = const_data<T>(dy);
      call.y = masked ? mutable_data<T>(*y) : nullptr;
      call.o = eps2 ? mutable_data<T>(*o) : nullptr;
      call.dd = data_or_null<T>(dd);
      call.want_dv = want_dv;
      call.want_inner = want_inner;
      p.pack(in, true, eps2 ? nullptr : g2);

      const double count = double(s.B) * s.pixels();
      std::vector<A> sum_g2(RD), sum_gn2(RD), sum_g1(RC), sum_gn1(RC);
      if (eps2) {
        const int64_t groups = s.forward_groups();
        GroupSums<A> sums(groups, RD);
        call.sums2 = sums.get();
        p.run(Stage::outer_sums, groups, p.map_cost() / groups);
        add_groups(sums.first, groups, RD, sum_g2.data());
        add_groups(sums.second, groups, RD, sum_gn2.data());
        for (int64_t c = 0; c < RD; ++c) {
          outer.mean_g[c] = A(sum_g2[c] / count);
          outer.mean_gn[c] = A(sum_gn2[c] / count);
        }
      }
      const int64_t groups = s.backward_groups(), items = s.R * s.chunks() * groups;
      GroupSums<A> sums1(groups, RC), sums2(groups, RD);
      const Tensor dvs = in.sums(want_dv ? groups * RD * s.C : 0);
      call.sums1 = sums1.get();
      call.sums2 = sums2.get();
      call.dv = data_or_null<A>(dvs);
      p.run(Stage::backward, items, 2 * p.cost() / items);
      if (!eps2) add_groups(sums2.first, groups, RD, sum_g2.data());
      add_groups(sums1.first, groups, RC, sum_g1.data());
      add_groups(sums1.second, groups, RC, sum_gn1.data());
      if (eps1 && want_dd) {
        for (int64_t c = 0; c < RC; ++c) {
          inner.mean_g[c] = A(sum_g1[c] / count);
          inner.mean_gn[c] = A(sum_gn1[c] / count);
        }
        p.run(Stage::inner_finish, s.tiles(), p.map_cost() * 10 / s.tiles());
      }
      if (want_dv)  // γ₂·gᵀh, and Σ_c v·gᵀh; with moments γ₂ is in g already
        parallel_for(RD, groups * s.C, [&](int64_t first, int64_t last) {
          SEGKERNELS_BY_ISA(simd::finish_dv(call, const_data<T>(in.v), groups, eps2 ? nullptr : g2,
                                            data_or_null<T>(dv), eps2 ? nullptr : sum_gn2.data(), first,
                                            last))
        });
      const auto give = [](const std::vector<A>& sums, const Tensor& t) {
        if (t.numel()) std::copy(sums.begin(), sums.end(), mutable_data<A>(t));
      };
      give(sum_gn1, dgamma1);
      give(sum_g1, dbeta1);
      give(sum_gn2, dgamma2);
      give(sum_g2, dbeta2);
    });
  }
  const auto [dx, dw, db] =
      want_dd ? depthwise_conv2d_backward(dd, in.x, in.w, stride, padding, dilation, {need[0], need[1], 0})
              : std::tuple<Tensor, Tensor, Tensor>(in.none(), in.none(), in.none());
  return {dx, dw, dv, dgamma1, dbeta1, dgamma2, dbeta2};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(segkernels, CPU, m) {
  m.impl("separable_conv2d", TORCH_BOX(&separable_conv2d));
  m.impl("separable_conv2d_backward", TORCH_BOX(&separable_conv2d_backward));
}

}  // namespace segkernels
