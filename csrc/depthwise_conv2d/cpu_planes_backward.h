// Backward of the depthwise convolution on the CPU, NCHW. Included by cpu_planes.h, once per instruction set.

namespace segkernels {
namespace {
namespace SEGKERNELS_ISA {

// V vectors from vector v0 on of `count` rows of dX, and their share of dW: sums[t] += x · dy_t, lane by
// lane.
template <int K, int V, class A, class T>
void backward_vectors(const std::vector<RowGroup<A>>& groups, const A* x, int64_t x_pitch, int64_t v0,
                      const Mask* inside, T* dx, int64_t pitch, int64_t count) {
  constexpr int64_t L = Vec<A>::lanes;
  Vec<A> xs[kRows][V], acc[kRows][V];
#pragma GCC unroll 16
  for (int j = 0; j < kRows; ++j)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      xs[j][v] = j < count ? load<A>(x + j * x_pitch + (v0 + v) * L, inside[v0 + v]) : splat(A(0));
      acc[j][v] = splat(A(0));
    }
  for (const RowGroup<A>& group : groups)
    for (const PlaneTap& tap : *group.taps) {
      Vec<A> w[K], sums[K];
#pragma GCC unroll 8
      for (int a = 0; a < K; ++a) {
        w[a] = splat(group.w[a * group.step + tap.b]);
        sums[a] = load<A>(group.sums + (a * group.step + tap.b) * L);
      }
      const Mask* mask = tap.masks + v0;
#pragma GCC unroll 16
      for (int m = 0; m < kRows + K - 1; ++m) {
        if (!group.source[m]) continue;
        const A* source = group.source[m] + tap.offset + v0 * L;
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
          const Vec<A> dy = load<A>(source + v * L, mask[v]);
#pragma GCC unroll 8
          for (int a = 0; a < K; ++a)
            if (a <= m && m < a + kRows) {
              const int j = m - a;
              acc[j][v] = fma(w[a], dy, acc[j][v], mask[v]);
              if (j < count) sums[a] = fma(xs[j][v], dy, sums[a], mask[v]);
            }
        }
      }
#pragma GCC unroll 8
      for (int a = 0; a < K; ++a) store(group.sums + (a * group.step + tap.b) * L, sums[a]);
    }
  if (!dx) return;
#pragma GCC unroll 16
  for (int j = 0; j < kRows; ++j)
    if (j < count)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) store(dx + j * pitch + (v0 + v) * L, acc[j][v], inside[v0 + v]);
}

template <int K, class A, class T>
void backward_tile(const Columns<A>& columns, const std::vector<RowGroup<A>>& groups, const A* x,
                   int64_t x_pitch, T* dx, int64_t pitch, int64_t count) {
  const Mask* inside = columns.masks.data();
  for (int64_t v = 0; v < columns.vectors; v += columns.block) {
    const int64_t V = std::min(columns.block, columns.vectors - v);
    if (V == 1) backward_vectors<K, 1>(groups, x, x_pitch, v, inside, dx, pitch, count);
    if (V == 2) backward_vectors<K, 2>(groups, x, x_pitch, v, inside, dx, pitch, count);
    if constexpr (kMaxVectors > 2)
      if (V == 3) backward_vectors<K, 3>(groups, x, x_pitch, v, inside, dx, pitch, count);
  }
}

template <class A>
A sum_plane(const Plane<A>& p, int64_t H, int64_t W) {
  constexpr int64_t L = Vec<A>::lanes;
  Vec<A> s = splat(A(0));
  for (int64_t h = 0; h < H; ++h)
    for (int64_t i = 0; i < W; i += L) s = s + load<A>(p.data + h * p.row + i, lane_range<A>(0, W - i));
  return sum(s);
}

// out[t] = the sum of the lanes of sums[t].
template <class A>
void sum_lanes(const A* sums, int64_t n, A* out) {
  constexpr int64_t L = Vec<A>::lanes;
  std::fill(out, out + n, A(0));
  for (int64_t i = 0; i < L; ++i)
    for (int64_t t = 0; t < n; ++t) out[t] += sums[t * L + i];
}

// Calls f(K) with the row taps that are worked on together, as a constant: all n of them where there are
// kernels for that, else one.
template <class F>
void by_taps(int64_t n, const F& f) {
  if (n == 2) return f(std::integral_constant<int, 2>());
  if (n == 3) return f(std::integral_constant<int, 3>());
  if (n == 5) return f(std::integral_constant<int, 5>());
  f(std::integral_constant<int, 1>());
}

