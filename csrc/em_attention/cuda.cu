// em_attention on CUDA: allocate, launch, register.
#include <tuple>

#include "common/node_maps.h"
#include "em_attention/iterations.cuh"
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

// One kernel for a pass over the pixels, where the scores of a tile fit its registers; else the products of
// soft assignment, one after the other.
bool in_one_kernel(const Tensor& x, int64_t K) {
  return x.scalar_type() == ScalarType::Double ? false : K <= (x.element_size() == 2 ? 64 : 32);
}

// f(NJ): the tiles of such a kernel are of 8·NJ bases.
template <class T, class F>
void by_bases(int64_t K, F&& f) {
  if (K <= 8)
    f(std::integral_constant<int, 1>());
  else if (K <= 32)
    f(std::integral_constant<int, 4>());
  else if constexpr (sizeof(T) == 2)
    f(std::integral_constant<int, 8>());
}

// The parts that the sums are made in: the size of an image decides, and nothing else. One tile a part; of
// little more than eight tiles (33 × 33 pixels) eight parts, as many as blocks of a cluster; at most 32.
template <class Stage, class A>
PassSums<A> parts_of(int64_t pixels) {
  constexpr int64_t TILE = Stage::PIXELS, CLUSTER = 8, LITTLE = 16, MOST_PARTS = 32;
  PassSums<A> parts = {};
  const bool eight = pixels > CLUSTER * TILE && pixels <= CLUSTER * (TILE + LITTLE);
  parts.pixels =
      int(eight ? TILE + LITTLE : std::max<int64_t>(1, ceil_div(pixels, TILE * MOST_PARTS)) * TILE);
  parts.splits = int(ceil_div(pixels, parts.pixels));
  return parts;
}
// Memory for the sums of `places` images.
template <class A>
Gathered make_room(PassSums<A>& parts, const Tensor& like, int64_t places, const NodeShape& shape) {
  const Tensor sums = empty(like, {places, parts.splits, 1, shape.nodes, shape.channels});
  const Tensor masses = empty(like, {places, parts.splits, shape.nodes});
  parts.sums = mutable_data<A>(sums), parts.masses = mutable_data<A>(masses);
  return {sums, masses};
}

template <Pass PASS, class T>
Gathered pass(const Queue& queue, const PassNodes<acc_t<T>>& nodes, const PassMaps<T>& maps, const Tensor& x,
              int64_t K, bool summed) {
  using A = acc_t<T>;
  const NodeShape shape = shape_of(x, K);
  Gathered out;
  by_bases<T>(K, [&](auto nj) {
    using Stage = PassStage<T, PASS, nj>;
    PassSums<A> sums = parts_of<Stage, A>(shape.pixels);
    if (summed) out = make_room(sums, empty(x, {0}, acc_type(x.scalar_type())), x.size(0), shape);
    queue.launch(&em_attention_pass_kernel<T, PASS, nj>, x.size(0) * sums.splits, Stage::THREADS,
                 sizeof(Stage), nodes, maps, sums, shape);
  });
  return out;
}

// The sums of z v and of z, z = softmax_k λ(⟨p_k, x⟩ + b_k), which is `kept` or not.
Gathered expectation(const Queue& queue, const Tensor& x, const Tensor& p, const MaybeTensor& b,
                     const MaybeTensor& lam, const Tensor& v, const Tensor& z, bool kept) {
  if (!in_one_kernel(x, p.size(1))) {
    responsibilities(queue, x, p, b, lam, z);
    return gather_images(queue, z, v, std::nullopt);
  }
  Gathered out;
  by_narrow_storage(x, [&](auto storage) {
    using T = decltype(storage);
    PassMaps<T> maps = {pixel_map<const T>(x), pixel_map<const T>(v), {}, {}, {}};
    if (kept) maps.z = pixel_map<float>(z);
    out = pass<Pass::expectation, T>(queue,
                                     {const_data<float>(p), data<float>(b), data<float>(lam), nullptr,
                                      p.stride(0), 0, nodes_vectorise(p), false},
                                     maps, x, p.size(1), true);
  });
  return out;
}

