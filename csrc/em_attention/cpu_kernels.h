// E-steps, M-steps and the reconstruction over blocks of pixels. Compiled once per instruction set (no include
// guard).

#include "common/assignment_kernels.h"
#include "common/gemm.h"

namespace segkernels {
namespace {
namespace SEGKERNELS_ISA {

using namespace em;

// -- rows of responsibilities -------------------------------------------------------------------------

// z[t][k] = softmax over k of scores[t][k] + bias[k].
template <class A>
void responsibilities(int64_t pixels, int64_t columns, Rows<const A> scores, const A* bias, Rows<A> z) {
  constexpr int64_t lanes = Vec<A>::lanes;
  for (int64_t t = 0; t < pixels; t += lanes) {
    const int64_t n = std::min(lanes, pixels - t);
    Vec<A> reduced[lanes];
    A most[lanes], scale[lanes];
    for (int64_t i = 0; i < lanes; ++i) reduced[i] = splat(-std::numeric_limits<A>::infinity());
    for (int64_t i = 0; i < n; ++i)
      for (int64_t k = 0; k < columns; k += lanes)
        reduced[i] = max(load(scores[t + i] + k) + load(bias + k), reduced[i]);
    store(most, maxima(reduced));
    for (int64_t i = 0; i < lanes; ++i) reduced[i] = splat(A(1));
    for (int64_t i = 0; i < n; ++i) {
      Vec<A> total = splat(A(0));
      for (int64_t k = 0; k < columns; k += lanes) {
        const Vec<A> e = exp_of_negative(load(scores[t + i] + k) + load(bias + k) - splat(most[i]));
        store(z[t + i] + k, e);
        total = total + e;
      }
      reduced[i] = total;
    }
    store(scale, Vec<A>{splat(A(1)).v / sums(reduced).v});
    for (int64_t i = 0; i < n; ++i)
      for (int64_t k = 0; k < columns; k += lanes)
        store(z[t + i] + k, load(static_cast<const A*>(z[t + i]) + k) * splat(scale[i]));
  }
}

// In place: dl[t][k] = z (dl − Σ_k z dl).
template <class A>
void slopes(int64_t pixels, int64_t columns, Rows<const A> z, Rows<A> dl) {
  constexpr int64_t lanes = Vec<A>::lanes;
  for (int64_t t = 0; t < pixels; t += lanes) {
    const int64_t n = std::min(lanes, pixels - t);
    Vec<A> reduced[lanes];
    A mean[lanes];
    for (int64_t i = 0; i < lanes; ++i) reduced[i] = splat(A(0));
    for (int64_t i = 0; i < n; ++i)
      for (int64_t k = 0; k < columns; k += lanes)
        reduced[i] = fma(load(z[t + i] + k), load<A>(dl[t + i] + k), reduced[i]);
    store(mean, sums(reduced));
    for (int64_t i = 0; i < n; ++i)
      for (int64_t k = 0; k < columns; k += lanes)
        store(dl[t + i] + k, load(z[t + i] + k) * (load<A>(dl[t + i] + k) - splat(mean[i])));
  }
}

// out[t][k] = scores + shift_k (+ more, where kMore)
template <bool kMore, class A>
void add_scores(int64_t pixels, int64_t columns, Rows<const A> scores, const A* shift, Rows<A> more, Rows<A> out) {
  for (int64_t t = 0; t < pixels; ++t)
    for (int64_t k = 0; k < columns; k += Vec<A>::lanes) {
      Vec<A> g = load(scores[t] + k) + load(shift + k);
      if constexpr (kMore) g = g + load<A>(more[t] + k);
      store(out[t] + k, g);
    }
}

// total[k] += Σ_t rows[t][k]
template <class A>
void add_rows(int64_t pixels, int64_t columns, Rows<const A> rows, A* total) {
  for (int64_t k = 0; k < columns; k += Vec<A>::lanes) {
    Vec<A> s = load(total + k);
    for (int64_t t = 0; t < pixels; ++t) s = s + load(rows[t] + k);
    store(total + k, s);
  }
}

// -- products of a block ------------------------------------------------------------------------------

// A thread's memory, and products with it; T: of the maps, E: what multiplies.
template <class E, class T>
struct Block {
  using A = acc_t<T>;
  const Sizes& s;
  char *left, *right;
  Rows<A> x, scores, z, out;
  [[maybe_unused]] typename E::Session session;

