// soft_assign on CUDA: allocate, launch, register; and the products of pixels and nodes for all operators.
#include "soft_assign/launch.h"

#include <tuple>

#include "common/gather.cuh"
#include "common/node_maps.h"
#include "common/scores.cuh"
#include "common/spread.cuh"
#include "soft_assign/kernels.cuh"

namespace segkernels::cuda {
namespace {

template <class T, Score SCORE>
void scores(const Queue& queue, const Tensor& x, const ScoreNodes<T, SCORE>& nodes,
            const ScoreMaps<acc_t<T>>& maps, int64_t K) {
  STD_TORCH_CHECK(K >= 1 && K <= 256, "segkernels: 1 to 256 nodes, got ", K);
  const NodeShape shape = shape_of(x, K);
  const auto run = [&](auto nj, auto node_warps) {
    using Stage = ScoreStage<T, SCORE, nj, node_warps>;
    const int64_t tiles = ceil_div(shape.pixels, Stage::PIXELS);
    queue.launch(&node_scores_kernel<T, SCORE, nj, node_warps>, x.size(0) * tiles, Stage::THREADS,
                 sizeof(Stage), pixel_map<const T>(x), nodes, maps, shape, int(tiles));
  };
  using std::integral_constant;
  if (K <= 8)
    run(integral_constant<int, 1>(), integral_constant<int, 1>());
  else if (K <= 32)
    run(integral_constant<int, 4>(), integral_constant<int, 1>());
  else
    run(integral_constant<int, 4>(), integral_constant<int, 8>());
}

// How many pixels a part of the sums over a group covers: parts enough to fill a device, and no more.
int64_t gather_split(int64_t pixels, int64_t tiles) {
  int64_t split = 4096;
  while (split > 256 && ceil_div(pixels, split) * tiles < 132 * 2) split /= 2;
  return split;
}

template <bool SQUARES>
Gathered gather(const Queue& queue, const Tensor& a, const Tensor& x, const MaybeTensor& centre,
                int64_t groups) {
  const NodeShape of = shape_of(x, a.size(1));
  const int64_t K = of.nodes, C = of.channels;
  Gathered out;
  by_storage(x, [&](auto storage) {
    using T = decltype(storage);
    using A = acc_t<T>;
    const auto run = [&](auto nj) {
      using Stage = GatherStage<T, nj>;
      GatherShape shape = {of};
      shape.group = groups ? x.size(0) / groups * of.pixels : 0;
      shape.channel_tiles = int(ceil_div(C, Stage::CHANNELS));
      shape.node_tiles = int(ceil_div(K, Stage::NODES));
      const int64_t tiles = shape.channel_tiles * shape.node_tiles;
      shape.split = gather_split(shape.group, tiles);
      shape.splits = int(ceil_div(shape.group, shape.split));
      out.sums = empty(a, {groups, shape.splits, SQUARES ? 2 : 1, K, C});
      out.masses = empty(a, {groups, shape.splits, K});
      queue.launch(&node_gather_kernel<T, nj, SQUARES>, groups * shape.splits * tiles, Stage::THREADS,
                   sizeof(Stage), pixel_map<const A>(a), pixel_map<const T>(x), data<A>(centre),
                   mutable_data<A>(out.sums), mutable_data<A>(out.masses), shape);
    };
    if (K <= 8)
      run(std::integral_constant<int, 1>());
    else
      run(std::integral_constant<int, 4>());
  });
  return out;
}

template <class T, Spread SPREAD>
void spread(const Queue& queue, const SpreadNodes<T, SPREAD>& nodes, const SpreadMaps<T>& maps,
            const Tensor& out, int64_t K) {
  using Stage = SpreadStage<T, SPREAD>;
  const NodeShape shape = shape_of(out, K);
  const int64_t pixel_tiles = ceil_div(shape.pixels, Stage::PIXELS);
  const int64_t channel_tiles = ceil_div(shape.channels, Stage::CHANNELS);
  queue.launch(&node_spread_kernel<T, SPREAD>, out.size(0) * pixel_tiles * channel_tiles, Stage::THREADS,
               sizeof(Stage), nodes, maps, shape, int(pixel_tiles), int(channel_tiles));
}

}  // namespace

Tensor map_like(const Tensor& map, int64_t channels, ScalarType type) {
  const bool channels_last = is_channels_last(map_of(map));
  return torch::stable::empty({map.size(0), channels, map.size(2), map.size(3)}, type, std::nullopt,
                              map.device(), std::nullopt, format_of(channels_last));
}

Tensor assign(const Queue& queue, const Tensor& x, const ScoreCoefficients& nodes) {
  const int64_t K = nodes.p.size(0);
  const Tensor q = map_like(x, K, acc_type(x.scalar_type()));
  by_storage(x, [&](auto storage) {
    using T = decltype(storage);
    using A = acc_t<T>;
    scores<T, Score::assignment>(
        queue, x,
        {const_data<A>(nodes.p), const_data<A>(nodes.r), const_data<A>(nodes.b), const_data<A>(nodes.centre),
         nullptr, 0, 0, int(nodes.b.size(0)), nodes_vectorise(nodes.p)},
        {pixel_map<A>(q), {}, {}}, K);
  });
  return q;
}

void assignment_gradient(const Queue& queue, const Tensor& x, const MaybeTensor& centre, const Tensor& h,
                         const MaybeTensor& t, const Tensor& q, const MaybeTensor& dq, const Tensor& dl) {
  const int64_t K = h.size(1);
  by_storage(x, [&](auto storage) {
    using T = decltype(storage);
    using A = acc_t<T>;
    scores<T, Score::gradient>(queue, x,
                               {const_data<A>(h), nullptr, data<A>(t), data<A>(centre), nullptr, h.stride(0),
                                K, t ? 1 : 0, nodes_vectorise(h)},
                               {pixel_map<A>(dl), pixel_map<const A>(q), pixel_map<const A>(dq)}, K);
  });
}

void responsibilities(const Queue& queue, const Tensor& x, const Tensor& p, const MaybeTensor& b,
                      const MaybeTensor& lam, const Tensor& z) {
  const int64_t K = p.size(1);
  by_storage(x, [&](auto storage) {
    using T = decltype(storage);
    using A = acc_t<T>;
    scores<T, Score::softmax>(queue, x,
                              {const_data<A>(p), nullptr, data<A>(b), nullptr, data<A>(lam), p.stride(0), K,
                               b ? 1 : 0, nodes_vectorise(p)},
                              {pixel_map<A>(z), {}, {}}, K);
  });
}

Tensor assignment_cotangent(const Queue& queue, const Tensor& dy, const Tensor& z, const MaybeTensor& dq) {
  const int64_t K = z.size(1);
  const Tensor sum = map_like(dy, K, z.scalar_type());
  by_storage(dy, [&](auto storage) {
    using T = decltype(storage);
    using A = acc_t<T>;
    scores<T, Score::cotangent>(
        queue, dy,
        {const_data<A>(z), nullptr, nullptr, nullptr, nullptr, z.stride(0), 0, 0, nodes_vectorise(z)},
        {pixel_map<A>(sum), {}, pixel_map<const A>(dq)}, K);
  });
  return sum;
}

Tensor node_products(const Queue& queue, const Tensor& dy, const Tensor& z, const Tensor& q) {
  const int64_t K = z.size(1), D = z.size(2);
  const Tensor dq = map_like(q, K, q.scalar_type());
  by_storage(dy, [&](auto storage) {
    using T = decltype(storage);
    scores<T, Score::product>(
        queue, dy, {const_data<T>(z), nullptr, nullptr, nullptr, nullptr, K * D, 0, 0, nodes_vectorise(z)},
        {pixel_map<acc_t<T>>(dq), {}, {}}, K);
  });
  return dq;
}

Gathered gather_images(const Queue& queue, const Tensor& a, const Tensor& x, const MaybeTensor& centre) {
  return gather<false>(queue, a, x, centre, x.size(0));
}
Gathered gather_squares(const Queue& queue, const Tensor& a, const Tensor& x, const Tensor& centre) {
  return gather<true>(queue, a, x, centre, 1);
}

void add_parts(const Queue& queue, const Gathered& gathered, const Tensor& out) {
  const int64_t B = out.size(0), size = out.size(1) * out.size(2);
  by_storage(out, [&](auto storage) {
    using T = decltype(storage);
    queue.launch(&node_sums_kernel<T>, ceil_div(B * size, BLOCK), BLOCK, 0,
                 const_data<acc_t<T>>(gathered.sums), gathered.splits(), size, B, mutable_data<T>(out));
  });
}

void reprojection(const Queue& queue, const Tensor& z, const Tensor& q, const MaybeTensor& r,
                  const Tensor& y) {
  by_storage(y, [&](auto storage) {
    using T = decltype(storage);
    spread<T, Spread::reprojection>(
        queue, {const_data<T>(z), nullptr, nullptr, nullptr, nodes_vectorise(z)},
        {pixel_map<const acc_t<T>>(q), {}, pixel_map<const T>(r), pixel_map<T>(y)}, y, z.size(1));
  });
}

void reconstruction(const Queue& queue, const Tensor& z, const Tensor& q, const Tensor& y) {
  by_storage(y, [&](auto storage) {
    using T = decltype(storage);
    using A = acc_t<T>;
    spread<T, Spread::reconstruction>(queue,
                                      {const_data<A>(z), nullptr, nullptr, nullptr, nodes_vectorise(z)},
                                      {pixel_map<const A>(q), {}, {}, pixel_map<T>(y)}, y, z.size(1));
  });
}

Tensor features_gradient(const Queue& queue, const Tensor& x, const ScoreCoefficients& nodes, const Tensor& h,
                         const Tensor& q, const Tensor& dl) {
  const Tensor dx = map_like(x, x.size(1), x.scalar_type());
  by_storage(x, [&](auto storage) {
    using T = decltype(storage);
    using A = acc_t<T>;
    spread<T, Spread::gradient>(
        queue,
        {const_data<A>(h), const_data<A>(nodes.p), const_data<A>(nodes.r), const_data<A>(nodes.centre),
         nodes_vectorise(h)},
        {pixel_map<const A>(q), pixel_map<const A>(dl), pixel_map<const T>(x), pixel_map<T>(dx)}, dx,
        h.size(1));
  });
  return dx;
}

namespace {

void check(const Tensor& x, const Tensor& w, const Tensor& s) {
  STD_TORCH_CHECK(x.dim() == 4 && w.dim() == 2 && w.size(1) == x.size(1) && s.dim() == 2 &&
                      s.size(0) == w.size(0) && s.size(1) == w.size(1),
                  "segkernels: x [B, C, H, W], w [K, C] and s [K, C] do not fit");
  for (const Tensor* t : {&w, &s})
    STD_TORCH_CHECK(t->scalar_type() == acc_type(x.scalar_type()),
                    "segkernels: w and s must be of the accumulation type");
}

template <class A>
ScoreCoefficients coefficients(const Queue& queue, const Tensor& w, const Tensor& s) {
  const int64_t K = w.size(0), C = w.size(1);
  const ScoreCoefficients made(w, K, C);
  queue.launch(&soft_assign_coefficients_kernel<A>, made.parts(C), COEFFICIENT_THREADS, 0, const_data<A>(w),
               const_data<A>(s), int(K), int(C), made.on_device<A>());
  return made;
}

using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Four soft_assign(Tensor x, Tensor w, Tensor s, bool average, bool normalise, double eps) {
  const Queue queue(x);
  check(x, w, s);
  w = dense(w), s = dense(s);
  const int64_t B = x.size(0), K = w.size(0), C = w.size(1);
  const Tensor z = empty(x, {B, K, C}), e = empty(w, {B, K, C}), m = empty(w, {B, K});
  Tensor q;
  by_storage(x, [&](auto storage) {
    using T = decltype(storage);
    using A = acc_t<T>;
    const ScoreCoefficients nodes = coefficients<A>(queue, w, s);
    q = assign(queue, x, nodes);
    const Gathered gathered = gather_images(queue, q, x, nodes.centre);
    queue.launch(&soft_assign_nodes_kernel<T>, B * K, BLOCK, 0, const_data<A>(gathered.sums),
                 const_data<A>(gathered.masses), gathered.splits(), const_data<A>(w), const_data<A>(s),
                 const_data<A>(nodes.centre), int(K), int(C), Standardisation{average, normalise, eps},
                 mutable_data<T>(z), mutable_data<A>(e), mutable_data<A>(m));
  });
  return {z, q, e, m};
}

Three soft_assign_backward(MaybeTensor dz, MaybeTensor dq, Tensor x, Tensor w, Tensor s, Tensor q, Tensor e,
                           Tensor m, bool average, bool normalise, double eps, Ints need) {
  const Queue queue(x);
  check(x, w, s);
  STD_TORCH_CHECK(need.size() == 3, "segkernels: need must have 3 elements");
  w = dense(w), s = dense(s), e = dense(e), m = dense(m);
  if (dz) dz = dense(*dz);
  const int64_t B = x.size(0), K = w.size(0), C = w.size(1);
  Tensor dx = empty(x, {0});
  const Tensor dw = need[1] ? empty(w, {K, C}) : empty(w, {0});
  const Tensor ds = need[2] ? empty(w, {K, C}) : empty(w, {0});
  by_storage(x, [&](auto storage) {
    using T = decltype(storage);
    using A = acc_t<T>;
    const ScoreCoefficients nodes = coefficients<A>(queue, w, s);
    const Tensor h = empty(w, {B, K, C}), t = empty(w, {B, K});
    queue.launch(&soft_assign_cotangents_kernel<T>, B * K, BLOCK, 0, data<T>(dz), const_data<A>(w),
                 const_data<A>(s), const_data<A>(nodes.centre), const_data<A>(e), const_data<A>(m), int(K),
                 int(C), Standardisation{average, normalise, eps}, mutable_data<A>(h), mutable_data<A>(t));
    const Tensor dl = map_like(q, K, q.scalar_type());
    assignment_gradient(queue, x, nodes.centre, h, t, q, dq, dl);
    if (need[0]) dx = features_gradient(queue, x, nodes, h, q, dl);
    if (!need[1] && !need[2]) return;
    const Gathered a = gather_squares(queue, dl, x, nodes.centre);
    queue.launch(&soft_assign_finish_kernel<A>, ceil_div(K * C, BLOCK), BLOCK, 0, const_data<A>(a.sums),
                 const_data<A>(a.masses), a.splits(), const_data<A>(w), const_data<A>(s),
                 const_data<A>(nodes.centre), const_data<A>(h), const_data<A>(e), const_data<A>(m), B, int(K),
                 int(C), need[1] ? mutable_data<A>(dw) : nullptr, need[2] ? mutable_data<A>(ds) : nullptr);
  });
  return {dx, dw, ds};
}

STABLE_TORCH_LIBRARY_IMPL(segkernels, CUDA, m) {
  m.impl("soft_assign", TORCH_BOX(&soft_assign));
  m.impl("soft_assign_backward", TORCH_BOX(&soft_assign_backward));
}

}  // namespace
}  // namespace segkernels::cuda
