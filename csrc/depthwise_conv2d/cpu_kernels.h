// Depthwise convolution on the CPU, channels_last: vectors run along the channels. Compiled once per
// instruction set.
//
// For other operators:
//   forward_row(f, x, w, bias, ρ, h, first, last, c0, c1, y, y_step)
//       d of rate ρ for the pixels (h, first … last−1) and the channels c0 … c1−1 of one image into a
//       caller's buffer: y points at (pixel `first`, channel c0), y_step numbers from pixel to pixel. c0 must
//       be a multiple of 32.
//   backward_rows(f, x, dy, w, dx, sums, first, last, c0, c1)
//       one pass that makes dX and the partial sums of dW and db; dy is any map [B, R·C, H', W'] with dense
//       channels.
// Weights come packed as w[ρ·k_h·k_w + a·k_w + b][c] (pack_depthwise_weights in cpu.h), biases as bias[ρ·C +
// c].

namespace segkernels {
namespace {
namespace SEGKERNELS_ISA {

// Pixels of a register tile: sums (forward), sums and inputs (backward), a weight and one number read.
constexpr int kForwardPixels = SEGKERNELS_VECTOR_BYTES == 64 ? 6 : 4;
constexpr int kBackwardPixels = SEGKERNELS_VECTOR_BYTES == 64 ? 4 : 2;

// Whether the weights of a 3x3 window and some sums fit the registers.
constexpr bool kSlides = SEGKERNELS_VECTOR_BYTES == 64;

template <bool Partial, class T>
SEGKERNELS_INLINE Pair<T> load_channels(const T* p, int64_t count) {
  if constexpr (Partial) return load2(p, count);
  return load2(p);
}
template <bool Partial, class T>
SEGKERNELS_INLINE void store_channels(T* p, Pair<T> a, int64_t count) {
  if constexpr (Partial) return store2(p, a, count);
  store2(p, a);
}
template <class T>
SEGKERNELS_INLINE Pair<T> fma(Pair<T> a, Pair<T> b, Pair<T> c) {
  return {fma(a.lo, b.lo, c.lo), fma(a.hi, b.hi, c.hi)};
}

template <class T>
SEGKERNELS_INLINE Pair<T> fma(Pair<T> a, Pair<T> b, Pair<T> c, Mask m) {
  return {fma(a.lo, b.lo, c.lo, m), fma(a.hi, b.hi, c.hi, m)};
}

// A slab of channels is covered by pairs; the last pair ends with the slab, where it may overlap the one
// before (and computes some channels twice, to the same numbers). Only a slab that is narrower than a pair is
// loaded in part.
inline int64_t pair_start(int64_t c, int64_t channels, int64_t lanes) {
  return std::max<int64_t>(0, std::min(c, channels - lanes));
}

// The taps of some pixels of a row, and what they read and weigh.
template <class T>
struct Products {
  const Tap* taps;
  int64_t n;
  const T* source;  // of pixel 0, channel 0; a pixel further is `step` further
  int64_t step;
  const T* w;  // [tap][channel], `w_step` from tap to tap
  int64_t w_step;
};

// -- sums over taps: y of the forward, dX of the backward -----------------------------------------

// P pixels of up to a pair of channels: y[p] = bias + Σ_t w[t] · source[p·step + offset_t].
template <int P, bool Partial, class T>
SEGKERNELS_INLINE void sum_tile(const Products<T>& t, const T* bias, T* y, int64_t y_step, int64_t c,
                                int64_t count) {
  const Pair<T> start = bias ? load_channels<Partial>(bias + c, count) : Pair<T>{};
  Pair<T> acc[P];
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) acc[p] = start;
  for (const Tap* tap = t.taps; tap < t.taps + t.n; ++tap) {
    const Pair<T> w = load_channels<Partial>(t.w + tap->weight * t.w_step + c, count);
    const T* source = t.source + tap->offset + c;
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) acc[p] = fma(w, load_channels<Partial>(source + p * t.step, count), acc[p]);
  }
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) store_channels<Partial>(y + p * y_step + c, acc[p], count);
}

template <int P, class T>
void sum_pixels(const Products<T>& t, const T* bias, T* y, int64_t y_step, int64_t channels) {
  constexpr int64_t L = Pair<T>::lanes;
  if (channels >= L) {
    for (int64_t c = 0; c < channels; c += L)
      sum_tile<P, false>(t, bias, y, y_step, pair_start(c, channels, L), L);
  } else {
    Products<T> one = t;
    for (int p = 0; p < P; ++p, one.source += t.step)
      sum_tile<1, true>(one, bias, y + p * y_step, y_step, 0, channels);
  }
}

// The pixels [0, n) of a run.
template <class T>
void sum_run(Products<T> t, const T* bias, T* y, int64_t y_step, int64_t n, int64_t channels) {
  constexpr int P = kForwardPixels;
  for (; n >= P; n -= P, t.source += P * t.step, y += P * y_step) sum_pixels<P>(t, bias, y, y_step, channels);
  for (; n > 0; --n, t.source += t.step, y += y_step) sum_pixels<1>(t, bias, y, y_step, channels);
}

