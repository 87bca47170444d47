// Depthwise convolution on the CPU, channels_last: vectors run along the channels. Compiled once per
// instruction set.
//
// For other operators:
//   forward_row(f, x, w, bias, ρ, h, first, last, c0, c1, y, y_step, epilogue)
//       d of rate ρ for the pixels (h, first … last−1) and the channels c0 … c1−1 of one image into a
//       caller's buffer: y points at (pixel `first`, channel c0), y_step numbers from pixel to pixel. The
//       epilogue sees each Pair<T> of sums before it is rounded to T: `Pair<T> operator()(Pair<T> d, int64_t
//       channel)`, channel counted in [0, R·C). c0 must be a multiple of 32.
//   backward_rows(f, x, dy, w, dx, sums, first, last, c0, c1)
//       one pass that makes dX and the partial sums of dW and db; dy is any map [B, R·C, H', W'] with dense
//       channels.
// Weights come packed as w[ρ·k_h·k_w + a·k_w + b][c] (pack_weights in cpu.cpp), biases as bias[ρ·C + c].

namespace segkernels {
namespace {
namespace SEGKERNELS_ISA {

// Pixels of a register tile: sums (forward), sums and inputs (backward), a weight and one number read.
constexpr int kForwardPixels = SEGKERNELS_VECTOR_BYTES == 64 ? 6 : 4;
constexpr int kBackwardPixels = SEGKERNELS_VECTOR_BYTES == 64 ? 4 : 2;

// Whether the weights of a 3x3 window and the sums of some pixels fit the registers.
constexpr bool kWalks = SEGKERNELS_VECTOR_BYTES == 64;

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

struct Identity {
  template <class T>
  __attribute__((always_inline)) Pair<T> operator()(Pair<T> d, int64_t) const {
    return d;
  }
};

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
  int64_t next;  // backward: from a row to the row that follows it in the order of rows
};

// Fetches, into the second cache, what the next row of the order will read at these pixels.
template <class T>
SEGKERNELS_INLINE void fetch_ahead(const T* p, int64_t count, int64_t step) {
#pragma GCC unroll 8
  for (int64_t i = 0; i < count; ++i) {
    __builtin_prefetch(p + i * step, 0, 2);
    if constexpr (Pair<T>::lanes * sizeof(T) > 64)
      __builtin_prefetch(p + i * step + Pair<T>::lanes / 2, 0, 2);
  }
}

// -- sums over taps: y of the forward, dX of the backward -----------------------------------------

// P pixels of up to a pair of channels: y[p] = bias + Σ_t w[t] · source[p·step + offset_t].
template <int P, bool Partial, class T, class E>
SEGKERNELS_INLINE void sum_tile(const Products<T>& t, const T* bias, T* y, int64_t y_step, int64_t c,
                                int64_t count, int64_t channel, E& epilogue) {
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
  for (int p = 0; p < P; ++p)
    store_channels<Partial>(y + p * y_step + c, epilogue(acc[p], channel + c), count);
}

template <int P, class T, class E>
void sum_pixels(const Products<T>& t, const T* bias, T* y, int64_t y_step, int64_t channels, int64_t channel,
                E& epilogue) {
  constexpr int64_t L = Pair<T>::lanes;
  if (channels >= L) {
    for (int64_t c = 0; c < channels; c += L)
      sum_tile<P, false>(t, bias, y, y_step, pair_start(c, channels, L), L, channel, epilogue);
  } else {
    Products<T> one = t;
    for (int p = 0; p < P; ++p, one.source += t.step)
      sum_tile<1, true>(one, bias, y + p * y_step, y_step, 0, channels, channel, epilogue);
  }
}

// n pixels of N taps for one pair of channels after the other: the weights stay in registers.
template <int N, class T, class E>
__attribute__((noinline)) void sum_walk(const Products<T>& t, const T* bias, T* y, int64_t y_step, int64_t n,
                                        int64_t channels, int64_t channel, E& epilogue) {
  constexpr int64_t L = Pair<T>::lanes;
  constexpr int P = kForwardPixels;
  for (int64_t pair = 0; pair < channels; pair += L) {
    const int64_t c = pair_start(pair, channels, L);
    Pair<T> w[N];
    const T* source[N];
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      w[i] = load2(t.w + t.taps[i].weight * t.w_step + c);
      source[i] = t.source + t.taps[i].offset + c;
    }
    const Pair<T> start = bias ? load2(bias + c) : Pair<T>{};
    T* out = y + c;
    int64_t at = 0, left = n;
    const auto pixels = [&](auto count) __attribute__((always_inline)) {
      Pair<T> acc[count];
#pragma GCC unroll 8
      for (int p = 0; p < count; ++p) acc[p] = start;
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i)
#pragma GCC unroll 8
        for (int p = 0; p < count; ++p) acc[p] = fma(w[i], load2(source[i] + at + p * t.step), acc[p]);
#pragma GCC unroll 8
      for (int p = 0; p < count; ++p) store2(out + p * y_step, epilogue(acc[p], channel + c));
      at += count * t.step;
      out += count * y_step;
      left -= count;
    };
    while (left >= P) pixels(std::integral_constant<int, P>());
    while (left > 0) pixels(std::integral_constant<int, 1>());
  }
}

