// Depthwise convolution on the CPU, NCHW: vectors run along the rows of one plane, which stays in the first
// caches. Included by cpu_kernels.h, once per instruction set. Planes are read as numbers of the accumulation
// type; with column stride s they are split into s planes of every s-th column, so that every tap reads
// consecutive numbers.

namespace segkernels {
namespace {
namespace SEGKERNELS_ISA {

// A tile is kRows rows of up to kMaxVectors vectors, which stay in registers.
constexpr int kRows = 4;
constexpr int kMaxVectors = SEGKERNELS_VECTOR_BYTES == 64 ? 3 : 2;

// A column tap of a row of vectors: the number it reads at position 0 lies `offset` from the start of its
// source row.
struct PlaneTap {
  int64_t offset, b;
  const Mask* masks;  // the lanes of each vector that it reaches
};

// The columns of a row as vectors.
template <class A>
struct Columns {
  int64_t vectors, block;                   // block: vectors of a tile
  std::vector<Mask> masks;                  // [vector] inside the row, then [tap][vector]
  std::vector<std::vector<PlaneTap>> taps;  // [rate]

  // `step` columns of the source from one position to the next; parts of a source plane are `part` numbers
  // apart.
  Columns(const std::vector<ColumnTap>& column_taps, int64_t R, int64_t n, int64_t step, int64_t part)
      : vectors(ceil_div(n, Vec<A>::lanes)), masks((column_taps.size() + 1) * vectors), taps(R) {
    constexpr int64_t L = Vec<A>::lanes;
    block = ceil_div(vectors, std::max<int64_t>(1, ceil_div(vectors, kMaxVectors)));
    Mask* mask = masks.data();
    for (int64_t v = 0; v < vectors; ++v) *mask++ = lane_range<A>(0, n - v * L);
    for (const ColumnTap& tap : column_taps) {
      const int64_t column = -ceil_div(-tap.source, step);
      taps[tap.rate].push_back({(tap.source - column * step) * part + column, tap.b, mask});
      for (int64_t v = 0; v < vectors; ++v) *mask++ = lane_range<A>(tap.begin - v * L, tap.end - v * L);
    }
  }
};

// The row taps a = 0 … K−1 of a tile of rows, where row j reads source row j + a at tap a: their weights at
// w + a·step [k_w], their sums at sums + a·step·lanes [k_w] of vectors. A source row outside the map is null.
template <class A>
struct RowGroup {
  const A* source[kRows + kMaxKernel - 1];
  const A* w;
  A* sums;
  int64_t step;
  const std::vector<PlaneTap>* taps;
};

// Calls f(h, count) for all tiles of n rows: h, h + r, …, `count` of them. Rows r apart share their sources.
template <class F>
void for_each_tile(int64_t n, int64_t r, const F& f) {
  for (int64_t h0 = 0; h0 < n; h0 += kRows * r)
    for (int64_t h = h0; h < std::min(n, h0 + r); ++h) f(h, std::min<int64_t>(kRows, ceil_div(n - h, r)));
}

template <class A, class T>
void widen_row(const T* from, int64_t n, A* to) {
  constexpr int64_t L = Vec<A>::lanes;
  int64_t i = 0;
  for (; i + L <= n; i += L) store(to + i, load<A>(from + i));
  if (i < n) store(to + i, load<A>(from + i, lane_range<A>(0, n - i)), lane_range<A>(0, n - i));
}
template <class A, class T>
void narrow_row(const A* from, int64_t n, T* to) {
  constexpr int64_t L = Vec<A>::lanes;
  int64_t i = 0;
  for (; i + L <= n; i += L) store(to + i, load<A>(from + i));
  if (i < n) store(to + i, load<A>(from + i, lane_range<A>(0, n - i)), lane_range<A>(0, n - i));
}

// A plane of accumulation type: the columns c, c + s, … of part c from data + c·part, rows `row` numbers
// apart.
template <class A>
struct Plane {
  const A* data;
  int64_t row, part;
};

// The plane itself where it can be read in place, else a copy in `memory` ([s][H][⌈W/s⌉], then one row).
template <class A, class T>
Plane<A> read_plane(const T* x, int64_t sH, int64_t H, int64_t W, int64_t s, A* memory) {
  if constexpr (std::is_same_v<A, T>)
    if (s == 1) return {x, sH, 0};
  const int64_t n = ceil_div(W, s), part = H * n;
  if (s == 1 && sH == W) {
    widen_row<A>(x, H * W, memory);
  } else if (s == 1) {
    for (int64_t h = 0; h < H; ++h) widen_row<A>(x + h * sH, W, memory + h * W);
  } else {
    A* line = memory + s * part;
    for (int64_t h = 0; h < H; ++h) {
      widen_row<A>(x + h * sH, W, line);
      for (int64_t c = 0; c < s; ++c)
        for (int64_t i = 0; c + i * s < W; ++i) memory[c * part + h * n + i] = line[c + i * s];
    }
  }
  return {memory, n, part};
}
inline int64_t plane_size(int64_t H, int64_t W, int64_t s) { return s * H * ceil_div(W, s) + W; }

// -- sums over taps: y of the forward, dX of the backward -----------------------------------------

// V vectors from vector v0 on of J rows `pitch` apart, of which `count` are wanted: y = bias + Σ_t w[t] ·
// source_t, over the lanes that tap t reaches.
template <int J, int K, int V, class A, class T>
void sum_vectors(const std::vector<RowGroup<A>>& groups, A bias, int64_t v0, const Mask* inside, T* y,
                 int64_t pitch, int64_t count) {
  constexpr int64_t L = Vec<A>::lanes;
  Vec<A> acc[J][V];
#pragma GCC unroll 16
  for (int j = 0; j < J; ++j)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[j][v] = splat(bias);
  for (const RowGroup<A>& group : groups)
    for (const PlaneTap& tap : *group.taps) {
      Vec<A> w[K];
#pragma GCC unroll 8
      for (int a = 0; a < K; ++a) w[a] = splat(group.w[a * group.step + tap.b]);
      const Mask* mask = tap.masks + v0;
#pragma GCC unroll 16
      for (int m = 0; m < J + K - 1; ++m) {
        if (!group.source[m]) continue;
        const A* source = group.source[m] + tap.offset + v0 * L;
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
          const Vec<A> x = load<A>(source + v * L, mask[v]);
#pragma GCC unroll 8
          for (int a = 0; a < K; ++a)
            if (a <= m && m < a + J) acc[m - a][v] = fma(w[a], x, acc[m - a][v], mask[v]);
        }
      }
    }
#pragma GCC unroll 16
  for (int j = 0; j < J; ++j)
    if (j < count)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) store(y + j * pitch + (v0 + v) * L, acc[j][v], inside[v0 + v]);
}

template <int J, int K, class A, class T>
void sum_rows(const Columns<A>& columns, const std::vector<RowGroup<A>>& groups, A bias, T* y, int64_t pitch,
              int64_t count) {
  const Mask* inside = columns.masks.data();
  for (int64_t v = 0; v < columns.vectors; v += columns.block) {
    const int64_t V = std::min(columns.block, columns.vectors - v);
    if (V == 1) sum_vectors<J, K, 1>(groups, bias, v, inside, y, pitch, count);
    if (V == 2) sum_vectors<J, K, 2>(groups, bias, v, inside, y, pitch, count);
    if constexpr (kMaxVectors > 2)
      if (V == 3) sum_vectors<J, K, 3>(groups, bias, v, inside, y, pitch, count);
  }
}

// Calls f with the number of row taps that a group holds, as a constant: all of them where the rows of a tile
// share sources, else 1.
template <class F>
void by_group(bool shared, int64_t k, const F& f) {
  if (shared && k == 3)
    f(std::integral_constant<int, 3>());
  else if (shared && k == 5)
    f(std::integral_constant<int, 5>());
  else
    f(std::integral_constant<int, 1>());
}

// -- forward --------------------------------------------------------------------------------------

// Items [first, last) of (image, channel): every rate of that plane. w [R, C, k_h, k_w], bias [R, C], y
// dense.
template <int K, class T>
void forward_groups(const ForwardPlan& f, const T* x, const T* w, const T* bias, T* y, int64_t first,
                    int64_t last) {
  using A = acc_t<T>;
  const Geometry& g = f.geometry;
  const int64_t s = g.columns[0].s, H = g.H_out(), W = g.W_out();
  const int64_t part_size = g.H() * ceil_div(g.W(), s);
  std::vector<Columns<A>> columns;
  for (int64_t rate = 0; rate < g.R; ++rate)
    columns.emplace_back(g.forward_columns(rate), g.R, W, s, part_size);
  std::vector<A> memory(plane_size(g.H(), g.W(), s));
  std::vector<RowGroup<A>> groups;
  A weights[kMaxKernel * kMaxKernel], shift = 0;
  for (int64_t item = first; item < last; ++item) {
    const int64_t image = item / g.C, c = item % g.C;
    const Plane<A> plane =
        read_plane(x + image * f.x.sB + c * f.x.sC, f.x.sH, g.H(), g.W(), s, memory.data());
    for (int64_t rate = 0; rate < g.R; ++rate) {
      widen_row<A>(w + (rate * g.C + c) * g.taps(), g.taps(), weights);
      if (bias) widen_row<A>(bias + rate * g.C + c, 1, &shift);
      T* y_plane = y + ((image * g.R + rate) * g.C + c) * H * W;
      const Axis& axis = g.rows[rate];
      const int64_t r = K > 1 ? axis.r : 1;  // between the rows of a tile
      for_each_tile(H, r, [&](int64_t h, int64_t count) {
        groups.clear();
        for (int64_t a = 0; a < axis.k; a += K) {
          RowGroup<A>& group = groups.emplace_back();
          for (int64_t m = 0; m < kRows + K - 1; ++m) {
            const int64_t row = (h + m * r) * axis.s - axis.p + a * axis.r;
            group.source[m] = row >= 0 && row < axis.in ? plane.data + row * plane.row : nullptr;
          }
          group.w = weights + a * g.kw();
          group.step = g.kw();
          group.taps = &columns[rate].taps[rate];
        }
        sum_rows<kRows, K>(columns[rate], groups, shift, y_plane + h * W, r * W, count);
      });
    }
  }
}
template <class T>
void forward_planes(const ForwardPlan& f, const T* x, const T* w, const T* bias, T* y, int64_t first,
                    int64_t last) {
  by_group(f.geometry.rows[0].s == 1, f.geometry.kh(),
           [&](auto K) { forward_groups<K>(f, x, w, bias, y, first, last); });
}

// -- backward -------------------------------------------------------------------------------------

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

// Items [first, last) of (image, channel): dX, and this image's share of dW [B, R, C, k_h, k_w] and db [B, R,
// C]; null where not wanted.
template <int K, class T>
void backward_groups(const BackwardPlan& f, const T* x, const T* dy, const T* w, T* dx, acc_t<T>* dw,
                     acc_t<T>* db, int64_t first, int64_t last) {
  using A = acc_t<T>;
  constexpr int64_t L = Vec<A>::lanes;
  const Geometry& g = f.geometry;
  const int64_t s = g.columns[0].s, H = g.H(), W = g.W(), H_out = g.H_out(), W_out = g.W_out(),
                n_taps = g.taps(), r = K > 1 ? g.rows[0].r : 1;  // r: between the rows of a tile
  const int64_t dy_size = plane_size(H_out, W_out, 1), part_size = ceil_div(W, s);
  std::vector<Columns<A>> columns;
  for (int64_t c = 0; c < s; ++c) columns.emplace_back(g.backward_columns(c), g.R, ceil_div(W - c, s), 1, 0);
  std::vector<A> x_memory(plane_size(H, W, s)), dy_memory(g.R * dy_size), line(W),
      parts(s * kRows * part_size);
  std::vector<A> weights(g.R * n_taps), sums(g.R * n_taps * L);
  std::vector<Plane<A>> dys(g.R);
  std::vector<RowGroup<A>> groups;

  // The row taps a − K + 1, …, a of a rate for the tile of rows at h, the last first: source rows ascend.
  const auto add_group = [&](int64_t rate, int64_t a, int64_t h) {
    const Axis& axis = g.rows[rate];
    RowGroup<A>& group = groups.emplace_back();
    for (int64_t m = 0; m < kRows + K - 1; ++m) {
      const int64_t t = h + m * r + axis.p - a * axis.r;
      const bool read = t >= 0 && t % axis.s == 0 && t / axis.s < H_out;
      group.source[m] = read ? dys[rate].data + t / axis.s * dys[rate].row : nullptr;
    }
    const int64_t weight = rate * n_taps + a * g.kw();
    group.w = weights.data() + weight;
    group.sums = sums.data() + weight * L;
    group.step = -g.kw();
  };
  for (int64_t item = first; item < last; ++item) {
    const int64_t image = item / g.C, c = item % g.C;
    Plane<A> plane{};
    if (dw) plane = read_plane(x + image * f.x.sB + c * f.x.sC, f.x.sH, H, W, s, x_memory.data());
    for (int64_t rate = 0; rate < g.R; ++rate) {
      dys[rate] = read_plane(dy + image * f.dy.sB + (rate * g.C + c) * f.dy.sC, f.dy.sH, H_out, W_out, 1,
                             dy_memory.data() + rate * dy_size);
      widen_row<A>(w + (rate * g.C + c) * n_taps, n_taps, weights.data() + rate * n_taps);
      if (db) db[(image * g.R + rate) * g.C + c] = sum_plane(dys[rate], H_out, W_out);
    }
    std::fill(sums.begin(), sums.end(), A(0));
    T* dx_plane = dx ? dx + (image * g.C + c) * H * W : nullptr;
    const auto tile = [&](const Columns<A>& columns, const A* x, auto* to, int64_t pitch, int64_t count) {
      if (dw)
        backward_tile<K>(columns, groups, x, r * plane.row, to, pitch, count);
      else
        sum_rows<kRows, K>(columns, groups, A(0), to, pitch, count);
    };
    if (dx || dw)
      for_each_tile(H, r, [&](int64_t h, int64_t count) {
        groups.clear();
        for (int64_t rate = 0; rate < g.R; ++rate)
          for (int64_t a = g.kh() - 1; a >= 0; a -= K) add_group(rate, a, h);
        for (int64_t part = 0; part < s; ++part) {
          for (size_t i = 0; i < groups.size(); ++i) groups[i].taps = &columns[part].taps[i * K / g.kh()];
          const A* from = dw ? plane.data + part * plane.part + h * plane.row : nullptr;
          if (s == 1)
            tile(columns[0], from, dx ? dx_plane + h * W : nullptr, r * W, count);
          else
            tile(columns[part], from, parts.data() + part * kRows * part_size, part_size, count);
        }
        for (int64_t j = 0; dx && s > 1 && j < count; ++j) {
          for (int64_t i = 0; i < W; ++i) line[i] = parts[(i % s * kRows + j) * part_size + i / s];
          narrow_row(line.data(), W, dx_plane + (h + j * r) * W);
        }
      });
    if (dw)
      for (int64_t rate = 0; rate < g.R; ++rate)
        sum_lanes(sums.data() + rate * n_taps * L, n_taps, dw + ((image * g.R + rate) * g.C + c) * n_taps);
  }
}
template <class T>
void backward_planes(const BackwardPlan& f, const T* x, const T* dy, const T* w, T* dx, acc_t<T>* dw,
                     acc_t<T>* db, int64_t first, int64_t last) {
  const Geometry& g = f.geometry;
  by_group(g.rows[0].s == 1 && g.R == 1, g.kh(),
           [&](auto K) { backward_groups<K>(f, x, dy, w, dx, dw, db, first, last); });
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
