// The backward of the depthwise convolution on the CPU, channels_last; the last part of cpu_kernels.h.

namespace segkernels {
namespace {
namespace SEGKERNELS_ISA {

// P pixels of up to a pair of channels, `sums` those of the pair: dX = Σ_t w[t] · dy_t and dW[t] += Σ_p x[p]
// · dy_t, from one read of dy_t.
template <int P, bool Partial, class T>
SEGKERNELS_INLINE void backward_tile(const Products<T>& t, const T* x, int64_t x_step, T* dx, int64_t dx_step,
                                     acc_t<T>* sums, int64_t sums_step, int64_t c, int64_t count) {
  using A = acc_t<T>;
  constexpr int64_t L = Vec<A>::lanes;
  Pair<T> xs[P], acc[P];
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) {
    xs[p] = load_channels<Partial>(x + p * x_step + c, count);
    acc[p] = Pair<T>{};
  }
  for (const Tap* tap = t.taps; tap < t.taps + t.n; ++tap) {
    A* sum = sums + tap->weight * sums_step;
    const Pair<T> w = load_channels<Partial>(t.w + tap->weight * t.w_step + c, count);
    Pair<T> dw = {load<A>(sum), load<A>(sum + L)};
    const T* source = t.source + tap->offset + c;
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      const Pair<T> dy = load_channels<Partial>(source + p * t.step, count);
      acc[p] = fma(w, dy, acc[p]);
      dw = fma(xs[p], dy, dw);
    }
    store(sum, dw.lo);
    store(sum + L, dw.hi);
  }
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) store_channels<Partial>(dx + p * dx_step + c, acc[p], count);
}

template <int P, class T>
void backward_pixels(const Products<T>& t, const T* x, int64_t x_step, T* dx, int64_t dx_step, acc_t<T>* sums,
                     int64_t sums_step, int64_t channels) {
  constexpr int64_t L = Pair<T>::lanes;
  if (channels >= L) {
    for (int64_t c = 0; c < channels; c += L)
      backward_tile<P, false>(t, x, x_step, dx, dx_step, sums + c, sums_step, pair_start(c, channels, L), L);
  } else {
    Products<T> one = t;
    for (int p = 0; p < P; ++p, one.source += t.step)
      backward_tile<1, true>(one, x + p * x_step, x_step, dx + p * dx_step, dx_step, sums, sums_step, 0,
                             channels);
  }
}

// The same for n pixels of N taps and one pair of channels after the other: the sums of dW stay in registers.
template <int N, class T>
__attribute__((noinline)) void backward_walk(const Products<T>& t, const T* x, int64_t x_step, int64_t x_next,
                                             T* dx, int64_t dx_step, acc_t<T>* sums, int64_t sums_step,
                                             int64_t n, int64_t channels) {
  using A = acc_t<T>;
  constexpr int64_t L = Pair<T>::lanes;
  for (int64_t pair = 0; pair < channels; pair += L) {
    const int64_t c = pair_start(pair, channels, L);
    Pair<T> dw[N];
    const T *w[N], *source[N];
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      A* sum = sums + t.taps[i].weight * sums_step + pair;
      dw[i] = {load<A>(sum), load<A>(sum + L / 2)};
      w[i] = t.w + t.taps[i].weight * t.w_step + c;
      source[i] = t.source + t.taps[i].offset + c;
    }
    const T* in = x + c;
    T* out = dx + c;
    int64_t at = 0, left = n;
    const auto pixels = [&](auto count) __attribute__((always_inline)) {
      Pair<T> xs[count], acc[count];
      fetch_ahead(source[N - 1] + at + t.next, count, t.step);
      fetch_ahead(in + x_next, count, x_step);
#pragma GCC unroll 8
      for (int p = 0; p < count; ++p) {
        xs[p] = load2(in + p * x_step);
        acc[p] = Pair<T>{};
      }
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) {
        const Pair<T> weight = load2(w[i]);
#pragma GCC unroll 8
        for (int p = 0; p < count; ++p) {
          const Pair<T> dy = load2(source[i] + at + p * t.step);
          acc[p] = fma(weight, dy, acc[p]);
          dw[i] = fma(xs[p], dy, dw[i]);
        }
      }
#pragma GCC unroll 8
      for (int p = 0; p < count; ++p) store2(out + p * dx_step, acc[p]);
      at += count * t.step;
      in += count * x_step;
      out += count * dx_step;
      left -= count;
    };
    while (left >= 2) pixels(std::integral_constant<int, 2>());
    while (left > 0) pixels(std::integral_constant<int, 1>());
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      A* sum = sums + t.taps[i].weight * sums_step + pair;
      store(sum, dw[i].lo);
      store(sum + L / 2, dw[i].hi);
    }
  }
}

template <class T>
void backward_run(Products<T> t, const T* x, int64_t x_step, int64_t x_next, T* dx, int64_t dx_step,
                  acc_t<T>* sums, int64_t sums_step, int64_t n, int64_t channels) {
  constexpr int P = kBackwardPixels;
  if (kWalks && channels >= Pair<T>::lanes) {
    if (t.n == 9) return backward_walk<9>(t, x, x_step, x_next, dx, dx_step, sums, sums_step, n, channels);
    if (t.n == 6) return backward_walk<6>(t, x, x_step, x_next, dx, dx_step, sums, sums_step, n, channels);
    if (t.n == 4) return backward_walk<4>(t, x, x_step, x_next, dx, dx_step, sums, sums_step, n, channels);
  }
  for (; n >= P; n -= P, t.source += P * t.step, x += P * x_step, dx += P * dx_step)
    backward_pixels<P>(t, x, x_step, dx, dx_step, sums, sums_step, channels);
  for (; n > 0; --n, t.source += t.step, x += x_step, dx += dx_step)
    backward_pixels<1>(t, x, x_step, dx, dx_step, sums, sums_step, channels);
}