// The pixels [0, n) of a run.
template <class T, class E>
void sum_run(Products<T> t, const T* bias, T* y, int64_t y_step, int64_t n, int64_t channels, int64_t channel,
             E& epilogue) {
  constexpr int P = kForwardPixels;
  if (kWalks && channels >= Pair<T>::lanes) {
    if (t.n == 9) return sum_walk<9>(t, bias, y, y_step, n, channels, channel, epilogue);
    if (t.n == 6) return sum_walk<6>(t, bias, y, y_step, n, channels, channel, epilogue);
    if (t.n == 4) return sum_walk<4>(t, bias, y, y_step, n, channels, channel, epilogue);
  }
  for (; n >= P; n -= P, t.source += P * t.step, y += P * y_step)
    sum_pixels<P>(t, bias, y, y_step, channels, channel, epilogue);
  for (; n > 0; --n, t.source += t.step, y += y_step)
    sum_pixels<1>(t, bias, y, y_step, channels, channel, epilogue);
}

// -- forward --------------------------------------------------------------------------------------

template <class T, class E>
void forward_row(const ForwardPlan& f, const T* x, const T* w, const T* bias, int64_t rate, int64_t h,
                 int64_t first, int64_t last, int64_t c0, int64_t c1, T* y, int64_t y_step, E& epilogue) {
  const Geometry& g = f.geometry;
  const RowTaps& rows = f.rows[rate];
  Tap taps[kMaxKernel * kMaxKernel];
  const int64_t x_step = g.columns[rate].s * f.x.sW, channel = rate * g.C + c0;
  for (const Run& run : f.runs[rate]) {
    const int64_t begin = std::max(first, run.begin), end = std::min(last, run.end);
    if (begin >= end) continue;
    int64_t n = 0;
    for (const RowTap* row = rows.begin(h); row != rows.end(h); ++row)
      for (const ColumnTap& tap : run.taps)
        taps[n++] = {row->row * f.x.sH + tap.source * f.x.sW, rate * g.taps() + row->a * g.kw() + tap.b};
    sum_run<T>({taps, n, x + begin * x_step + c0, x_step, w + c0, g.C, 0}, bias ? bias + channel : nullptr,
               y + (begin - first) * y_step, y_step, end - begin, c1 - c0, channel, epilogue);
  }
}

