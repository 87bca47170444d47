// E-steps, M-steps and the reconstruction over blocks of pixels. Compiled once per instruction set (no
// include guard).

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
void add_scores(int64_t pixels, int64_t columns, Rows<const A> scores, const A* shift, Rows<A> more,
                Rows<A> out) {
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

// A thread's memory, and products with it; T: of the maps. 16-bit maps are multiplied in float32: what
// operands rounded to bfloat16 would lose grows from iteration to iteration.
template <class T>
struct Block {
  using A = acc_t<T>;
  const Sizes& s;
  Rows<A> x, scores, z, out;

  static int64_t widest(const Sizes& s) { return std::max(s.C, s.D); }
  static int64_t bytes(const Sizes& s) {
    return kBlock * 2 * (row_step(widest(s)) + s.step()) * int64_t(sizeof(A)) + 256;
  }
  Block(const Sizes& sizes, Scratch& memory)
      : s(sizes),
        x{memory.take<A>(kBlock * row_step(widest(s))), row_step(widest(s))},
        scores{memory.take<A>(kBlock * s.step()), s.step()},
        z{memory.take<A>(kBlock * s.step()), s.step()},
        out{memory.take<A>(kBlock * row_step(widest(s))), row_step(widest(s))} {}

  static Rows<const A> read(Rows<A> r) { return {r.p, r.step}; }

  // rows[t][channel] of a map
  template <class S>
  int64_t load_map(const PixelMap<S>& map, int64_t image, int64_t block, Rows<A> rows) const {
    load_block(map.block(image, block), map.at, s.pixels(block), static_cast<const A*>(nullptr), rows);
    return s.pixels(block);
  }
  template <class S>
  Ahead ahead(const PixelMap<S>& map, int64_t image, int64_t block) const {
    return ahead_of(map.data + image * map.at.sample, map.at, block * kBlock, kBlock);
  }
  // result[t][·] (+)= rows[t][·] · table, n of them, k summed
  void multiply(int64_t pixels, int64_t n, int64_t k, Rows<A> rows, const char* table, Rows<A> result,
                bool add = false, Ahead ahead = {}) const {
    Fma<A>::multiply(pixels, n, k, {rows.p, rows.step, 1}, Fma<A>::right_at(table, k), result.p, result.step,
                     add, ahead);
  }
  // sums[k][c] (+)= Σ_t q[t][k] rows[t][c]
  void sum(int64_t pixels, Rows<A> q, Rows<A> rows, int64_t channels, A* sums, bool add,
           Ahead ahead = {}) const {
    const View<A> right{rows.p, rows.step, 1};
    Fma<A>::multiply(s.K, channels, pixels, {q.p, 1, q.step}, Fma<A>::right(right, pixels, channels, nullptr),
                     sums, row_step(channels), add, ahead);
  }
  // Where a block of a map is made: in the map itself where that has room for all that products write.
  template <class S>
  Rows<A> target(const PixelMap<S>& map, int64_t image, int64_t block) const {
    if constexpr (std::is_same_v<S, A>)
      if (map.at.channel == 1 && map.at.C % kTile == 0 && s.pixels(block) == kBlock)
        return {map.block(image, block), map.at.pixel};
    return out;
  }
  template <class S>
  void deliver(Rows<A> made, const PixelMap<S>& map, int64_t image, int64_t block) const {
    if (made.p == out.p) store_block(read(out), s.pixels(block), map.block(image, block), map.at);
  }
};

// -- forward ------------------------------------------------------------------------------------------

// The responsibilities of the last E-step.
template <class T>
Rows<acc_t<T>> rows_of(const Forward<T>& call, int64_t image, int64_t block) {
  const Sizes& s = call.sizes;
  return {call.responsibilities + (image * s.N + block * kBlock) * s.step(), s.step()};
}

// z, the masses and sums of the parts [first, last).
template <class T>
void expect(const Forward<T>& call, int64_t first, int64_t last) {
  using A = acc_t<T>;
  const Sizes& s = call.sizes;
  Scratch memory(Block<T>::bytes(s));
  const Block<T> b(s, memory);
  const int64_t columns = s.columns(), size = s.sum_size();
  for (int64_t part = first; part < last; ++part) {
    const int64_t image = part / s.splits;
    A *masses = call.masses + part * columns, *sums = call.sums + part * size;
    if (call.sums_wanted) std::fill_n(masses, columns, A(0));
    for (int64_t block = s.first_block(part); block < s.last_block(part); ++block) {
      const int64_t pixels = b.load_map(call.x, image, block, b.x);
      const Rows<A> z = call.last ? rows_of(call, image, block) : b.z;
      b.multiply(pixels, columns, s.C, b.x, call.scores[image], b.scores);
      responsibilities(pixels, columns, b.read(b.scores), call.bias + image * columns, z);
      if (call.last && call.z.data) store_block(b.read(z), pixels, call.z.block(image, block), call.z.at);
      if (!call.sums_wanted) continue;
      add_rows(pixels, columns, b.read(z), masses);
      b.sum(pixels, z, b.x, s.C, sums, block > s.first_block(part), b.ahead(call.x, image, block + 1));
    }
  }
}

// y of the blocks [first, last).
template <class T>
void reconstruct(const Forward<T>& call, int64_t first, int64_t last) {
  using A = acc_t<T>;
  const Sizes& s = call.sizes;
  Scratch memory(Block<T>::bytes(s));
  const Block<T> b(s, memory);
  for (int64_t i = first; i < last; ++i) {
    const int64_t image = i / s.blocks(), block = i % s.blocks();
    const Rows<A> y = b.target(call.y, image, block);
    b.multiply(s.pixels(block), s.D, s.columns(), rows_of(call, image, block), call.mixture[image], y, false,
               b.ahead(call.y, image, block + 1));
    b.deliver(y, call.y, image, block);
  }
}

// -- bases, row by row of [B][K] -----------------------------------------------------------------------

// a and the mass out of the parts'.
template <class T>
void gather_row(const Forward<T>& call, int64_t image, int64_t k) {
  const Sizes& s = call.sizes;
  const int64_t at = image * s.columns() + k;
  call.mass[at] = sum_parts(call.masses, s.splits, s.columns(), image, k);
  sum_parts(call.sums, s.splits, s.sum_rows(), row_step(s.C), image, k, call.a + at * row_step(s.C));
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

// out = rows · w, [K][summed] · [summed][made] for every image, kTile columns at a time; items are
// [B][tiles].
template <class A>
void convolve(const Sizes& s, int64_t summed, int64_t made, const A* rows, View<A> w, A* out, int64_t first,
              int64_t last) {
  Scratch memory(Fma<A>::right_bytes(summed, kTile) + 64);
  char* scratch = memory.take<char>(Fma<A>::right_bytes(summed, kTile));
  const int64_t tiles = ceil_div(made, kTile), from = row_step(summed), to = row_step(made);
  for (int64_t i = first; i < last; ++i) {
    const int64_t image = i / tiles, j = i % tiles * kTile, n = std::min(kTile, made - j);
    const View<A> tile{w.p + j * w.column, w.row, w.column};
    Fma<A>::multiply(s.K, n, summed, {rows + image * s.columns() * from, from, 1},
                     Fma<A>::packed(tile, summed, n, scratch), out + image * s.columns() * to + j, to, false);
  }
}

// -- tables -------------------------------------------------------------------------------------------

// An image's rows of a table packed as table `to`.
template <class A>
void pack_summed(const Sizes& s, int64_t channels, const A* rows, int64_t image, char* to) {
  const int64_t step = row_step(channels);
  Fma<A>::packed({rows + image * s.columns() * step, 1, step}, channels, s.columns(), to);
}
template <class A>
void pack_made(const Sizes& s, int64_t channels, const A* rows, int64_t image, char* to) {
  const int64_t step = row_step(channels);
  Fma<A>::packed({rows + image * s.columns() * step, step, 1}, s.columns(), channels, to);
}

}  // namespace SEGKERNELS_ISA
}  // namespace
}  // namespace segkernels

#include "em_attention/cpu_backward.h"
