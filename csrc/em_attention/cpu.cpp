// z = softmax_k(λ ⟨x, μ⟩) and μ = Σ z x / d, T times over; y = Σ_k z μ_k; and their gradients, on the CPU.

#include "common/scratch.h"
#include "common/tensor.h"
#include "em_attention/call.h"

#define SEGKERNELS_KERNELS "em_attention/cpu_kernels.h"
#include "common/foreach_isa.h"

namespace segkernels {
namespace {

using namespace em;
using Optional = std::optional<Tensor>;
using Ints = std::vector<int64_t>;

template <class T>
PixelMap<T> pixel_map(const Tensor& t) {
  if constexpr (std::is_const_v<T>)
    return {const_data<std::remove_const_t<T>>(t), pixels_of(t)};
  else
    return {mutable_data<T>(t), pixels_of(t)};
}

// Memory of a call, zeroed (tables are zero beyond bases and channels), on cache lines.
struct Memory {
  std::vector<std::vector<char>> parts;

  template <class A>
  A* take(int64_t n) {
    char* p = parts.emplace_back(n * sizeof(A) + 64).data();
    return reinterpret_cast<A*>(p + (64 - reinterpret_cast<uintptr_t>(p) % 64));
  }
  template <class A>
  Table<A> tables(A* rows, int64_t number, int64_t bytes) {
    bytes = round_up(bytes, 64);
    return {rows, take<char>(number * bytes), bytes};
  }
};

// sums: how many bases the parts of an image keep sums of. What these take in memory limits the parts, which
// are few also because a part begins with sums that are in no cache.
Sizes sizes_of(const Tensor& x, const Tensor& mu, int64_t sums) {
  const Pixels p = pixels_of(x);
  return {p.B, p.N, p.C, mu.size(2), mu.size(1), parts_of(ceil_div(p.N, kBlock), p.N, 2 * sums)};
}
int64_t cost(const Sizes& s, int64_t products) { return 2 * products * s.N * s.C * s.K / s.splits; }

// f(image, base) over all bases; cost: about the operations of one.
template <class F>
void over_bases(const Sizes& s, int64_t cost, const F& f) {
  parallel_for(s.B * s.K, cost, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) f(i / s.K, i % s.K);
  });
}
// The rows of each image as a table, `at` of the `per` that the image has.
template <class A>
void pack_summed(const Sizes& s, int64_t channels, const Table<A>& to, int64_t at = 0, int64_t per = 1) {
  parallel_for(s.B, s.columns() * channels, [&](int64_t first, int64_t last) {
    SEGKERNELS_BY_ISA(for (int64_t i = first; i < last; ++i)
                          simd::pack_summed(s, channels, to.rows, i, to[i * per + at]))
  });
}
template <class A>
void pack_made(const Sizes& s, int64_t channels, const Table<A>& to, int64_t at = 0, int64_t per = 1) {
  parallel_for(s.B, s.columns() * channels, [&](int64_t first, int64_t last) {
    SEGKERNELS_BY_ISA(for (int64_t i = first; i < last; ++i)
                          simd::pack_made(s, channels, to.rows, i, to[i * per + at]))
  });
}

template <class T>
acc_t<T> temperature(const Optional& lam) {
  return lam ? *const_data<acc_t<T>>(*lam) : acc_t<T>(1);
}
// −∞ beyond K
template <class A>
void fill_bias(A* bias, int64_t images, const Sizes& s) {
  for (int64_t i = 0; i < images; ++i)
    std::fill(bias + i * s.columns() + s.K, bias + (i + 1) * s.columns(),
              -std::numeric_limits<A>::infinity());
}