// dl = z (dz − Σ_k z dz), dz = ⟨da_k, x⟩ + ds_k + dq, and the sums of dl x where they are wanted; z =
// softmax_k λ⟨μ_k, x⟩ is `known` or else made.
std::optional<Gathered> gradient(const Queue& queue, const Tensor& x, const Tensor& mu,
                                 const MaybeTensor& lam, const Tensor& da, const Tensor& ds,
                                 const MaybeTensor& dq, const Tensor& z, bool known, const Tensor& dl,
                                 bool summed) {
  std::optional<Gathered> out;
  if (!in_one_kernel(x, mu.size(1))) {
    if (!known) responsibilities(queue, x, mu, std::nullopt, lam, z);
    assignment_gradient(queue, x, std::nullopt, da, ds, z, dq, dl);
    if (summed) out = gather_images(queue, dl, x, std::nullopt);
    return out;
  }
  by_narrow_storage(x, [&](auto storage) {
    using T = decltype(storage);
    const PixelMap<const T> from = pixel_map<const T>(x);
    PassMaps<T> maps = {from, from, {}, pixel_map<float>(dl), pixel_map<const float>(dq)};
    if (!known) maps.z = pixel_map<float>(z);
    out = pass<Pass::gradient, T>(
        queue,
        {const_data<float>(mu), const_data<float>(ds), data<float>(lam), const_data<float>(da), mu.stride(0),
         da.stride(0), nodes_vectorise(mu), nodes_vectorise(da)},
        maps, x, mu.size(1), summed);
  });
  return out;
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
    const Tensor sum = empty(mu, {B, K, w->size(1)});
    add_parts(queue, gathered, sum);
    sums = empty(mu, {B, K, D}), splits = 1;
    fold<A>(queue, sum, torch::stable::transpose(*w, 0, 1), std::nullopt, sums, std::nullopt);
  }
  const MStep<A> step = {const_data<A>(sums),
                         const_data<A>(gathered.masses),
                         data<A>(b),
                         splits,
                         gathered.splits(),
                         norm,
                         of_nodes<A>(mu),
                         s ? of_nodes<A>(*s) : OfNodes<A>{},
                         r ? of_nodes<A>(*r) : OfNodes<A>{}};
  queue.launch(&em_attention_bases_kernel<A>, B * K, BLOCK, 0, step, int(K), int(D));
}

// A call of the forward: its outputs, and which are of which step.
struct __attribute__((visibility("hidden"))) Forward {
  Tensor x, z, y, m, h, s, r;
  MaybeTensor lam;
  Norm norm;
  int64_t iterations, depth, steps, first;  // E-steps; the first whose bases are in h

  Forward(const Tensor& x, const Tensor& mu, const MaybeTensor& lam, Norm norm, int64_t iterations,
          int64_t depth)
      : x(x), lam(lam), norm(norm), iterations(iterations), depth(std::max<int64_t>(0, depth)) {
    const int64_t B = mu.size(0), K = mu.size(1), D = mu.size(2), kept = std::max<int64_t>(1, depth);
    steps = std::max<int64_t>(1, iterations);
    first = depth < 0 ? steps : steps - kept + (steps <= kept);  // step 0 begins from mu, which is known
    z = map_like(x, K, mu.scalar_type()), y = map_like(x, D, x.scalar_type());
    m = empty(mu, {B, K, D});
    h = empty(mu, depth < 0 ? std::vector<int64_t>{0} : std::vector{B, steps - first, K, D});
    s = empty(mu, {B, this->depth, K}), r = empty(mu, {B, this->depth, K});
    Tensor begin = bases(0);
    torch::stable::copy_(begin, mu);
  }
  // In front of E-step t, and behind the last.
  Tensor bases(int64_t t) const { return t < first || t >= iterations ? m : select(h, 1, t - first); }
  // s or r of its M-step
  MaybeTensor of_step(const Tensor& kept, int64_t t) const {
    const int64_t at = t - iterations + depth;
    return at < 0 ? std::nullopt : MaybeTensor(select(kept, 1, at));
  }
  template <class T>
  Iterations<T> on_device() const {
    using A = acc_t<T>;
    const Course<A> course = {
        mutable_data<A>(m), mutable_data<A>(h), mutable_data<A>(s), mutable_data<A>(r),
        int(iterations),    int(first),         int(depth),         nodes_vectorise(m) && nodes_vectorise(h)};
    return {pixel_map<const T>(x), pixel_map<A>(z), pixel_map<T>(y), data<A>(lam), course, norm, x.size(0)};
  }
};

