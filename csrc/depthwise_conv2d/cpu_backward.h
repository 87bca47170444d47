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

// J rows of x and dX, which lie x_row and dx_row apart, and the sums of dW.
template <class T>
struct BackwardRows {
  const T* x;
  T* dx;
  acc_t<T>* sums[3];  // of each row tap: column tap 0; sums_step from tap to tap
  int64_t x_step, x_row, dx_step, dx_row, sums_step;
  int64_t dy_next, x_next;  // to the rows that follow in the order of rows
};

// dX, and its share of dW, of J rows, as slide_forward: a number of dy is loaded once for its three column
// taps. Pixel 0 of a row reads column `column` at tap 0.
template <int A, int J, class T>
__attribute__((noinline)) void slide_backward(const Sliding<T>& t, int64_t column,
                                              const BackwardRows<T>& rows, int64_t n, int64_t channels) {
  using S = Strip<T>;
  using V = typename S::V;
  const int64_t r = t.r, columns = t.columns, step = t.step, x_step = rows.x_step, x_row = rows.x_row,
                dx_step = rows.dx_step, dx_row = rows.dx_row;
  for (int64_t strip = 0; strip < strips_end<T>(channels); strip += S::lanes) {
    const int64_t c = strip_start<T>(strip, channels);
    const T *source[A + J - 1], *x = rows.x + c, *dy_ahead = t.source[0] + rows.dy_next + c,
                                *x_ahead = x + rows.x_next;
    T* dx = rows.dx + c;
    V w[A][3], dw[A][3];
#pragma GCC unroll 4
    for (int m = 0; m < A + J - 1; ++m) source[m] = t.source[m] + c;
#pragma GCC unroll 3
    for (int a = 0; a < A; ++a)
#pragma GCC unroll 3
      for (int b = 0; b < 3; ++b) {
        w[a][b] = S::load_map(t.w[a] + b * t.w_step + c);
        dw[a][b] = S::load_sum(rows.sums[a] + b * rows.sums_step + strip);
      }
    for (int64_t i = 0; i < std::min(r, n); ++i) {
      V acc[J][3]{}, xs[J][3]{};  // of the pixels at, at + r, at + 2r
      Mask inside[3]{};           // whether they are pixels of the row
      for (int64_t at = i - 2 * r; at < n; at += r) {
        inside[0] = inside[1];
        inside[1] = inside[2];
        inside[2] = at + 2 * r < n ? all_lanes<acc_t<T>> : 0;
#pragma GCC unroll 2
        for (int j = 0; j < J; ++j) {
          acc[j][0] = acc[j][1];
          acc[j][1] = acc[j][2];
          acc[j][2] = V{};
          xs[j][0] = xs[j][1];
          xs[j][1] = xs[j][2];
          if (inside[2]) {
            xs[j][2] = S::load_map(x + j * x_row + (at + 2 * r) * x_step);
            __builtin_prefetch(x_ahead + j * x_row + (at + 2 * r) * x_step, 0, 2);
          }
        }
        if (const int64_t from = column + at; from >= 0 && from < columns)
#pragma GCC unroll 4
          for (int m = 0; m < A + J - 1; ++m) {
            const V dy = S::load_map(source[m] + from * step);
            if (m < J) __builtin_prefetch(dy_ahead + (source[m] - source[0]) + from * step, 0, 2);
#pragma GCC unroll 2
            for (int j = 0; j < J; ++j)
#pragma GCC unroll 3
              for (int b = 0; b < 3; ++b)
                if (m - j >= 0 && m - j < A) {
                  acc[j][b] = fma(w[m - j][b], dy, acc[j][b]);
                  dw[m - j][b] = fma(xs[j][b], dy, dw[m - j][b], inside[b]);
                }
          }
#pragma GCC unroll 2
        for (int j = 0; j < J; ++j)
          if (at >= 0) S::store_map(dx + j * dx_row + at * dx_step, acc[j][0]);
      }
    }
#pragma GCC unroll 3
    for (int a = 0; a < A; ++a)
#pragma GCC unroll 3
      for (int b = 0; b < 3; ++b) S::store_sum(rows.sums[a] + b * rows.sums_step + strip, dw[a][b]);
  }
}

template <class T>
void backward_run(Products<T> t, const T* x, int64_t x_step, T* dx, int64_t dx_step, acc_t<T>* sums,
                  int64_t sums_step, int64_t n, int64_t channels) {
  constexpr int P = kBackwardPixels;
  for (; n >= P; n -= P, t.source += P * t.step, x += P * x_step, dx += P * dx_step)
    backward_pixels<P>(t, x, x_step, dx, dx_step, sums, sums_step, channels);
  for (; n > 0; --n, t.source += t.step, x += x_step, dx += dx_step)
    backward_pixels<1>(t, x, x_step, dx, dx_step, sums, sums_step, channels);
}

// Two rows of pairs of vectors would not fit the registers.
template <class T>
constexpr bool kTwo = Strip<T>::lanes < Pair<T>::lanes;