void check(const Tensor& x, const Tensor& mu, const Optional& lam, const Optional& w, const Optional& b) {
  const Map map = map_of(x);
  const ScalarType wide = acc_type(x.scalar_type());
  STD_TORCH_CHECK(mu.dim() == 3 && mu.size(0) == map.B && mu.size(1) > 0 && mu.size(2) > 0 &&
                      (w || mu.size(2) == map.C) && mu.scalar_type() == wide,
                  "em_attention: mu must be [B, K, C] of the accumulation type of x");
  STD_TORCH_CHECK(!lam || (lam->numel() == 1 && lam->scalar_type() == wide),
                  "em_attention: lam must be one number of the accumulation type of x");
  STD_TORCH_CHECK(
      !w || (w->dim() == 2 && w->size(0) == mu.size(2) && w->size(1) == map.C && w->scalar_type() == wide),
      "em_attention: w must be [D, C] of the accumulation type of x");
  STD_TORCH_CHECK(!b || (w && b->numel() == mu.size(2) && b->scalar_type() == wide),
                  "em_attention: b must be [D], with w, of the accumulation type of x");
}

// -- forward ------------------------------------------------------------------------------------------

template <class T>
struct Fitting {
  using A = acc_t<T>;
  Forward<T> call{};
  Memory memory;

  Fitting(const Tensor& x, const Tensor& mu, const Optional& w, const Optional& b) {
    call.sizes = sizes_of(x, mu, mu.size(1));
    call.x = pixel_map<const T>(x);
    call.w = w ? const_data<A>(*w) : nullptr;
    call.b = b ? const_data<A>(*b) : nullptr;
    const Sizes& s = call.sizes;
    const int64_t rows = s.B * s.columns();
    int64_t scores_bytes = 0, mixture_bytes = 0;
    SEGKERNELS_BY_ISA(scores_bytes = simd::Fma<A>::right_bytes(s.C, s.columns());
                      mixture_bytes = simd::Fma<A>::right_bytes(s.columns(), s.D))
    call.scores = memory.tables(memory.take<A>(rows * row_step(s.C)), s.B, scores_bytes);
    call.mixture = memory.tables(memory.take<A>(rows * row_step(s.D)), s.B, mixture_bytes);
    call.heated = w ? memory.take<A>(rows * row_step(s.D)) : call.scores.rows;
    call.a = memory.take<A>(rows * row_step(s.C));
    call.folded = w ? memory.take<A>(rows * row_step(s.D)) : call.a;
    call.bias = memory.take<A>(rows);
    fill_bias(call.bias, s.B, s);
    call.mass = memory.take<A>(rows);
  }