// All iterations in one launch, by the regime that an image's size and the GPU allow; false: by none.
// - In clusters, where an image's features fit the shared memory of at most 8 blocks: they are read once. 16
//   blocks would need an attribute that not every GPU has, and keep more of its SMs idle than they spare.
// - In a cooperative grid, where the features of the images at hand stay in two thirds of the L2 cache, the
//   rest for sums and maps. Fewer teams than the GPU has blocks for are worse than features out of memory
//   once they are fewer than half: EM is as much computation as it is reading.
template <class T, int NJ>
bool in_one_launch(const Queue& queue, const Forward& call) {
  using Stage = IterationStage<T, NJ>;
  constexpr int THREADS = Stage::Tile::THREADS;
  const NodeShape shape = shape_of(call.x, call.m.size(1));
  Iterations<T> of = call.on_device<T>();
  of.sums = parts_of<typename Stage::Tile, acc_t<T>>(shape.pixels);
  const int splits = of.sums.splits;
  const auto run = [&](auto team, Together together, int64_t teams, size_t shared) {
    team.blocks = splits;
    const Gathered room = make_room(of.sums, call.m, teams, shape);
    queue.launch_together(together, &em_attention_iterations_kernel<T, NJ, decltype(team)>, teams * splits,
                          THREADS, shared, team, of, shape);
    return true;
  };

  const int pixels = std::min(of.sums.pixels, shape.pixels);
  const size_t kept = sizeof(Stage) + KeptFeatures<T>::bytes(pixels, shape.channels);
  if (queue.has_clusters(&em_attention_iterations_kernel<T, NJ, ClusterTeam>, splits, THREADS, kept))
    return run(ClusterTeam(), {splits}, of.images, kept);

  const int64_t bytes = int64_t(shape.pixels) * shape.channels * sizeof(T);
  const int64_t cached = queue.attribute(cudaDevAttrL2CacheSize) / 3 * 2 / bytes;
  const int64_t blocks =
      queue.most_together(&em_attention_iterations_kernel<T, NJ, GridTeam>, THREADS, sizeof(Stage));
  const int64_t busy = std::min(of.images, blocks / splits), teams = std::min(busy, cached);
  if (teams == 0 || 2 * teams < busy) return false;
  Tensor arrived = empty(call.m, {teams}, ScalarType::Int);
  torch::stable::zero_(arrived);
  const GridTeam team = {{}, reinterpret_cast<unsigned*>(mutable_data<int32_t>(arrived))};
  return run(team, {0, true}, teams, sizeof(Stage));
}

using Three = std::tuple<Tensor, Tensor, Tensor>;
using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

void check(const Tensor& x, const Tensor& mu, int64_t channels) {
  STD_TORCH_CHECK(x.dim() == 4 && mu.dim() == 3 && mu.size(0) == x.size(0) && mu.size(2) == channels &&
                      mu.scalar_type() == acc_type(x.scalar_type()),
                  "segkernels: x [B, C, H, W] and mu [B, K, D] of the accumulation type do not fit");
}

// A launch for each pass and M-step, and one for the reconstruction; w [D, C] and b [D] may be folded in.
void launch_by_launch(const Queue& queue, const Forward& of, const MaybeTensor& w, const MaybeTensor& b) {
  const int64_t B = of.m.size(0), K = of.m.size(1);
  by_storage(of.x, [&](auto storage) {
    using A = acc_t<decltype(storage)>;
    for (int64_t t = 0; t < of.steps; ++t) {
      Tensor p = of.bases(t);
      MaybeTensor bias;
      if (w) {
        const Tensor unfolded = p;
        p = empty(of.m, {B, K, w->size(1)});
        if (b) bias = empty(of.m, {B, K});
        fold<A>(queue, unfolded, *w, b, p, bias);
      }
      if (of.iterations == 0) {
        responsibilities(queue, of.x, p, bias, of.lam, of.z);
        break;
      }
      const Gathered gathered = expectation(queue, of.x, p, bias, of.lam, of.x, of.z, t + 1 == of.iterations);
      bases<A>(queue, gathered, w, b, of.norm, of.bases(t + 1), of.of_step(of.s, t), of.of_step(of.r, t));
    }
  });
  reconstruction(queue, of.m, of.z, of.y);
}