// The backward of one plane after the other, and the memory for it.
template <class T>
class PlaneBackward {
  using A = acc_t<T>;
  static constexpr int64_t L = Vec<A>::lanes;

 public:
  explicit PlaneBackward(const BackwardPlan& f)
      : f_(f),
        g_(f.geometry),
        axis_(g_.rows[0]),
        s_(g_.columns[0].s),
        part_size_(ceil_div(g_.W(), s_)),
        dy_size_(plane_size(g_.H_out(), g_.W_out(), 1)),
        tiling_(g_.H(), g_.R == 1 ? std::lcm(axis_.s, axis_.r) : axis_.s, kRows + axis_.k - 1,
                axis_.r * (axis_.k - 1) - axis_.p, g_.H_out(),
                g_.R == 1 && axis_.s == 1 && s_ == 1 && g_.W() == g_.W_out() &&
                    is_dense<A, T>(f.x.sH, g_.W()) && is_dense<A, T>(f.dy.sH, g_.W())),
        x_memory_(plane_size(g_.H(), g_.W(), s_)),
        dy_memory_(g_.R * dy_size_),
        parts_(s_ * kRows * part_size_),
        line_(g_.W()),
        weights_(g_.R * g_.taps()),
        sums_(weights_.size() * L),
        dys_(g_.R) {
    for (int64_t h = 0; h < axis_.s; ++h) taps_.push_back(reaching(h));
    for (int64_t rows : tiling_.kinds)
      for (int64_t c = 0; c < s_; ++c)
        columns_.emplace_back(g_.backward_columns(c), g_.R, ceil_div(g_.W() - c, s_), 1, 0, rows);
  }

  // dX, and this image's share of dW [B, R, C, k_h, k_w] and db [B, R, C]; null where not wanted.
  void run(int64_t image, int64_t c, const T* x, const T* dy, const T* w, T* dx, A* dw, A* db) {
    const int64_t n_taps = g_.taps();
    wants_dw_ = dw;
    if (dw) x_ = read_plane(x + image * f_.x.sB + c * f_.x.sC, f_.x.sH, g_.H(), g_.W(), s_, x_memory_.data());
    for (int64_t rate = 0; rate < g_.R; ++rate) {
      dys_[rate] = read_plane(dy + image * f_.dy.sB + (rate * g_.C + c) * f_.dy.sC, f_.dy.sH, g_.H_out(),
                              g_.W_out(), 1, dy_memory_.data() + rate * dy_size_);
      widen_row<A>(w + (rate * g_.C + c) * n_taps, n_taps, weights_.data() + rate * n_taps);
      if (db) db[(image * g_.R + rate) * g_.C + c] = sum_plane(dys_[rate], g_.H_out(), g_.W_out());
    }
    std::fill(sums_.begin(), sums_.end(), A(0));
    T* dx_plane = dx ? dx + (image * g_.C + c) * g_.H() * g_.W() : nullptr;
    if (dx || dw)
      tiling_.for_each([&](size_t kind, int64_t h, int64_t count) { tile(kind, h, count, dx_plane); });
    for (int64_t rate = 0; dw && rate < g_.R; ++rate)
      sum_lanes(sums_.data() + rate * n_taps * L, n_taps, dw + ((image * g_.R + rate) * g_.C + c) * n_taps);
  }

 private:
  // The row taps that reach the rows of one residue modulo the stride, n in a group.
  struct ReachingTaps {
    int64_t n = 1;
    std::vector<RowGroup<A>> groups;
    std::vector<std::pair<int64_t, int64_t>> sources;  // [group] rate, and c: row h reads (h + c) / s first
  };

  // `count` rows d apart from row h on; their parts are joined in dX.
  void tile(size_t kind, int64_t h, int64_t count, T* dx) {
    const int64_t W = g_.W(), d = tiling_.d;
    ReachingTaps& taps = taps_[h % axis_.s];
    find_sources(taps, h);
    for (int64_t part = 0; part < s_; ++part) {
      const Columns<A>& columns = columns_[kind * s_ + part];
      for (size_t i = 0; i < taps.groups.size(); ++i)
        taps.groups[i].taps = &columns.taps[taps.sources[i].first];
      const A* x = wants_dw_ ? x_.data + part * x_.part + h * x_.row : nullptr;
      if (s_ == 1)
        sum_part(columns, taps, x, dx ? dx + h * W : nullptr, d * W, count);
      else
        sum_part(columns, taps, x, dx ? parts_.data() + part * kRows * part_size_ : nullptr, part_size_,
                 count);
    }
    for (int64_t j = 0; dx && s_ > 1 && j < count; ++j) {
      T* row = dx + (h + j * d) * W;
      prefetch(row + kAhead / sizeof(T), W);
      join_row(parts_.data() + j * part_size_, kRows * part_size_, s_, W, row, line_.data());
    }
  }