  template <class F>
  void rows(const F& f) const {
    over_bases(call.sizes, 8 * call.sizes.D, f);
  }
  // The E-step's table from m.
  void heat() {
    const Sizes& s = call.sizes;
    rows([&](int64_t image, int64_t k) { SEGKERNELS_BY_ISA(simd::heat_row(call, image, k)) });
    if (call.w)
      parallel_for(s.B * ceil_div(s.C, 32), s.K * s.D * 64, [&](int64_t first, int64_t last) {
        SEGKERNELS_BY_ISA(
            simd::convolve<A>(s, s.D, s.C, call.heated, {call.w, s.C, 1}, call.scores.rows, first, last))
      });
    pack_summed(s, s.C, call.scores);
  }
  void expect() {
    const Sizes& s = call.sizes;
    parallel_for(s.parts(), cost(s, 2),
                 [&](int64_t first, int64_t last) { SEGKERNELS_BY_ISA(simd::expect(call, first, last)) });
  }
  void fit() {
    const Sizes& s = call.sizes;
    rows([&](int64_t image, int64_t k) {
      SEGKERNELS_BY_ISA(simd::gather_row(call, image, k); if (!call.w) simd::fit_row(call, image, k))
    });
    if (!call.w) return;
    parallel_for(s.B * ceil_div(s.D, 32), s.K * s.C * 64, [&](int64_t first, int64_t last) {
      SEGKERNELS_BY_ISA(simd::convolve<A>(s, s.C, s.D, call.a, {call.w, 1, s.C}, call.folded, first, last))
    });
    rows([&](int64_t image, int64_t k) { SEGKERNELS_BY_ISA(simd::fit_row(call, image, k)) });
  }
  void reconstruct() {
    const Sizes& s = call.sizes;
    rows([&](int64_t image, int64_t k) {
      std::copy_n(call.m + (image * s.K + k) * s.D, s.D,
                  call.mixture.rows + (image * s.columns() + k) * row_step(s.D));
    });
    pack_made(s, s.D, call.mixture);
    parallel_for(s.B * s.blocks(), 2 * kBlock * s.K * s.D, [&](int64_t first, int64_t last) {
      SEGKERNELS_BY_ISA(simd::reconstruct(call, first, last))
    });
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> em_attention(Tensor x, Tensor mu, Optional lam,
                                                                        Optional w, Optional b,
                                                                        int64_t iterations, int64_t depth,
                                                                        bool clamp, bool assignment) {
  check(x, mu, lam, w, b);
  const bool channels_last = is_channels_last(map_of(x));
  x = as_pixels(x), mu = dense(mu);
  if (w) w = dense(*w);
  if (b) b = dense(*b);
  const Map map = map_of(x);
  const int64_t K = mu.size(1), D = mu.size(2), kept = std::max<int64_t>(0, depth),
                steps = std::max<int64_t>(1, depth), given = iterations <= steps;  // begins from mu
  STD_TORCH_CHECK(iterations >= 0 && depth <= iterations && depth >= -1, "em_attention: depth ", depth,
                  " of ", iterations, " iterations");
  const Tensor y = empty_map(x, {map.B, D, map.H, map.W}, channels_last), m = torch::stable::clone(mu),
               z = assignment ? empty_map(mu, {map.B, K, map.H, map.W}, channels_last) : empty(mu, {0}),
               h = empty(mu, depth < 0 ? Ints{0} : Ints{map.B, steps - given, K, D}),
               s = empty(mu, {map.B, kept, K}), r = empty(mu, {map.B, kept, K});
  if (x.numel() == 0) {
    for (Tensor t : {y, z, h, s, r}) torch::stable::zero_(t);
    if (Tensor fitted = m; iterations > 0) torch::stable::zero_(fitted);
    return {y, z, m, h, s, r};
  }
  by_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    Fitting<T> fitting(x, mu, w, b);
    Forward<T>& call = fitting.call;
    const Sizes& size = call.sizes;
    call.lam = temperature<T>(lam);
    call.clamp = clamp;
    call.depth = kept;
    call.y = pixel_map<T>(y);
    if (assignment) call.z = pixel_map<A>(z);
    call.m = mutable_data<A>(m);
    const Tensor sums = empty(mu, {iterations ? size.parts() * (size.sum_size() + size.columns()) : 0}),
                 responsibilities = empty(mu, {size.B * size.N * size.step()});
    call.sums = mutable_data<A>(sums);
    call.masses = call.sums + size.parts() * size.sum_size();
    call.responsibilities = mutable_data<A>(responsibilities);
    call.sums_wanted = iterations > 0;
    const int64_t passes = std::max<int64_t>(1, iterations);
    for (int64_t t = 0; t < passes; ++t) {
      call.last = t == passes - 1;
      const int64_t between = t - (passes - steps) - given, moment = t - (iterations - kept);
      if (depth >= 0 && between >= 0)
        for (int64_t image = 0; image < map.B; ++image)
          std::copy_n(call.m + image * K * D, K * D,
                      mutable_data<A>(h) + (image * (steps - given) + between) * K * D);
      call.s = kept && moment >= 0 ? mutable_data<A>(s) + moment * K : nullptr;
      call.r = kept && moment >= 0 ? mutable_data<A>(r) + moment * K : nullptr;
      fitting.heat();
      fitting.expect();
      if (call.sums_wanted) fitting.fit();
    }
    fitting.reconstruct();
  });
  return {y, z, m, h, s, r};
}

// -- backward -----------------------------------------------------------------------------------------