// Two output rows h and g (the next one of the order) of a 3x3 window at stride 1, at pixels where every tap
// is inside: the four rows of x that they read are loaded once for both.
template <class T>
__attribute__((noinline)) void forward_two_rows(const ForwardPlan& f, const T* x, const T* w, const T* bias,
                                                int64_t rate, int64_t h, const Run& run, int64_t c0,
                                                int64_t c1, T* y, int64_t y_step, int64_t y_row) {
  constexpr int64_t L = Pair<T>::lanes;
  const Geometry& g = f.geometry;
  const int64_t r = g.columns[rate].r, row_step = g.rows[rate].r * f.x.sH;
  const T* source = x + f.rows[rate].begin(h)->row * f.x.sH + (run.begin + run.taps[0].source) * f.x.sW;
  for (int64_t pair = c0; pair < c1; pair += L) {
    const int64_t c = c0 + pair_start(pair - c0, c1 - c0, L);
    Pair<T> weight[9];
#pragma GCC unroll 16
    for (int i = 0; i < 9; ++i) weight[i] = load2(w + (rate * 9 + i) * g.C + c);
    const Pair<T> start = bias ? load2(bias + rate * g.C + c) : Pair<T>{};
    const T* in = source + c;
    T* out = y + run.begin * y_step + c - c0;
    int64_t left = run.end - run.begin;
    const auto pixels = [&](auto count) __attribute__((always_inline)) {
      Pair<T> upper[count], lower[count];
#pragma GCC unroll 8
      for (int p = 0; p < count; ++p) upper[p] = lower[p] = start;
#pragma GCC unroll 16
      for (int a = 0; a < 4; ++a)
#pragma GCC unroll 16
        for (int b = 0; b < 3; ++b)
#pragma GCC unroll 8
          for (int p = 0; p < count; ++p) {
            const Pair<T> v = load2(in + a * row_step + (b * r + p) * f.x.sW);
            if (a < 3) upper[p] = fma(weight[a * 3 + b], v, upper[p]);
            if (a > 0) lower[p] = fma(weight[a * 3 - 3 + b], v, lower[p]);
          }
#pragma GCC unroll 8
      for (int p = 0; p < count; ++p) {
        store2(out + p * y_step, upper[p]);
        store2(out + y_row + p * y_step, lower[p]);
      }
      in += count * f.x.sW;
      out += count * y_step;
      left -= count;
    };
    while (left >= 2) pixels(std::integral_constant<int, 2>());
    while (left > 0) pixels(std::integral_constant<int, 1>());
  }
}

// Items [first, last) of (image, slab of channels, output row): every rate of that row, so that x is read
// once.
template <class T>
void forward_channels_last(const ForwardPlan& f, const T* x, const T* w, const T* bias, T* y, int64_t first,
                           int64_t last) {
  const Geometry& g = f.geometry;
  const int64_t n_slabs = g.slabs(f.slab), H = g.H_out(), W = g.W_out(), y_step = g.R * g.C;
  const Identity identity;
  for (int64_t item = first; item < last; ++item) {
    const int64_t image = item / H / n_slabs, c0 = item / H % n_slabs * f.slab, h = f.order[item % H];
    const int64_t c1 = g.slab_end(c0, f.slab);
    const T* x_image = x + image * f.x.sB;
    const auto out = [&](int64_t row) { return y + (image * H + row) * W * y_step + c0; };
    if (f.pairs(h) && item + 1 < last && item % H + 1 < H && f.order[item % H + 1] == h + g.rows[0].r &&
        f.pairs(h + g.rows[0].r) && c1 - c0 >= Pair<T>::lanes && kWalks) {
      const int64_t below = h + g.rows[0].r, y_row = (below - h) * W * y_step;
      for (const Run& run : f.runs[0])
        if (run.taps.size() == 3) {
          forward_two_rows(f, x_image, w, bias, 0, h, run, c0, c1, out(h), y_step, y_row);
        } else {
          forward_row(f, x_image, w, bias, 0, h, run.begin, run.end, c0, c1, out(h) + run.begin * y_step,
                      y_step, identity);
          forward_row(f, x_image, w, bias, 0, below, run.begin, run.end, c0, c1,
                      out(below) + run.begin * y_step, y_step, identity);
        }
      ++item;
      continue;
    }
    for (int64_t rate = 0; rate < g.R; ++rate)
      forward_row(f, x_image, w, bias, rate, h, 0, W, c0, c1, out(h) + rate * g.C, y_step, identity);
  }
}

}  // namespace SEGKERNELS_ISA
}  // namespace
}  // namespace segkernels

#include "depthwise_conv2d/cpu_backward.h"
#include "depthwise_conv2d/cpu_planes.h"