  template <class To>
  void sum_part(const Columns<A>& columns, const ReachingTaps& taps, const A* x, To* to, int64_t pitch,
                int64_t count) {
    by_taps(taps.n, [&](auto K) {
      if (wants_dw_)
        backward_tile<K>(columns, taps.groups, x, tiling_.d * x_.row, to, pitch, count);
      else
        sum_rows<kRows, K>(columns, taps.groups, A(0), to, pitch, count);
    });
  }

  // Those of row h.
  ReachingTaps reaching(int64_t h) {
    ReachingTaps taps;
    for (int64_t rate = 0; rate < g_.R; ++rate) {
      const Axis& axis = g_.rows[rate];
      const int64_t step = axis.s / std::gcd(axis.s, axis.r);
      int64_t a = 0;
      while (a < axis.k && (h + axis.p - a * axis.r) % axis.s) ++a;
      if (g_.R == 1) taps.n = ceil_div(axis.k - a, step);
      by_taps(taps.n, [&](auto K) {
        for (; a < axis.k; a += K * step) {  // K taps a, a + step, …; the last first: their sources ascend
          const int64_t last = a + (K - 1) * step, weight = rate * g_.taps() + last * g_.kw();
          taps.groups.push_back(
              {{}, weights_.data() + weight, sums_.data() + weight * L, -step * g_.kw(), nullptr});
          taps.sources.push_back({rate, axis.p - last * axis.r});
        }
      });
    }
    return taps;
  }

  // Where they read for the tile of rows at h.
  void find_sources(ReachingTaps& taps, int64_t h) {
    const int64_t down = tiling_.d / axis_.s, n = kRows + taps.n - 1;
    for (size_t i = 0; i < taps.groups.size(); ++i) {
      const auto [rate, c] = taps.sources[i];
      const int64_t first = (h + c) / axis_.s;
      for (int64_t m = 0; m < n; ++m) {
        const int64_t row = first + m * down;
        taps.groups[i].source[m] =
            row >= 0 && row < axis_.out ? dys_[rate].data + row * dys_[rate].row : nullptr;
      }
    }
  }

  const BackwardPlan& f_;
  const Geometry& g_;
  const Axis& axis_;
  int64_t s_, part_size_, dy_size_;
  Tiling tiling_;                    // rows d apart reach the same taps
  std::vector<Columns<A>> columns_;  // [kind of long row][part]
  std::vector<A> x_memory_, dy_memory_, parts_, line_, weights_, sums_;
  bool wants_dw_ = false;
  Plane<A> x_{};
  std::vector<Plane<A>> dys_;       // [rate]
  std::vector<ReachingTaps> taps_;  // [row modulo the stride]
};

// Items [first, last) of (image, channel).
template <class T>
void backward_planes(const BackwardPlan& f, const T* x, const T* dy, const T* w, T* dx, acc_t<T>* dw,
                     acc_t<T>* db, int64_t first, int64_t last) {
  PlaneBackward<T> plane(f);
  for (int64_t item = first; item < last; ++item)
    plane.run(item / f.geometry.C, item % f.geometry.C, x, dy, w, dx, dw, db);
}

// out[i] = Σ_b sums[b][i].
template <class T>
void add_images(const acc_t<T>* sums, int64_t B, int64_t n, T* out) {
  using A = acc_t<T>;
  constexpr int64_t L = Vec<A>::lanes;
  for (int64_t i = 0; i < n; i += L) {
    const Mask mask = lane_range<A>(0, n - i);
    Vec<A> s = splat(A(0));
    for (int64_t b = 0; b < B; ++b) s = s + load<A>(sums + b * n + i, mask);
    store(out + i, s, mask);
  }
}

}  // namespace SEGKERNELS_ISA
}  // namespace
}  // namespace segkernels
