// Depthwise convolution on the CPU, NCHW: vectors run along the rows of one plane, which stays in the first
// caches. Included by cpu_kernels.h, once per instruction set. Planes are read as numbers of the accumulation
// type; with column stride s they are split into s planes of every s-th column, so that every tap reads
// consecutive numbers.

namespace segkernels {
namespace {
namespace SEGKERNELS_ISA {

constexpr int64_t kMaxVectors = 5;

// A column tap of a row of vectors: the number it reads at position 0 lies `offset` from the start of its
// source row.
struct PlaneTap {
  int64_t offset, b;
  const Mask* masks;  // the lanes of each vector that it reaches
};

// The columns of a row as vectors.
template <class A>
struct Columns {
  int64_t vectors, block;                   // block: vectors kept in registers together
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

// A row tap: its source row, its weights [k_w] and their sums [k_w] of vectors.
template <class A>
struct RowSource {
  const A *row, *w;
  A* sums;
  const std::vector<PlaneTap>* taps;
};
template <class A>
SEGKERNELS_INLINE void add_row(std::vector<RowSource<A>>& rows, const A* row, const A* w, A* sums,
                               const std::vector<PlaneTap>* taps) {
  RowSource<A>& to = rows.emplace_back();  // field by field: a copy of 32 bytes just written would stall
  to.row = row;
  to.w = w;
  to.sums = sums;
  to.taps = taps;
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

// V vectors from vector v0 on: y = bias + Σ_t w[t] · source_t, over the lanes that tap t reaches.
template <int V, class A, class T>
void sum_vectors(const std::vector<RowSource<A>>& rows, A bias, int64_t v0, const Mask* inside, T* y) {
  constexpr int64_t L = Vec<A>::lanes;
  Vec<A> acc[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) acc[v] = splat(bias);
  for (const RowSource<A>& row : rows)
    for (const PlaneTap& tap : *row.taps) {
      const Vec<A> w = splat(row.w[tap.b]);
      const A* source = row.row + tap.offset + v0 * L;
      const Mask* mask = tap.masks + v0;
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[v] = fma(w, load<A>(source + v * L, mask[v]), acc[v], mask[v]);
    }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) store(y + (v0 + v) * L, acc[v], inside[v0 + v]);
}

#define SEGKERNELS_BY_VECTORS(V, CALL) \
  switch (V) {                         \
    case 1:                            \
      CALL(1);                         \
      break;                           \
    case 2:                            \
      CALL(2);                         \
      break;                           \
    case 3:                            \
      CALL(3);                         \
      break;                           \
    case 4:                            \
      CALL(4);                         \
      break;                           \
    case 5:                            \
      CALL(5);                         \
      break;                           \
  }

template <class A, class T>
void sum_row(const Columns<A>& columns, const std::vector<RowSource<A>>& rows, A bias, T* y) {
  for (int64_t v0 = 0; v0 < columns.vectors; v0 += columns.block) {
#define SEGKERNELS_SUM(V) sum_vectors<V>(rows, bias, v0, columns.masks.data(), y)
    SEGKERNELS_BY_VECTORS(std::min(columns.block, columns.vectors - v0), SEGKERNELS_SUM)
#undef SEGKERNELS_SUM
  }
}

// -- forward --------------------------------------------------------------------------------------

// Items [first, last) of (image, channel): every rate of that plane. w [R, C, k_h, k_w], bias [R, C], y
// dense.
template <class T>
void forward_planes(const ForwardPlan& f, const T* x, const T* w, const T* bias, T* y, int64_t first,
                    int64_t last) {
  using A = acc_t<T>;
  const Geometry& g = f.geometry;
  const int64_t s = g.columns[0].s, H = g.H_out(), W = g.W_out();
  const int64_t part_size = g.H() * ceil_div(g.W(), s);
  std::vector<Columns<A>> columns;
  for (int64_t rate = 0; rate < g.R; ++rate)
    columns.emplace_back(g.forward_columns(rate), g.R, W, s, part_size);
  std::vector<A> memory(plane_size(g.H(), g.W(), s));
  std::vector<RowSource<A>> rows;
  A weights[kMaxKernel * kMaxKernel], shift = 0;
  for (int64_t item = first; item < last; ++item) {
    const int64_t image = item / g.C, c = item % g.C;
    const Plane<A> plane =
        read_plane(x + image * f.x.sB + c * f.x.sC, f.x.sH, g.H(), g.W(), s, memory.data());
    for (int64_t rate = 0; rate < g.R; ++rate) {
      widen_row<A>(w + (rate * g.C + c) * g.taps(), g.taps(), weights);
      if (bias) widen_row<A>(bias + rate * g.C + c, 1, &shift);
      T* y_row = y + ((image * g.R + rate) * g.C + c) * H * W;
      for (int64_t h = 0; h < H; ++h, y_row += W) {
        rows.clear();
        for (const RowTap* tap = f.rows[rate].begin(h); tap != f.rows[rate].end(h); ++tap)
          add_row<A>(rows, plane.data + tap->row * plane.row, weights + tap->a * g.kw(), nullptr,
                     &columns[rate].taps[rate]);
        sum_row(columns[rate], rows, shift, y_row);
      }
    }
  }
}

// -- backward -------------------------------------------------------------------------------------

// V vectors of a row of dX, from vector v0 on, and their share of dW: sums[t] += x · dy_t, lane by lane.
template <int V, class A>
void backward_vectors(const std::vector<RowSource<A>>& rows, const A* x, int64_t v0, const Mask* inside,
                      A* dx) {
  constexpr int64_t L = Vec<A>::lanes;
  Vec<A> xs[V], acc[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    xs[v] = load<A>(x + (v0 + v) * L, inside[v0 + v]);
    acc[v] = splat(A(0));
  }
  for (const RowSource<A>& row : rows)
    for (const PlaneTap& tap : *row.taps) {
      const Vec<A> w = splat(row.w[tap.b]);
      const A* source = row.row + tap.offset + v0 * L;
      const Mask* mask = tap.masks + v0;
      Vec<A> sum = load<A>(row.sums + tap.b * L);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const Vec<A> dy = load<A>(source + v * L, mask[v]);
        acc[v] = fma(w, dy, acc[v], mask[v]);
        sum = fma(xs[v], dy, sum, mask[v]);
      }
      store(row.sums + tap.b * L, sum);
    }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) store(dx + (v0 + v) * L, acc[v], inside[v0 + v]);
}

template <class A>
void backward_row(const Columns<A>& columns, const std::vector<RowSource<A>>& rows, const A* x, A* dx) {
  for (int64_t v0 = 0; v0 < columns.vectors; v0 += columns.block) {
#define SEGKERNELS_BACKWARD(V) backward_vectors<V>(rows, x, v0, columns.masks.data(), dx)
    SEGKERNELS_BY_VECTORS(std::min(columns.block, columns.vectors - v0), SEGKERNELS_BACKWARD)
#undef SEGKERNELS_BACKWARD
  }
}
#undef SEGKERNELS_BY_VECTORS

template <class A>
A sum_plane(const Plane<A>& p, int64_t H, int64_t W) {
  constexpr int64_t L = Vec<A>::lanes;
  Vec<A> s = splat(A(0));
  for (int64_t h = 0; h < H; ++h)
    for (int64_t i = 0; i < W; i += L) s = s + load<A>(p.data + h * p.row + i, lane_range<A>(0, W - i));
  return sum(s);
}

// Items [first, last) of (image, channel): dX, and this image's share of dW [B, R, C, k_h, k_w] and db [B, R,
// C]; null where not wanted.
template <class T>
void backward_planes(const BackwardPlan& f, const T* x, const T* dy, const T* w, T* dx, acc_t<T>* dw,
                     acc_t<T>* db, int64_t first, int64_t last) {
  using A = acc_t<T>;
  constexpr int64_t L = Vec<A>::lanes;
  const Geometry& g = f.geometry;
  const int64_t s = g.columns[0].s, H = g.H(), W = g.W(), H_out = g.H_out(), W_out = g.W_out(),
                n_taps = g.taps();
  const int64_t dy_size = plane_size(H_out, W_out, 1), part_size = ceil_div(W, s);
  std::vector<Columns<A>> columns;
  for (int64_t c = 0; c < s; ++c) columns.emplace_back(g.backward_columns(c), g.R, ceil_div(W - c, s), 1, 0);
  std::vector<A> x_memory(plane_size(H, W, s)), dy_memory(g.R * dy_size), line(W), parts(s * part_size);
  std::vector<A> weights(g.R * n_taps), sums(g.R * n_taps * L);
  std::vector<Plane<A>> dys(g.R);
  std::vector<RowSource<A>> rows;
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
    for (int64_t h = 0; (dx || dw) && h < H; ++h) {
      T* dx_row = dx ? dx + ((image * g.C + c) * H + h) * W : nullptr;
      for (int64_t part = 0; part < s; ++part) {
        rows.clear();
        for (const RowTap* tap = f.rows.begin(h); tap != f.rows.end(h); ++tap) {
          const Plane<A>& source = dys[tap->rate];
          const int64_t weight = tap->rate * n_taps + tap->a * g.kw();
          add_row(rows, source.data + tap->row * source.row, weights.data() + weight,
                  sums.data() + weight * L, &columns[part].taps[tap->rate]);
        }
        A* to = parts.data() + part * part_size;
        if constexpr (std::is_same_v<A, T>)
          if (s == 1 && dx) to = dx_row;
        if (dw)
          backward_row(columns[part], rows, plane.data + part * plane.part + h * plane.row, to);
        else
          sum_row(columns[part], rows, A(0), to);
      }
      if (dx && s > 1) {
        for (int64_t i = 0; i < W; ++i) line[i] = parts[i % s * part_size + i / s];
        narrow_row(line.data(), W, dx_row);
      } else if (dx && !std::is_same_v<A, T>) {
        narrow_row(parts.data(), W, dx_row);
      }
    }
    if (dw)
      for (int64_t rate = 0; rate < g.R; ++rate)
        for (int64_t t = 0; t < n_taps; ++t)
          dw[((image * g.R + rate) * g.C + c) * n_taps + t] =
              sum(load<A>(sums.data() + (rate * n_taps + t) * L));
  }
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