// The rows [first, last) of the ordered rows of all images, channels c0 … c1−1 (c0 a multiple of 32). `sums`
// are this part's own, zeroed by the caller, in load2's order: [R·k_h·k_w rows of dW, then R of db][C rounded
// up to 32]. sums null: dX alone. dx null: dW alone (dX goes to a row that is thrown away).
template <class T>
void backward_rows(const BackwardPlan& f, const T* x, const T* dy, const T* w, T* dx, acc_t<T>* sums,
                   int64_t first, int64_t last, int64_t c0, int64_t c1) {
  const Geometry& g = f.geometry;
  const int64_t s = g.columns[0].s, H = g.H(), W = g.W(), channels = c1 - c0;
  const Identity identity;
  std::vector<Tap> taps(g.R * g.taps());
  std::vector<T> unwanted(dx ? 0 : W * g.C);
  for (int64_t item = first; item < last; ++item) {
    const int64_t image = item / H, h = f.order[item % H];
    const T* x_row = x + image * f.x.sB + h * f.x.sH + c0;
    const T* dy_image = dy + image * f.dy.sB + c0;
    T* dx_row = (dx ? dx + (image * H + h) * W * g.C : unwanted.data()) + c0;
    for (int64_t c = 0; c < s; ++c)
      for (const Run& run : f.runs[c]) {
        int64_t n = 0;
        for (const RowTap* row = f.rows.begin(h); row != f.rows.end(h); ++row)
          for (const ColumnTap& tap : run.taps)
            if (tap.rate == row->rate)
              taps[n++] = {row->row * f.dy.sH + tap.source * f.dy.sW + tap.rate * g.C,
                           tap.rate * g.taps() + row->a * g.kw() + tap.b};
        const Products<T> t{taps.data(),     n, dy_image + run.begin * f.dy.sW, f.dy.sW, w + c0, g.C,
                            f.next * f.dy.sH};
        const int64_t column = c + run.begin * s, count = run.end - run.begin;
        if (sums)
          backward_run(t, x_row + column * f.x.sW, s * f.x.sW, f.next * f.x.sH, dx_row + column * g.C,
                       s * g.C, sums + c0, f.padded_C, count, channels);
        else
          sum_run<T>(t, nullptr, dx_row + column * g.C, s * g.C, count, channels, c0, identity);
      }
  }
}

// sums[ρ][c] += Σ dy over the rows [first, last) of the ordered output rows of all images.
template <class T>
void bias_rows(const BackwardPlan& f, const T* dy, acc_t<T>* sums, int64_t first, int64_t last, int64_t c0,
               int64_t c1) {
  using A = acc_t<T>;
  constexpr int64_t L = Pair<T>::lanes;
  const Geometry& g = f.geometry;
  const int64_t H = g.H_out(), W = g.W_out(), channels = c1 - c0;
  for (int64_t item = first; item < last; ++item)
    for (int64_t rate = 0; rate < g.R; ++rate) {
      const T* row = dy + item / H * f.dy.sB + f.order_out[item % H] * f.dy.sH + rate * g.C + c0;
      A* sum = sums + rate * f.padded_C + c0;
      for (int64_t c = 0; c < channels; c += L) {
        Pair<T> s{load<A>(sum + c), load<A>(sum + c + L / 2)};
        for (int64_t i = 0; i < W; ++i) {
          const T* p = row + i * f.dy.sW + pair_start(c, channels, L);
          const Pair<T> d = channels >= L ? load2(p) : load2(p, channels);
          s = {s.lo + d.lo, s.hi + d.hi};
        }
        store(sum + c, s.lo);
        store(sum + c + L / 2, s.hi);
      }
    }
}

// Rows [first, last) of the sums [parts][R·k_h·k_w + R][padded C], added over the parts: dw [R, C, k_h, k_w],
// db [R, C].
template <class T>
void add_parts(const BackwardPlan& f, const acc_t<T>* sums, T* dw, T* db, int64_t first, int64_t last) {
  using A = acc_t<T>;
  constexpr int64_t L = Pair<T>::lanes;
  const Geometry& g = f.geometry;
  const int64_t taps = g.taps(), n_rows = g.R * (taps + 1);
  T line[L];
  for (int64_t row = first; row < last; ++row) {
    const int64_t t = row < g.R * taps ? row % taps : 0,
                  rate = row < g.R * taps ? row / taps : row - g.R * taps;
    const int64_t step = row < g.R * taps ? taps : 1;
    T* out = row < g.R * taps ? dw : db;
    if (!out) continue;
    for (int64_t c = 0; c < g.C; c += L) {
      Pair<T> s{};
      for (int64_t part = 0; part < f.parts; ++part) {
        const A* p = sums + (part * n_rows + row) * f.padded_C + c;
        s = {s.lo + load<A>(p), s.hi + load<A>(p + L / 2)};
      }
      store2(line, s);
      const int64_t c_first = pair_start(c, g.C, L);
      for (int64_t i = 0; i < std::min(L, g.C); ++i) out[(rate * g.C + c_first + i) * step + t] = line[i];
    }
  }
}

}  // namespace SEGKERNELS_ISA
}  // namespace
}  // namespace segkernels