template <class T>
struct Differentiating {
  using A = acc_t<T>;
  Backward<T> call{};
  Memory memory;
  std::vector<double> dlam;

  Differentiating(const Tensor& x, const Tensor& m, int64_t depth) {
    call.sizes = sizes_of(x, m, 2 * m.size(1));
    call.depth = depth;
    call.steps = std::max<int64_t>(1, depth);
    const Sizes& s = call.sizes;
    int64_t summed = 0, made = 0;
    SEGKERNELS_BY_ISA(summed = simd::Fma<A>::right_bytes(s.C, s.columns());
                      made = simd::Fma<A>::right_bytes(s.columns(), s.C))
    A* rows = memory.take<A>(s.B * s.columns() * row_step(s.C));
    call.given = memory.tables(rows, s.B, summed);
    call.scores = memory.tables(rows, s.B * call.steps, summed);
    call.through_dl = memory.tables(rows, s.B * call.steps, made);
    call.through_z = memory.tables(rows, s.B * depth, made);
    call.bias = memory.take<A>(s.columns());
    fill_bias(call.bias, 1, s);
    call.shift = memory.take<A>(s.B * s.columns());
    dlam.resize(s.B * s.K);
    call.dlam = dlam.data();
  }

  template <class F>
  void rows(const F& f) const {
    over_bases(call.sizes, 16 * call.sizes.C, f);
  }

  void run() {
    const Sizes& s = call.sizes;
    const int64_t depth = call.depth;
    for (int64_t step = 0; step < call.steps; ++step) {
      rows([&](int64_t image, int64_t k) { SEGKERNELS_BY_ISA(simd::heat_row(call, image, step, k)) });
      pack_summed(s, s.C, call.scores, step, call.steps);
      if (call.dx.data) pack_made(s, s.C, call.through_dl, step, call.steps);
    }
    rows([&](int64_t image, int64_t k) { SEGKERNELS_BY_ISA(simd::last_row(call, image, k)) });
    pack_summed(s, s.C, call.given);
    parallel_for(s.parts(), cost(s, 3), [&](int64_t first, int64_t last) {
      SEGKERNELS_BY_ISA(simd::sweep_reconstruction(call, first, last))
    });
    if (depth > 0 || call.want_bases)
      rows([&](int64_t image, int64_t k) { SEGKERNELS_BY_ISA(simd::fitted_row(call, image, k)) });
    for (int64_t step = depth - 1; step >= 0; --step) {
      rows([&](int64_t image, int64_t k) { SEGKERNELS_BY_ISA(simd::divide_row(call, image, step, k)) });
      pack_summed(s, s.C, call.given);
      if (call.dx.data) pack_made(s, s.C, call.through_z, step, call.steps);
      parallel_for(s.parts(), cost(s, 3), [&](int64_t first, int64_t last) {
        SEGKERNELS_BY_ISA(simd::sweep_iteration(call, step, first, last))
      });
      if (step > 0)
        rows([&](int64_t image, int64_t k) {
          SEGKERNELS_BY_ISA(simd::scored_row(call, image, step, k, false))
        });
    }
    if (call.want_u)
      rows([&](int64_t image, int64_t k) {
        SEGKERNELS_BY_ISA(simd::scored_row(call, image, int64_t(0), k, depth == 0 && call.want_bases))
      });
  }
};

