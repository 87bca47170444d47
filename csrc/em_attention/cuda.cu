// em_attention on CUDA: allocate, launch, register.
#include <tuple>

#include "em_attention/kernels.cuh"
#include "soft_assign/launch.h"

namespace segkernels::cuda {
namespace {

using torch::stable::select;

// Some channels of maps, or nodes of images.
Tensor part(Tensor of, int64_t first, int64_t count) { return torch::stable::narrow(of, 1, first, count); }

template <class A>
OfNodes<A> of_nodes(const Tensor& nodes) {
  if constexpr (std::is_const_v<A>)
    return {const_data<std::remove_const_t<A>>(nodes), nodes.stride(0)};
  else
    return {mutable_data<A>(nodes), nodes.stride(0)};
}

// [.., M] · [M, N], `by` of any strides, with the vector `last` as one more column, which goes to `out_last`.
template <class A>
void fold(const Queue& queue, const Tensor& in, const Tensor& by, const MaybeTensor& last, const Tensor& out,
          const MaybeTensor& out_last) {
  const Folded<A> folded = {const_data<A>(by), data<A>(last),   by.stride(0),
                            by.stride(1),      int(by.size(0)), int(by.size(1))};
  const int64_t rows = in.size(0) * in.size(1), tiles = ceil_div(by.size(1) + (last ? 1 : 0), WARP);
  queue.launch(&em_attention_fold_kernel<A>, ceil_div(rows, FOLD_ROWS) * tiles, BLOCK, 0, const_data<A>(in),
               folded, rows, int(tiles), mutable_data<A>(out),
               out_last ? mutable_data<A>(*out_last) : nullptr);
}

// The M-step: the bases μ and, where they are wanted, the masses s and lengths r.
template <class A>
void bases(const Queue& queue, const Gathered& gathered, const MaybeTensor& w, const MaybeTensor& b,
           Norm norm, const Tensor& mu, const MaybeTensor& s, const MaybeTensor& r) {
  const int64_t B = mu.size(0), K = mu.size(1), D = mu.size(2);
  Tensor sums = gathered.sums;
  int splits = gathered.splits();
  if (w) {
    const int64_t size = K * w->size(1);
    const Tensor sum = empty(mu, {B, K, w->size(1)});
    queue.launch(&node_sums_kernel<A>, ceil_div(B * size, BLOCK), BLOCK, 0, const_data<A>(sums), splits, size,
                 B, mutable_data<A>(sum));
    sums = empty(mu, {B, K, D}), splits = 1;
    fold<A>(queue, sum, torch::stable::transpose(*w, 0, 1), std::nullopt, sums, std::nullopt);
  }
  queue.launch(&em_attention_bases_kernel<A>, B * K, BLOCK, 0, const_data<A>(sums), splits,
               const_data<A>(gathered.masses), gathered.splits(), data<A>(b), int(K), int(D), norm,
               of_nodes<A>(mu), s ? of_nodes<A>(*s) : OfNodes<A>{}, r ? of_nodes<A>(*r) : OfNodes<A>{});
}

using Three = std::tuple<Tensor, Tensor, Tensor>;
using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

void check(const Tensor& x, const Tensor& mu, int64_t channels) {
  STD_TORCH_CHECK(x.dim() == 4 && mu.dim() == 3 && mu.size(0) == x.size(0) && mu.size(2) == channels &&
                      mu.scalar_type() == acc_type(x.scalar_type()),
                  "segkernels: x [B, C, H, W] and mu [B, K, D] of the accumulation type do not fit");
}

Six em_attention(Tensor x, Tensor mu, MaybeTensor lam, MaybeTensor w, MaybeTensor b, int64_t iterations,
                 int64_t depth, bool clamp, bool assignment) {
  const Queue queue(x);
  STD_TORCH_CHECK(!w || (w->dim() == 2 && w->size(1) == x.size(1) && depth < 0),
                  "segkernels: w must be [D, C], without gradients");
  check(x, mu, w ? w->size(0) : x.size(1));
  if (b) b = dense(*b);
  const int64_t B = mu.size(0), K = mu.size(1), D = mu.size(2), steps = std::max<int64_t>(1, depth);
  const Tensor z = map_like(x, K, mu.scalar_type()), y = map_like(x, D, x.scalar_type());
  const Tensor h = empty(mu, depth < 0 ? std::vector<int64_t>{0} : std::vector{B, steps, K, D});
  const Tensor s = empty(mu, {B, std::max<int64_t>(0, depth), K}), r = empty(mu, {B, s.size(1), K});
  Tensor m = empty(mu, {B, K, D});
  // where the bases of E-step t belong, and those behind the last
  const int64_t first = std::max<int64_t>(1, iterations) - steps;
  const auto place = [&](int64_t t) {
    if (depth >= 0 && t >= first && t < first + steps) return select(h, 1, t - first);
    return t == iterations ? m : empty(mu, {B, K, D});
  };
  const auto kept = [&](const Tensor& of, int64_t t) {
    return t >= iterations - depth ? MaybeTensor(select(of, 1, t - iterations + depth)) : std::nullopt;
  };
  by_storage(x, [&](auto storage) {
    using A = acc_t<decltype(storage)>;
    Tensor now = place(0);
    torch::stable::copy_(now, mu);
    if (iterations == 0) torch::stable::copy_(m, mu);
    for (int64_t t = 0; t < std::max<int64_t>(1, iterations); ++t) {
      Tensor p = now;
      MaybeTensor bias;
      if (w) {
        p = empty(mu, {B, K, x.size(1)});
        if (b) bias = empty(mu, {B, K});
        fold<A>(queue, now, *w, b, p, bias);
      }
      responsibilities(queue, x, p, bias, lam, z);
      if (iterations == 0) break;
      const Gathered gathered = gather_images(queue, z, x, std::nullopt);
      now = place(t + 1);
      bases<A>(queue, gathered, w, b, {clamp}, now, kept(s, t), kept(r, t));
    }
  });
  reconstruction(queue, m, z, y);
  return {y, assignment ? z : empty(mu, {0}), m, h, s, r};
}

// dx = Σ_t z_t da_t + dl_t λμ is one product, of maps [B, P, H, W] with nodes [B, P, C]; here are their parts
// of K. With constant bases (`depth` 0) it has dl alone. Where dx is not wanted the steps share their maps.
struct __attribute__((visibility("hidden"))) Products {
  int64_t K, each;
  bool wanted;
  Tensor maps, nodes, constant;