  static int64_t widest(const Sizes& s) { return std::max(s.C, s.D); }
  static int64_t left_bytes(const Sizes& s, int64_t inner) {
    return std::max(E::left_bytes(kBlock, std::max(widest(s), inner)), E::left_bytes(s.K, kBlock));
  }
  // inner: of the longest row of responsibilities
  static int64_t bytes(const Sizes& s, int64_t inner) {
    return left_bytes(s, inner) + E::right_bytes(kBlock, widest(s)) + 512 +
           kBlock * (2 * row_step(widest(s)) + row_step(s.K) + s.columns()) * int64_t(sizeof(A));
  }
  Block(const Sizes& sizes, int64_t inner, Scratch& memory)
      : s(sizes),
        left(memory.take<char>(left_bytes(s, inner))),
        right(memory.take<char>(E::right_bytes(kBlock, widest(s)))),
        x{memory.take<A>(kBlock * row_step(widest(s))), row_step(widest(s))},
        scores{memory.take<A>(kBlock * row_step(s.K)), row_step(s.K)},
        z{memory.take<A>(kBlock * s.columns()), s.columns()},
        out{memory.take<A>(kBlock * row_step(widest(s))), row_step(widest(s))} {}

  static Rows<const A> read(Rows<A> r) { return {r.p, r.step}; }