std::tuple<Tensor, Tensor, Tensor> em_attention_backward(Optional dy, Optional dz, Optional dm, Tensor x,
                                                         Tensor mu, Tensor m, Tensor h, Tensor s, Tensor r,
                                                         Optional lam, int64_t depth, bool clamp, Ints need) {
  check(x, mu, lam, std::nullopt, std::nullopt);
  check(x, m, lam, std::nullopt, std::nullopt);
  STD_TORCH_CHECK(need.size() == 3 && depth >= 0,
                  "em_attention_backward: need has 3 numbers, depth is 0 or more");
  const bool channels_last = is_channels_last(map_of(x));
  x = as_pixels(x), mu = dense(mu), m = dense(m), h = dense(h), s = dense(s), r = dense(r);
  const Map map = map_of(x);
  const int64_t K = m.size(1), steps = std::max<int64_t>(1, depth),
                given = steps - (h.dim() == 4 ? h.size(1) : 0);
  STD_TORCH_CHECK(
      (given == 0 || given == 1) && mu.size(1) == K && h.numel() == map.B * (steps - given) * K * map.C &&
          s.numel() == map.B * depth * K && r.numel() == s.numel() && h.scalar_type() == m.scalar_type() &&
          s.scalar_type() == m.scalar_type() && r.scalar_type() == m.scalar_type(),
      "em_attention_backward: h must be [B, steps or one less, K, C], mu as m, s and r [B, depth, K], of "
      "the type of m");
  const Ints none{0};
  const Tensor dx = need[0] ? empty_map(x, {map.B, map.C, map.H, map.W}, channels_last) : empty(x, none),
               dmu = empty(m, {map.B, K, map.C}), dlam = empty(m, need[2] ? Ints{} : none);
  if (x.numel() == 0) {
    for (Tensor t : {dx, dmu, dlam}) torch::stable::zero_(t);
    if (Tensor kept = dmu; dm && depth == 0) torch::stable::copy_(kept, *dm);
    return {dx, need[1] ? dmu : empty(m, none), dlam};
  }
  by_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    Differentiating<T> part(x, m, depth);
    Backward<T>& call = part.call;
    const Sizes& size = call.sizes;
    call.x = pixel_map<const T>(x);
    if (dy) {
      dy = as_pixels(*dy);
      call.dy = pixel_map<const T>(*dy);
      STD_TORCH_CHECK(call.dy.at.B == size.B && call.dy.at.C == size.C && call.dy.at.N == size.N &&
                          dy->scalar_type() == x.scalar_type(),
                      "em_attention_backward: dy must be as x");
    }
    if (dz) {
      dz = as_pixels(*dz);
      call.dz = pixel_map<const A>(*dz);
      STD_TORCH_CHECK(call.dz.at.B == size.B && call.dz.at.C == K && call.dz.at.N == size.N &&
                          dz->scalar_type() == m.scalar_type(),
                      "em_attention_backward: dz must be [B, K, H, W] of the type of m");
    }
    if (dm) {
      dm = dense(*dm);
      call.dm = const_data<A>(*dm);
      STD_TORCH_CHECK(dm->numel() == m.numel() && dm->scalar_type() == m.scalar_type(),
                      "em_attention_backward: dm must be as m");
    }
    if (need[0]) call.dx = pixel_map<T>(dx);
    call.before = {const_data<A>(mu), const_data<A>(h), steps, given, K * map.C};
    call.m = const_data<A>(m);
    call.s = const_data<A>(s), call.r = const_data<A>(r);
    call.lam = temperature<T>(lam);
    call.clamp = clamp;
    call.want_bases = need[1];
    call.want_u = need[1] || need[2];
    const int64_t sum = size.parts() * size.sum_size();
    const Tensor sums = empty(m, {depth > 0 ? sum : 2 * sum}),
                 stash = empty(m, {depth > 0 ? size.B * size.N * call.kept().size() * size.columns() : 0});
    call.fitted = mutable_data<A>(sums);
    call.u = depth > 0 ? call.fitted : call.fitted + sum;
    call.stash = mutable_data<A>(stash);
    call.dmu = mutable_data<A>(dmu);
    part.run();
    if (!need[2]) return;
    double total = 0;
    for (const double share : part.dlam) total += share;
    *mutable_data<A>(dlam) = A(total);
  });
  return {dx, need[1] ? dmu : empty(m, none), dlam};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(segkernels, CPU, m) {
  m.impl("em_attention", TORCH_BOX(&em_attention));
  m.impl("em_attention_backward", TORCH_BOX(&em_attention_backward));
}

}  // namespace segkernels