// -- windows that slide ---------------------------------------------------------------------------
//
// A window of 3 columns at stride 1. Outputs that are a rate apart read columns that are a rate apart: the
// window slides along them, and a number is loaded once for its three column taps; for two rows a rate apart,
// once for both.

// The channels that a window takes at once: a vector, or a pair of them.
template <class T>
struct Single {
  using A = acc_t<T>;
  using V = Vec<A>;
  static constexpr int64_t lanes = V::lanes;
  SEGKERNELS_INLINE V load_map(const T* p) { return load<A>(p); }
  SEGKERNELS_INLINE V load_sum(const A* p) { return load<A>(p); }
  SEGKERNELS_INLINE void store_map(T* p, V v) { store(p, v); }
  SEGKERNELS_INLINE void store_sum(A* p, V v) { store(p, v); }
};
template <class T>
struct Double {
  using A = acc_t<T>;
  using V = Pair<T>;
  static constexpr int64_t lanes = V::lanes;
  SEGKERNELS_INLINE V load_map(const T* p) { return load2(p); }
  SEGKERNELS_INLINE V load_sum(const A* p) { return {load<A>(p), load<A>(p + lanes / 2)}; }
  SEGKERNELS_INLINE void store_map(T* p, V v) { store2(p, v); }
  SEGKERNELS_INLINE void store_sum(A* p, V v) {
    store(p, v.lo);
    store(p + lanes / 2, v.hi);
  }
};
// The narrowest: numbers of bfloat16 only come in pairs.
template <class T>
using Strip = std::conditional_t<std::is_same_v<T, bfloat16>, Double<T>, Single<T>>;

// The first channel of the strip that stands at `strip` in a slab of at least a pair (see pair_start).
template <class T>
SEGKERNELS_INLINE int64_t strip_start(int64_t strip, int64_t channels) {
  constexpr int64_t L = Pair<T>::lanes;
  return pair_start(strip / L * L, channels, L) + strip % L;
}
template <class T>
SEGKERNELS_INLINE int64_t strips_end(int64_t channels) {
  return ceil_div(channels, Pair<T>::lanes) * Pair<T>::lanes;
}

// What A row taps of J rows of outputs read: row j reads source j + a at tap a.
template <class T>
struct Sliding {
  const T* source[4];  // column 0, channel c0
  const T* w[3];       // column tap 0, channel c0; w_step from tap to tap
  int64_t columns, step, w_step, r;

  // The row taps of one row of outputs; `weights` of tap (0, 0).
  void read(const RowTap* begin, const RowTap* end, const T* map, int64_t row_step, const T* weights) {
    for (const RowTap* tap = begin; tap < end; ++tap) {
      source[tap - begin] = map + tap->row * row_step;
      w[tap - begin] = weights + tap->a * 3 * w_step;
    }
  }
};

// n outputs of J rows, which lie y_row apart; the first of a row reads column `column` at tap 0.
template <int A, int J, class S, class T>
__attribute__((noinline)) void slide_forward(const Sliding<T>& t, int64_t column, const T* bias, T* y,
                                             int64_t y_step, int64_t y_row, int64_t n, int64_t channels) {
  using V = typename S::V;
  const int64_t r = t.r, columns = t.columns, step = t.step;
  for (int64_t strip = 0; strip < strips_end<T>(channels); strip += S::lanes) {
    const int64_t c = strip_start<T>(strip, channels);
    const T* source[A + J - 1];
    V w[A][3];
#pragma GCC unroll 4
    for (int m = 0; m < A + J - 1; ++m) source[m] = t.source[m] + c;
#pragma GCC unroll 3
    for (int a = 0; a < A; ++a)
#pragma GCC unroll 3
      for (int b = 0; b < 3; ++b) w[a][b] = S::load_map(t.w[a] + b * t.w_step + c);
    const V start = bias ? S::load_map(bias + c) : V{};
    for (int64_t i = 0; i < std::min(r, n); ++i) {
      V acc[J][3];  // of the outputs at, at + r, at + 2r
#pragma GCC unroll 2
      for (int j = 0; j < J; ++j) acc[j][0] = acc[j][1] = acc[j][2] = start;
      for (int64_t at = i - 2 * r; at < n; at += r) {
        if (const int64_t from = column + at + 2 * r; from >= 0 && from < columns)
#pragma GCC unroll 4
          for (int m = 0; m < A + J - 1; ++m) {
            const V x = S::load_map(source[m] + from * step);
#pragma GCC unroll 2
            for (int j = 0; j < J; ++j)
#pragma GCC unroll 3
              for (int b = 0; b < 3; ++b)
                if (m - j >= 0 && m - j < A) acc[j][b] = fma(w[m - j][2 - b], x, acc[j][b]);
          }
#pragma GCC unroll 2
        for (int j = 0; j < J; ++j) {
          if (at >= 0) S::store_map(y + j * y_row + at * y_step + c, acc[j][0]);
          acc[j][0] = acc[j][1];
          acc[j][1] = acc[j][2];
          acc[j][2] = start;
        }
      }
    }
  }
}