Six em_attention(Tensor x, Tensor mu, MaybeTensor lam, MaybeTensor w, MaybeTensor b, int64_t iterations,
                 int64_t depth, bool clamp, bool assignment) {
  const Queue queue(x);
  STD_TORCH_CHECK(!w || (w->dim() == 2 && w->size(1) == x.size(1) && depth < 0),
                  "segkernels: w must be [D, C], without gradients");
  check(x, mu, w ? w->size(0) : x.size(1));
  if (b) b = dense(*b);
  const Forward of(x, mu, lam, {clamp}, iterations, depth);
  bool done = false;
  if (in_one_kernel(x, mu.size(1)) && !w && iterations > 0 && x.numel() > 0)
    by_narrow_storage(x, [&](auto storage) {
      using T = decltype(storage);
      by_bases<T>(mu.size(1), [&](auto nj) { done = in_one_launch<T, nj>(queue, of); });
    });
  if (!done) launch_by_launch(queue, of, w, b);
  return {of.y, assignment ? of.z : empty(mu, {0}), of.m, of.h, of.s, of.r};
}

// dx = Σ_t z_t da_t + dl_t λμ is one product, of maps [B, P, H, W] with nodes [B, P, C]; here are their parts
// of K. With constant bases (`depth` 0) it has dl alone. Where dx is not wanted the steps share their maps.
struct __attribute__((visibility("hidden"))) Products {
  int64_t K, each;
  bool wanted;
  Tensor maps, nodes, constant;

  Products(const Tensor& x, const Tensor& m, int64_t steps, int64_t depth, bool wanted)
      : K(m.size(1)),
        each(depth ? 2 : 1),
        wanted(wanted),
        maps(map_like(x, (wanted ? steps : 1) * each * K, m.scalar_type())),
        nodes(empty(m, {m.size(0), steps * each * K, m.size(2)})),
        constant(depth ? maps : map_like(x, K, m.scalar_type())) {}
  int64_t step(int64_t t) const { return wanted ? t * each : 0; }
  Tensor z(int64_t t) const { return each == 2 ? part(maps, step(t) * K, K) : constant; }
  Tensor dl(int64_t t) const { return part(maps, (step(t) + each - 1) * K, K); }
  Tensor da(int64_t t) const { return part(nodes, t * each * K, K); }
  Tensor slope(int64_t t) const { return part(nodes, (t * each + each - 1) * K, K); }
};

Three em_attention_backward(MaybeTensor dy, MaybeTensor dz, MaybeTensor dm, Tensor x, Tensor mu, Tensor m,
                            Tensor h, Tensor s, Tensor r, MaybeTensor lam, int64_t depth, bool clamp,
                            Ints need) {
  const Queue queue(x);
  check(x, m, x.size(1));
  STD_TORCH_CHECK(need.size() == 3 && depth >= 0, "segkernels: need must have 3 elements, depth be >= 0");
  mu = dense(mu), m = dense(m), h = dense(h), s = dense(s), r = dense(r);
  if (dm) dm = dense(*dm);
  const int64_t B = m.size(0), K = m.size(1), C = m.size(2), last = std::max<int64_t>(1, depth) - 1;
  const auto before = [&](int64_t t) {  // the bases in front of step t
    const int64_t given = last + 1 - h.size(1);
    return t < given ? mu : select(h, 1, t - given);
  };
  const Products of(x, m, last + 1, depth, need[0]);
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
    const bool known = dy && (depth || need[1]);
    if (depth || need[1]) {
      BasesGradient<A> g = {};
      std::optional<Gathered> gathered;
      if (dy) gathered = expectation(queue, x, before(last), std::nullopt, lam, *dy, of.z(last), true);
      if (gathered) g.sums = const_data<A>(gathered->sums), g.splits = gathered->splits();
      g.addend = data<A>(dm);
      bases_gradient(g, m, last + 1);
    }
    if (depth && dy) dz = assignment_cotangent(queue, *dy, m, dz);
    for (int64_t t = last; t >= 0; --t) {
      const Tensor mu = before(t), z = of.z(t), dl = of.dl(t);
      const bool summed = t > 0 || need[1] || need[2];
      std::optional<Gathered> gathered;
      if (depth) {
        gathered = gradient(queue, x, mu, lam, of.da(t), ds, t == last ? dz : std::nullopt, z,
                            t == last && known, dl, summed);
      } else {  // dz is of y alone, and without dy of a map of no channels
        if (!known) responsibilities(queue, x, mu, std::nullopt, lam, z);
        assignment_gradient(queue, dy ? *dy : part(z, 0, 0), std::nullopt, m, std::nullopt, z, dz, dl);
        if (summed) gathered = gather_images(queue, dl, x, std::nullopt);
      }
      BasesGradient<A> g = {};
      if (summed) g.sums = const_data<A>(gathered->sums), g.splits = gathered->splits();
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