// One row or, with `two`, that row and the one a rate below it (dX dx_down below). begin … end: the row taps
// of the row; sums null: dX alone, by the same sums as with dW.
template <class T>
void slide_rows(const BackwardPlan& f, const T* x, const T* dy, const T* w, T* dx, acc_t<T>* sums,
                const RowTap* begin, const RowTap* end, bool two, int64_t dx_down, int64_t channels) {
  const Geometry& g = f.geometry;
  const int64_t p = g.columns[0].p, r = g.columns[0].r, W = g.W(), down = two ? g.rows[0].r : 0;
  Sliding<T> t{{}, {}, g.W_out(), f.dy.sW, g.C, r};
  t.read(begin, end, dy, f.dy.sH, w);
  BackwardRows<T> rows{x,   dx,       {},         f.x.sW,           -down * f.x.sH,
                       g.C, -dx_down, f.padded_C, f.next * f.dy.sH, f.next * f.x.sH};
  for (const RowTap* tap = begin; tap < end && sums; ++tap)
    rows.sums[tap - begin] = sums + tap->a * 3 * f.padded_C;
  if (two) {  // the lower row first: then sources ascend, and the upper row's last tap comes after them
    for (int m = 3; m > 0; --m) t.source[m] = t.source[m - 1];
    t.source[0] = t.source[1] + down * f.dy.sH;
    rows.x += down * f.x.sH;
    rows.dx += dx_down;
    rows.dy_next += down * f.dy.sH;
    rows.x_next += down * f.x.sH;
  }
  if (sums) {
    if constexpr (kTwo<T>)
      if (two) return slide_backward<3, 2>(t, p, rows, W, channels);
    by_row_taps(end - begin, [&](auto A) { slide_backward<A, 1>(t, p, rows, W, channels); });
  } else {
    for (const T*& taps : t.w) taps += 2 * g.C;  // column taps from the last to the first
    t.w_step = -g.C;
    const T* none = nullptr;
    if constexpr (kTwo<T>)
      if (two)
        return slide_forward<3, 2, Strip<T>>(t, p - 2 * r, none, rows.dx, g.C, rows.dx_row, W, channels);
    by_row_taps(end - begin, [&](auto A) {
      slide_forward<A, 1, Double<T>>(t, p - 2 * r, none, rows.dx, g.C, int64_t(0), W, channels);
    });
  }
}

// The rows [first, last) of the ordered rows of all images, channels c0 … c1−1 (c0 a multiple of 32). `sums`
// are this part's own, zeroed by the caller, in load2's order: [R·k_h·k_w rows of dW, then R of db][C rounded
// up to 32]. sums null: dX alone. dx null: dW alone (dX goes to rows that are thrown away).
template <class T>
void backward_rows(const BackwardPlan& f, const T* x, const T* dy, const T* w, T* dx, acc_t<T>* sums,
                   int64_t first, int64_t last, int64_t c0, int64_t c1) {
  const Geometry& g = f.geometry;
  const int64_t s = g.columns[0].s, H = g.H(), W = g.W(), channels = c1 - c0;
  std::vector<Tap> taps(g.R * g.taps());
  std::vector<T> unwanted(dx ? 0 : 2 * W * g.C);
  for (int64_t item = first; item < last; ++item) {
    const int64_t image = item / H, h = f.order[item % H];
    const T* x_row = x + image * f.x.sB + h * f.x.sH + c0;
    const T* dy_image = dy + image * f.dy.sB + c0;
    T* dx_row = (dx ? dx + (image * H + h) * W * g.C : unwanted.data()) + c0;
    const RowTap *begin = f.rows.begin(h), *end = f.rows.end(h);
    if constexpr (kSlides)
      if (g.R == 1 && g.kw() == 3 && s == 1 && channels >= Pair<T>::lanes && begin < end &&
          end - begin <= 3) {
        const bool two = kTwo<T> && item + 1 < last && share_rows(g, f.rows, f.order, item % H);
        slide_rows(f, x_row, dy_image, w + c0, dx_row, sums ? sums + c0 : nullptr, begin, end, two,
                   (dx ? g.rows[0].r : 1) * W * g.C, channels);
        item += two;
        continue;
      }
    for (int64_t c = 0; c < s; ++c)
      for (const Run& run : f.runs[c]) {
        int64_t n = 0;
        for (const RowTap* row = begin; row != end; ++row)
          for (const ColumnTap& tap : run.taps)
            if (tap.rate == row->rate)
              taps[n++] = {row->row * f.dy.sH + tap.source * f.dy.sW + tap.rate * g.C,
                           tap.rate * g.taps() + row->a * g.kw() + tap.b};
        const Products<T> t{taps.data(), n, dy_image + run.begin * f.dy.sW, f.dy.sW, w + c0, g.C};
        const int64_t column = c + run.begin * s, count = run.end - run.begin;
        if (sums)
          backward_run(t, x_row + column * f.x.sW, s * f.x.sW, dx_row + column * g.C, s * g.C, sums + c0,
                       f.padded_C, count, channels);
        else
          sum_run<T>(t, nullptr, dx_row + column * g.C, s * g.C, count, channels);
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