// Calls f with the number of row taps, as a constant, if there are 1 to 3.
template <class F>
bool by_row_taps(int64_t n, const F& f) {
  if (n == 3) return f(std::integral_constant<int, 3>()), true;
  if (n == 2) return f(std::integral_constant<int, 2>()), true;
  if (n == 1) return f(std::integral_constant<int, 1>()), true;
  return false;
}

// -- forward --------------------------------------------------------------------------------------

// Row h of rate ρ, and with `two` the row a rate below it, where the window slides; else false.
template <class T>
bool slide_rows(const ForwardPlan& f, const T* x, const T* w, const T* bias, int64_t rate, int64_t h,
                int64_t first, int64_t last, int64_t c0, int64_t c1, T* y, int64_t y_step, bool two,
                int64_t y_row) {
  const Geometry& g = f.geometry;
  const Axis& columns = g.columns[rate];
  const RowTap *begin = f.rows[rate].begin(h), *end = f.rows[rate].end(h);
  if (g.kw() != 3 || columns.s != 1 || c1 - c0 < Pair<T>::lanes || end - begin > 3) return false;
  Sliding<T> t{{}, {}, columns.in, f.x.sW, g.C, columns.r};
  t.read(begin, end, x + c0, f.x.sH, w + rate * g.taps() * g.C + c0);
  const int64_t column = first - columns.p, n = last - first;
  if (two) {
    t.source[3] = x + c0 + (end[-1].row + g.rows[rate].r) * f.x.sH;
    slide_forward<3, 2, Strip<T>>(t, column, bias, y, y_step, y_row, n, c1 - c0);
    return true;
  }
  return by_row_taps(end - begin, [&](auto A) {
    slide_forward<A, 1, Double<T>>(t, column, bias, y, y_step, 0, n, c1 - c0);
  });
}

template <class T>
void forward_row(const ForwardPlan& f, const T* x, const T* w, const T* bias, int64_t rate, int64_t h,
                 int64_t first, int64_t last, int64_t c0, int64_t c1, T* y, int64_t y_step) {
  const Geometry& g = f.geometry;
  if (bias) bias += rate * g.C + c0;
  if constexpr (kSlides)
    if (slide_rows(f, x, w, bias, rate, h, first, last, c0, c1, y, y_step, false, 0)) return;
  const int64_t x_step = g.columns[rate].s * f.x.sW;
  Tap taps[kMaxKernel * kMaxKernel];
  for (const Run& run : f.runs[rate]) {
    const int64_t begin = std::max(first, run.begin), end = std::min(last, run.end);
    if (begin >= end) continue;
    int64_t n = 0;
    for (const RowTap* row = f.rows[rate].begin(h); row != f.rows[rate].end(h); ++row)
      for (const ColumnTap& tap : run.taps)
        taps[n++] = {row->row * f.x.sH + tap.source * f.x.sW, rate * g.taps() + row->a * g.kw() + tap.b};
    sum_run<T>({taps, n, x + begin * x_step + c0, x_step, w + c0, g.C}, bias, y + (begin - first) * y_step,
               y_step, end - begin, c1 - c0);
  }
}

// Items [first, last) of (image, slab of channels, output row): every rate of that row, so that x is read
// once.
template <class T>
void forward_channels_last(const ForwardPlan& f, const T* x, const T* w, const T* bias, T* y, int64_t first,
                           int64_t last) {
  const Geometry& g = f.geometry;
  const int64_t n_slabs = g.slabs(f.slab), H = g.H_out(), W = g.W_out(), y_step = g.R * g.C;
  for (int64_t item = first; item < last; ++item) {
    const int64_t image = item / H / n_slabs, c0 = item / H % n_slabs * f.slab, h = f.order[item % H];
    const int64_t c1 = g.slab_end(c0, f.slab);
    const T* x_image = x + image * f.x.sB;
    T* out = y + (image * H + h) * W * y_step + c0;
    if constexpr (kSlides)
      if (item + 1 < last && share_rows(g, f.rows[0], f.order, item % H) &&
          slide_rows(f, x_image, w, bias ? bias + c0 : nullptr, 0, h, 0, W, c0, c1, out, y_step, true,
                     g.rows[0].r * W * y_step)) {
        ++item;
        continue;
      }
    for (int64_t rate = 0; rate < g.R; ++rate)
      forward_row(f, x_image, w, bias, rate, h, 0, W, c0, c1, out + rate * g.C, y_step);
  }
}

}  // namespace SEGKERNELS_ISA
}  // namespace
}  // namespace segkernels

#include "depthwise_conv2d/cpu_backward.h"
#include "depthwise_conv2d/cpu_planes.h"
