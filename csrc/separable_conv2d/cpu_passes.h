// Passes over a tile, row by row: affine, activation, gradients and sums per channel. Compiled once per instruction set, for rows of
// pixels (kLast, channels_last) and rows of channels (NCHW). Tiles of type T lie in maps, tiles of the accumulation type A in caches.

namespace segkernels {
namespace {
namespace SEGKERNELS_ISA {

using namespace separable;

template <class T>
struct Matrix {
  T* p;
  int64_t step;  // from row to row
};

// What a stage knows of a channel, at element (i, j).
template <bool kLast, class A>
SEGKERNELS_INLINE Vec<A> channel(const A* p, int64_t i, int64_t j) {
  if constexpr (kLast) return load<A>(p + j);
  return splat(p[i]);
}

template <class A>
SEGKERNELS_INLINE Vec<A> activate(Vec<A> u, Clip<A> clip) {
  return min(max(u, splat(clip.low)), splat(clip.high));
}
// g where the activation has slope 1. `u` is its input or its output.
template <class A>
SEGKERNELS_INLINE Vec<A> through(Vec<A> g, Vec<A> u, Clip<A> clip) {
  return {((u.v <= splat(clip.low).v) | (u.v >= splat(clip.high).v)) ? splat(A(0)).v : g.v};
}
template <bool kLast, class A>
SEGKERNELS_INLINE Vec<A> affine(Vec<A> u, const Affine<A>& a, int64_t i, int64_t j) {
  return fma(u - channel<kLast>(a.mean, i, j), channel<kLast>(a.scale, i, j), channel<kLast>(a.shift, i, j));
}
template <bool kLast, class A>
SEGKERNELS_INLINE Vec<A> standard(Vec<A> u, const Affine<A>& a, int64_t i, int64_t j) {
  return (u - channel<kLast>(a.mean, i, j)) * channel<kLast>(a.invstd, i, j);
}
// The gradient of scale·n from that of its value, through the batch's own moments.
template <bool kLast, class A>
SEGKERNELS_INLINE Vec<A> centred(Vec<A> g, Vec<A> n, const Affine<A>& a, int64_t i, int64_t j) {
  return channel<kLast>(a.scale, i, j) *
         (g - channel<kLast>(a.mean_g, i, j) - n * channel<kLast>(a.mean_gn, i, j));
}

// Sums per channel of one tile: a number for each channel (kLast), or a vector of partial sums.
template <bool kLast, class A>
struct Partial {
  static constexpr int64_t lanes = Vec<A>::lanes;
  A* p;
  SEGKERNELS_INLINE int64_t size(int64_t channels) { return kLast ? round_up(channels, 32) : channels * lanes; }
  __attribute__((always_inline)) void add(Vec<A> v, int64_t i, int64_t j) const {
    A* s = p + (kLast ? j : i * lanes);
    store(s, load<A>(s) + v);
  }
  void clear(int64_t channels) const { std::memset(p, 0, size(channels) * sizeof(A)); }
  A at(int64_t c) const { return kLast ? p[c] : sum(load<A>(p + c * lanes)); }
  void add_to(A* total, int64_t channels) const {
    for (int64_t c = 0; c < channels; ++c) total[c] += at(c);
  }
};

// Vectors of a tile, at (i, j) with the lanes m: whole ones, and the last of a row.
#define SEGKERNELS_EACH_VECTOR(...)                            \
  for (int64_t i = 0; i < rows; ++i) {                         \
    int64_t j = 0;                                             \
    for (; j + Vec<A>::lanes <= columns; j += Vec<A>::lanes) { \
      constexpr Mask m = all_lanes<A>;                         \
      __VA_ARGS__                                              \
    }                                                          \
    if (j < columns) {                                         \
      const Mask m = lane_range<A>(0, columns - j);            \
      __VA_ARGS__                                              \
    }                                                          \
  }

// to = φ(scale·(from − mean) + shift)
template <bool kLast, class S, class T, class A>
void apply(Matrix<const S> from, Matrix<T> to, int64_t rows, int64_t columns, const Affine<A>& a) {
  SEGKERNELS_EACH_VECTOR({
    const Vec<A> u = load<A>(from.p + i * from.step + j, m);
    store(to.p + i * to.step + j, activate(affine<kLast>(u, a, i, j), a.clip), m);
  })
}

template <class A, class T>
void copy(Matrix<const A> from, Matrix<T> to, int64_t rows, int64_t columns) {
  SEGKERNELS_EACH_VECTOR({
    store(to.p + i * to.step + j, load<A>(from.p + i * from.step + j, m), m);
  })
}

// Adds the moments of a tile (mean, and Σ(u − mean)² around it) to those of `count` numbers before it (Chan et al. 1983).
template <bool kLast, class T, class A>
void add_moments(Matrix<const T> u, int64_t rows, int64_t columns, int64_t count, A* mean, A* squares,
                 Partial<kLast, A> partial, A* tile_mean) {
  const int64_t channels = kLast ? columns : rows, n = kLast ? rows : columns;
  partial.clear(channels);
  SEGKERNELS_EACH_VECTOR({ partial.add(load<A>(u.p + i * u.step + j, m), i, j); })
  for (int64_t c = 0; c < channels; ++c) tile_mean[c] = partial.at(c) / A(n);
  partial.clear(channels);
  SEGKERNELS_EACH_VECTOR({
    const Vec<A> e = load<A>(u.p + i * u.step + j, m) - channel<kLast>(tile_mean, i, j);
    partial.add(fma(e, e, splat(A(0)), m), i, j);
  })
  const A part = A(n) / A(count + n);
  for (int64_t c = 0; c < channels; ++c) {
    const A delta = count ? tile_mean[c] - mean[c] : A(0);
    mean[c] = count ? mean[c] + delta * part : tile_mean[c];
    squares[c] = (count ? squares[c] : A(0)) + partial.at(c) + delta * delta * part * A(count);
  }
}

// Outer stage without moments: g = dy·φ₂'(y), and Σg.
template <bool kLast, class T, class A>
void outer_gradient(Matrix<const T> dy, Matrix<const T> y, Matrix<A> g, int64_t rows, int64_t columns, Clip<A> clip,
                    Partial<kLast, A> sum_g) {
  SEGKERNELS_EACH_VECTOR({
    Vec<A> gi = load<A>(dy.p + i * dy.step + j, m);
    if (y.p) gi = through(gi, load<A>(y.p + i * y.step + j, m), clip);
    store(g.p + i * g.step + j, gi);
    sum_g.add(gi, i, j);
  })
}

// Outer stage with moments, first Σg and Σg·n, then (kFinish) the gradient of o.
template <bool kFinish, bool kLast, class T, class A>
void outer_standardised(Matrix<const T> dy, Matrix<const T> o, Matrix<A> d_o, int64_t rows, int64_t columns,
                        const Affine<A>& a, Partial<kLast, A> sum_g, Partial<kLast, A> sum_gn) {
  SEGKERNELS_EACH_VECTOR({
    const Vec<A> u = load<A>(o.p + i * o.step + j, m), n = standard<kLast>(u, a, i, j);
    const Vec<A> g = through(load<A>(dy.p + i * dy.step + j, m), affine<kLast>(u, a, i, j), a.clip);
    if constexpr (kFinish) {
      store(d_o.p + i * d_o.step + j, centred<kLast>(g, n, a, i, j));
    } else {
      sum_g.add(g, i, j);
      sum_gn.add(g * n, i, j);
    }
  })
}

// Inner stage: g = dh·φ₁'(h), Σg and Σg·n; out is g (moments still to be taken through) or scale·g.
template <bool kLast, class T, class A>
void inner_gradient(Matrix<const A> dh, Matrix<const A> h, Matrix<const T> d, T* out, int64_t out_step, int64_t rows,
                    int64_t columns, const Affine<A>& a, Partial<kLast, A> sum_g, Partial<kLast, A> sum_gn) {
  SEGKERNELS_EACH_VECTOR({
    const Vec<A> g = through(load<A>(dh.p + i * dh.step + j, m), load<A>(h.p + i * h.step + j, m), a.clip);
    const Vec<A> n = standard<kLast>(load<A>(d.p + i * d.step + j, m), a, i, j);
    if (out) store(out + i * out_step + j, a.standardised ? g : g * channel<kLast>(a.scale, i, j), m);
    sum_g.add(g, i, j);
    sum_gn.add(g * n, i, j);
  })
}

// Inner stage with moments: the gradient of d, from g, in place.
template <bool kLast, class T, class A>
void inner_standardised(Matrix<const T> d, Matrix<T> g, int64_t rows, int64_t columns, const Affine<A>& a) {
  SEGKERNELS_EACH_VECTOR({
    T* p = g.p + i * g.step + j;
    const Vec<A> n = standard<kLast>(load<A>(d.p + i * d.step + j, m), a, i, j);
    store(p, centred<kLast>(load<A>(p, m), n, a, i, j), m);
  })
}

#undef SEGKERNELS_EACH_VECTOR

}  // namespace SEGKERNELS_ISA
}  // namespace
}  // namespace segkernels