  // rows[t][channel] of a map
  template <class S>
  int64_t load_map(const PixelMap<S>& map, int64_t image, int64_t block, Rows<A> rows) const {
    load_block(map.block(image, block), map.at, s.pixels(block), static_cast<const A*>(nullptr), rows);
    return s.pixels(block);
  }
  // result[t][·] = rows[t][·] · table, n of them, k summed
  void multiply(int64_t pixels, int64_t n, int64_t k, Rows<A> rows, const char* table, Rows<A> result) const {
    E::multiply(pixels, n, k, E::left({rows.p, rows.step, 1}, pixels, k, left), E::right_at(table, k), result.p,
                result.step, false);
  }
  // sums[k][c] += Σ_t q[t][k] rows[t][c]
  void sum(int64_t pixels, Rows<A> q, Rows<A> rows, int64_t channels, A* sums) const {
    E::multiply(s.K, channels, pixels, E::left({q.p, 1, q.step}, s.K, pixels, left),
                E::right({rows.p, rows.step, 1}, pixels, channels, right), sums, row_step(channels), true);
  }
  // A block of a map = rows · table, in place where the map has room for all that is written.
  template <class S>
  void mix(int64_t image, int64_t block, int64_t k, Rows<A> rows, const char* table, const PixelMap<S>& map) const {
    const int64_t pixels = s.pixels(block), channels = map.at.C;
    if constexpr (std::is_same_v<S, A>)
      if (map.at.channel == 1 && channels % kTile == 0 && pixels == kBlock)
        return multiply(pixels, channels, k, rows, table, {map.block(image, block), map.at.pixel});
    multiply(pixels, channels, k, rows, table, out);
    store_block(read(out), pixels, map.block(image, block), map.at);
  }
};

// -- forward ------------------------------------------------------------------------------------------

// z, the masses and sums of the parts [first, last).
template <class E, class T>
void expect(const Forward<T>& call, int64_t first, int64_t last) {
  using A = acc_t<T>;
  const Sizes& s = call.sizes;
  Scratch memory(Block<E, T>::bytes(s, s.columns()));
  const Block<E, T> b(s, s.columns(), memory);
  const int64_t columns = s.columns(), size = columns * row_step(s.C);
  for (int64_t part = first; part < last; ++part) {
    const int64_t image = part / s.splits;
    A *masses = call.masses + part * columns, *sums = call.sums + part * size;
    if (call.sums_wanted) {
      std::fill_n(masses, columns, A(0));
      std::fill_n(sums, size, A(0));
    }
    for (int64_t block = s.first_block(part); block < s.last_block(part); ++block) {
      const int64_t pixels = b.load_map(call.x, image, block, b.x);
      const Rows<A> z =
          call.last ? Rows<A>{call.responsibilities + (image * s.N + block * kBlock) * columns, columns} : b.z;
      b.multiply(pixels, columns, s.C, b.x, call.scores[image], b.scores);
      responsibilities(pixels, columns, b.read(b.scores), call.bias + image * columns, z);
      if (call.last && call.z.data)
        store_block(b.read(z), pixels, call.z.block(image, block), call.z.at);
      if (!call.sums_wanted) continue;
      add_rows(pixels, columns, b.read(z), masses);
      b.sum(pixels, z, b.x, s.C, sums);
    }
  }
}

// y of the blocks [first, last).
template <class E, class T>
void reconstruct(const Forward<T>& call, int64_t first, int64_t last) {
  using A = acc_t<T>;
  const Sizes& s = call.sizes;
  Scratch memory(Block<E, T>::bytes(s, s.columns()));
  const Block<E, T> b(s, s.columns(), memory);
  for (int64_t i = first; i < last; ++i) {
    const int64_t image = i / s.blocks(), block = i % s.blocks();
    A* z = call.responsibilities + (image * s.N + block * kBlock) * s.columns();
    b.mix(image, block, s.columns(), Rows<A>{z, s.columns()}, call.mixture[image], call.y);
  }
}

// -- bases, row by row of [B][K] -----------------------------------------------------------------------

// a and the mass out of the parts'.
template <class T>
void gather_row(const Forward<T>& call, int64_t image, int64_t k) {
  const Sizes& s = call.sizes;
  const int64_t at = image * s.columns() + k;
  call.mass[at] = sum_parts(call.masses, s.splits, s.columns(), image, k);
  sum_parts(call.sums, s.splits, s.columns(), row_step(s.C), image, k, call.a + at * row_step(s.C));
}

// μ = a / d.
template <class T>
void fit_row(const Forward<T>& call, int64_t image, int64_t k) {
  using A = acc_t<T>;
  const Sizes& s = call.sizes;
  const int64_t at = image * s.columns() + k;
  const A mass = call.mass[at];
  A* a = call.folded + at * row_step(s.D);
  for (int64_t d = 0; call.b && d < s.D; ++d) a[d] += mass * call.b[d];
  std::fill(a + s.D, a + round_up(s.D, Vec<A>::lanes), A(0));
  const A length = std::sqrt(dot(round_up(s.D, Vec<A>::lanes), a, a));
  const A divisor = Divisor<A>(length, mass, call.clamp).d;
  A* mu = call.m + (image * s.K + k) * s.D;
  for (int64_t d = 0; d < s.D; ++d) mu[d] = a[d] / divisor;
  if (!call.r) return;
  call.s[image * call.depth * s.K + k] = mass;
  call.r[image * call.depth * s.K + k] = length;
}

// λμ, of the next E-step's scores, and what the convolution's bias adds to them.
template <class T>
void heat_row(const Forward<T>& call, int64_t image, int64_t k) {
  using A = acc_t<T>;
  const Sizes& s = call.sizes;
  const int64_t at = image * s.columns() + k;
  const A* mu = call.m + (image * s.K + k) * s.D;
  A *heated = call.heated + at * row_step(s.D), bias = 0;
  for (int64_t d = 0; d < s.D; ++d) heated[d] = call.lam * mu[d];
  for (int64_t d = 0; call.b && d < s.D; ++d) bias += heated[d] * call.b[d];
  call.bias[at] = bias;
}

// The convolution of what was summed: folded = a wᵀ, kTile of D at a time; items are [B][tiles].
template <class T>
void convolve_sums(const Forward<T>& call, int64_t first, int64_t last) {
  using A = acc_t<T>;
  const Sizes& s = call.sizes;
  Scratch memory(Fma<A>::right_bytes(s.C, kTile) + 64);
  char* scratch = memory.take<char>(Fma<A>::right_bytes(s.C, kTile));
  const int64_t tiles = ceil_div(s.D, kTile), columns = s.columns();
  for (int64_t i = first; i < last; ++i) {
    const int64_t image = i / tiles, d = i % tiles * kTile, n = std::min(kTile, s.D - d);
    const View<A> a{call.a + image * columns * row_step(s.C), row_step(s.C), 1};
    Fma<A>::multiply(s.K, n, s.C, a, Fma<A>::packed({call.w + d * s.C, 1, s.C}, s.C, n, scratch),
                     call.folded + image * columns * row_step(s.D) + d, row_step(s.D), false);
  }
}

// The convolution of the bases, transposed: the scores' rows = λμ w, kTile of C at a time.
template <class T>
void convolve_bases(const Forward<T>& call, int64_t first, int64_t last) {
  using A = acc_t<T>;
  const Sizes& s = call.sizes;
  Scratch memory(Fma<A>::right_bytes(s.D, kTile) + 64);
  char* scratch = memory.take<char>(Fma<A>::right_bytes(s.D, kTile));
  const int64_t tiles = ceil_div(s.C, kTile), columns = s.columns();
  for (int64_t i = first; i < last; ++i) {
    const int64_t image = i / tiles, c = i % tiles * kTile, n = std::min(kTile, s.C - c);
    const View<A> mu{call.heated + image * columns * row_step(s.D), row_step(s.D), 1};
    Fma<A>::multiply(s.K, n, s.D, mu, Fma<A>::packed({call.w + c, s.C, 1}, s.D, n, scratch),
                     call.scores.rows + image * columns * row_step(s.C) + c, row_step(s.C), false);
  }
}

// -- tables -------------------------------------------------------------------------------------------

// Table i as the right operand of products over its channels, [channels][columns], or of its bases,
// [rows][channels].
template <class E, class A>
void pack_scores(const Table<A>& table, int64_t i, int64_t columns, int64_t channels, int64_t step) {
  E::packed({table.rows + i * columns * step, 1, step}, channels, columns, table.packed + i * table.bytes);
}
template <class E, class A>
void pack_mixture(const Table<A>& table, int64_t i, int64_t rows, int64_t channels, int64_t step) {
  E::packed({table.rows + i * rows * step, step, 1}, rows, channels, table.packed + i * table.bytes);
}

}  // namespace SEGKERNELS_ISA
}  // namespace
}  // namespace segkernels

#include "em_attention/cpu_backward.h"