  Products(const Tensor& x, const Tensor& h, int64_t depth, bool wanted)
      : K(h.size(2)),
        each(depth ? 2 : 1),
        wanted(wanted),
        maps(map_like(x, (wanted ? h.size(1) : 1) * each * K, h.scalar_type())),
        nodes(empty(h, {h.size(0), h.size(1) * each * K, h.size(3)})),
        constant(depth ? maps : map_like(x, K, h.scalar_type())) {}
  int64_t step(int64_t t) const { return wanted ? t * each : 0; }
  Tensor z(int64_t t) const { return each == 2 ? part(maps, step(t) * K, K) : constant; }
  Tensor dl(int64_t t) const { return part(maps, (step(t) + each - 1) * K, K); }
  Tensor da(int64_t t) const { return part(nodes, t * each * K, K); }
  Tensor slope(int64_t t) const { return part(nodes, (t * each + each - 1) * K, K); }
};

Three em_attention_backward(MaybeTensor dy, MaybeTensor dz, MaybeTensor dm, Tensor x, Tensor m, Tensor h,
                            Tensor s, Tensor r, MaybeTensor lam, int64_t depth, bool clamp, Ints need) {
  const Queue queue(x);
  check(x, m, x.size(1));
  STD_TORCH_CHECK(need.size() == 3 && depth >= 0, "segkernels: need must have 3 elements, depth be >= 0");
  m = dense(m), h = dense(h), s = dense(s), r = dense(r);
  if (dm) dm = dense(*dm);
  const int64_t B = m.size(0), K = m.size(1), C = m.size(2), last = h.size(1) - 1;
  const Products of(x, h, depth, need[0]);
  const Tensor dmu = empty(m, {B, K, C}), ds = empty(m, {B, K});
  const Tensor heat = empty(m, {last + 1, B, K}, ScalarType::Double);
  const Tensor dx = need[0] ? map_like(x, C, x.scalar_type()) : empty(x, {0});
  const Tensor dlam = need[2] ? empty(m, {}) : empty(m, {0});
  by_storage(x, [&](auto storage) {
    using A = acc_t<decltype(storage)>;
    // the gradient of the bases μ in front of step t, and through the M-step that made them
    const auto bases_gradient = [&](BasesGradient<A> g, const Tensor& mu, int64_t t) {
      g.mu = of_nodes<const A>(mu);
      g.dmu = mutable_data<A>(dmu);
      if (depth && t > 0) {
        g.s = of_nodes<const A>(select(s, 1, t - 1)), g.r = of_nodes<const A>(select(r, 1, t - 1));
        g.da = of_nodes<A>(of.da(t - 1)), g.ds = mutable_data<A>(ds);
      }
      queue.launch(&em_attention_bases_gradient_kernel<A>, B * K, BLOCK, 0, g, int(K), int(C), Norm{clamp});
    };
    responsibilities(queue, x, select(h, 1, last), std::nullopt, lam, of.z(last));
    if (depth || need[1]) {
      BasesGradient<A> g = {};
      std::optional<Gathered> gathered;
      if (dy) gathered = gather_images(queue, of.z(last), *dy, std::nullopt);
      if (dy) g.sums = const_data<A>(gathered->sums), g.splits = gathered->splits();
      g.addend = data<A>(dm);
      bases_gradient(g, m, last + 1);
    }
    if (depth && dy) dz = assignment_cotangent(queue, *dy, m, dz);
    for (int64_t t = last; t >= 0; --t) {
      const Tensor mu = select(h, 1, t), z = of.z(t), dl = of.dl(t);
      if (t < last) responsibilities(queue, x, mu, std::nullopt, lam, z);
      const MaybeTensor from = t == last ? dz : std::nullopt;
      if (depth)
        assignment_gradient(queue, x, std::nullopt, of.da(t), ds, z, from, dl);
      else  // without dy, a map of no channels
        assignment_gradient(queue, dy ? *dy : part(z, 0, 0), std::nullopt, m, std::nullopt, z, from, dl);
      BasesGradient<A> g = {};
      std::optional<Gathered> gathered;
      if (t > 0 || need[1] || need[2]) {
        gathered = gather_images(queue, dl, x, std::nullopt);
        g.sums = const_data<A>(gathered->sums), g.splits = gathered->splits();
      }
      g.lam = data<A>(lam);
      if (!depth && need[1]) g.addend = const_data<A>(dmu);
      if (need[2]) g.heat = mutable_data<double>(heat) + t * B * K;
      g.slope = of_nodes<A>(of.slope(t));
      bases_gradient(g, mu, t);
    }
    if (need[0]) reconstruction(queue, of.nodes, of.maps, dx);
    if (need[2])
      queue.launch(&em_attention_heat_kernel<A>, 1, BLOCK, 0, const_data<double>(heat), heat.numel(),
                   mutable_data<A>(dlam));
  });
  return {dx, need[1] ? dmu : empty(m, {0}), dlam};
}

STABLE_TORCH_LIBRARY_IMPL(segkernels, CUDA, m) {
  m.impl("em_attention", TORCH_BOX(&em_attention));
  m.impl("em_attention_backward", TORCH_BOX(&em_attention_backward));
}

}  // namespace
}  // namespace segkernels::cuda
