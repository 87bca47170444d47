// Depthwise convolution on the CPU, NCHW: vectors run along the rows of one plane, which stays in the first
// caches. Included by cpu_kernels.h, once per instruction set. Planes are read as numbers of the accumulation
// type; with column stride s they are split into s planes of every s-th column, so that every tap reads
// consecutive numbers. Rows that follow one another and reach the same taps are one long row: few vectors
// have idle lanes.

namespace segkernels {
namespace {
namespace SEGKERNELS_ISA {

// A tile is kRows rows of up to kMaxVectors vectors, which stay in registers.
constexpr int kRows = 4;
constexpr int kMaxVectors = SEGKERNELS_VECTOR_BYTES == 64 ? 3 : 2;
constexpr int kMaxStep = 2;  // source rows between rows of a tile that share them

// A column tap of a row of vectors: the number it reads at position 0 lies `offset` from the start of its
// source row.
struct PlaneTap {
  int64_t offset, b;
  const Mask* masks;  // the lanes of each vector that it reaches
};

// The columns of a row, or of several rows as a long one, as vectors.
template <class A>
struct Columns {
  int64_t vectors, block;                   // block: vectors of a tile
  std::vector<Mask> masks;                  // [vector] inside the row, then [tap][vector]
  std::vector<std::vector<PlaneTap>> taps;  // [rate], of a tile [row tap]

  // `rows` rows of n columns; `step` columns of the source from one position to the next; parts of a source
  // plane are `part` numbers apart.
  Columns(const std::vector<ColumnTap>& column_taps, int64_t R, int64_t n, int64_t step, int64_t part,
          int64_t rows = 1)
      : vectors(ceil_div(rows * n, Vec<A>::lanes)), masks((column_taps.size() + 1) * vectors), taps(R) {
    block = ceil_div(vectors, std::max<int64_t>(1, ceil_div(vectors, kMaxVectors)));
    Mask* mask = masks.data();
    add_lanes(0, rows * n, mask);
    for (const ColumnTap& tap : column_taps) {
      const int64_t column = -ceil_div(-tap.source, step);
      mask += vectors;
      taps[tap.rate].push_back({(tap.source - column * step) * part + column, tap.b, mask});
      for (int64_t row = 0; row < rows; ++row) add_lanes(row * n + tap.begin, row * n + tap.end, mask);
    }
  }

  // The pixels [first, last) of an image as one row, where the source has rows of the same width W and is
  // read at stride 1.
  Columns(const Axis& rows, const std::vector<ColumnTap>& column_taps, int64_t W, int64_t first, int64_t last)
      : vectors(ceil_div(last - first, Vec<A>::lanes)), taps(rows.k) {
    masks.resize((rows.k * column_taps.size() + 1) * vectors);
    block = ceil_div(vectors, ceil_div(vectors, kMaxVectors));
    Mask* mask = masks.data();
    add_lanes(0, last - first, mask);
    for (int64_t a = 0; a < rows.k; ++a) {
      const int64_t down = a * rows.r - rows.p;
      const int64_t begin = std::max(first / W, -down), end = std::min(ceil_div(last, W), rows.in - down);
      for (const ColumnTap& tap : column_taps) {
        mask += vectors;
        if (begin < end) taps[a].push_back({tap.source, tap.b, mask});
        for (int64_t h = begin; h < end; ++h)
          add_lanes(std::max(h * W + tap.begin, first) - first, std::min(h * W + tap.end, last) - first,
                    mask);
      }
    }
  }

 private:
  // The positions [first, last), a lane each.
  static void add_lanes(int64_t first, int64_t last, Mask* masks) {
    constexpr int64_t L = Vec<A>::lanes;
    for (int64_t v = first / L; v * L < last; ++v) masks[v] |= lane_range<A>(first - v * L, last - v * L);
  }
};

// K row taps of a tile of rows, where row j reads source row S·j + a at tap a = 0 … K−1: their weights at
// w + a·step [k_w], their sums at sums + a·step·lanes [k_w] of vectors. A source row outside the map is null.
template <class A>
struct RowGroup {
  const A* source[kMaxStep * (kRows - 1) + kMaxKernel];
  const A* w;
  A* sums;
  int64_t step;
  const std::vector<PlaneTap>* taps;
};

// Calls f(K, S) with constants: the row taps that are worked on together, all k of them where there are
// kernels for that, else one.
template <class F>
void by_group(int64_t k, int64_t S, const F& f) {
  using std::integral_constant;
  integral_constant<int, 1> one;
  integral_constant<int, 2> two;
  integral_constant<int, 3> three;
  integral_constant<int, 5> five;
  if (k == 3 && S == 1) return f(three, one);
  if (k == 3 && S == 2) return f(three, two);
  if (k == 5 && S == 1) return f(five, one);
  if (k == 5 && S == 2) return f(five, two);
  f(one, one);
}

// The rows of a map as tiles: a block of kRows·d rows is worked on d rows apart, and rows of it that follow
// one another and reach the same taps are joined to a long row.
struct Tiling {
  struct LongRow {
    int64_t first;
    size_t kind;
  };
  int64_t n, d;
  std::vector<int64_t> kinds;              // rows of a long row
  std::vector<LongRow> rows;               // of a block
  int64_t inner_begin = 0, inner_end = 0;  // blocks away from the border, where all d rows are one: kind 0

  // Row h of n reads the source rows h + d·m − p of H, m = 0 … reach − 1 for a tile.
  Tiling(int64_t n, int64_t d, int64_t reach, int64_t p, int64_t H, bool join) : n(n), d(d) {
    if (join) {
      inner_begin = p % d == 0 ? 0 : p;
      inner_end = std::min(H + p - reach * d, n - kRows * d) + 1;
      if (inner_begin < inner_end) kinds.push_back(d);
    }
    const auto border = [&](int64_t h) {
      return (h - p) % d == 0 || (h - p - H) % d == 0 || (h - n) % d == 0;
    };
    for (int64_t h = 0, end; h < std::min(n, d); h = end) {
      for (end = h + 1; join && end < d && !border(end);) ++end;
      const size_t kind = std::find(kinds.begin(), kinds.end(), end - h) - kinds.begin();
      if (kind == kinds.size()) kinds.push_back(end - h);
      rows.push_back({h, kind});
    }
  }

  // Calls f(kind, h, count) for all tiles: the first of `count` long rows begins at h.
  template <class F>
  void for_each(const F& f) const {
    for (int64_t block = 0; block < n; block += kRows * d) {
      if (inner_begin <= block && block < inner_end) {
        f(0, block, kRows);
        continue;
      }
      for (const LongRow& row : rows)
        if (const int64_t h = block + row.first; h < n)
          f(row.kind, h, std::min<int64_t>(kRows, ceil_div(n - h, d)));
    }
  }
};

// Hints that n numbers at p are needed soon.
template <class T>
void prefetch(const T* p, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(p + i);
}
constexpr int64_t kAhead = 4096;  // bytes: the hardware foresees consecutive reads within a page

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

// The even and the odd ones of 2·lanes consecutive numbers, and back. Pairs of bfloat16 are loaded so.
template <class T>
SEGKERNELS_INLINE Pair<T> split(Pair<T> x) {
  if (std::is_same_v<T, bfloat16>) return x;
  return {shuffle(x.lo, x.hi, [](int64_t l) { return 2 * l; }),
          shuffle(x.lo, x.hi, [](int64_t l) { return 2 * l + 1; })};
}
template <class T>
SEGKERNELS_INLINE Pair<T> join(Pair<T> x) {
  if (std::is_same_v<T, bfloat16>) return x;
  constexpr int64_t n = Vec<acc_t<T>>::lanes;
  return {shuffle(x.lo, x.hi, [](int64_t l) { return l / 2 + l % 2 * n; }),
          shuffle(x.lo, x.hi, [](int64_t l) { return l / 2 + l % 2 * n + n / 2; })};
}

// Columns c, c + s, … of a row of W to part c, and back; parts are `part` numbers apart. `line` [W] is
// needed for s > 2.
template <class A, class T>
void split_row(const T* from, int64_t W, int64_t s, A* to, int64_t part, A* line) {
  constexpr int64_t L = Vec<A>::lanes;
  if (s == 2) {
    int64_t i = 0;
    for (; 2 * (i + L) <= W; i += L) {
      const Pair<T> x = split(load2(from + 2 * i));
      store(to + i, x.lo);
      store(to + part + i, x.hi);
    }
    const Pair<T> x = split(load2(from + 2 * i, W - 2 * i));
    store(to + i, x.lo, lane_range<A>(0, ceil_div(W, 2) - i));
    store(to + part + i, x.hi, lane_range<A>(0, W / 2 - i));
    return;
  }
  widen_row<A>(from, W, line);
  for (int64_t i = 0; i < W; ++i) to[i % s * part + i / s] = line[i];
}
template <class A, class T>
void join_row(const A* from, int64_t part, int64_t s, int64_t W, T* to, A* line) {
  constexpr int64_t L = Vec<A>::lanes;
  if (s == 2) {
    int64_t i = 0;
    for (; 2 * (i + L) <= W; i += L)
      store2(to + 2 * i, join(Pair<T>{load<A>(from + i), load<A>(from + part + i)}));
    const Mask even = lane_range<A>(0, ceil_div(W, 2) - i), odd = lane_range<A>(0, W / 2 - i);
    store2(to + 2 * i, join(Pair<T>{load<A>(from + i, even), load<A>(from + part + i, odd)}), W - 2 * i);
    return;
  }
  for (int64_t i = 0; i < W; ++i) line[i] = from[i % s * part + i / s];
  narrow_row(line, W, to);
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
    for (int64_t h = 0; h < H; ++h) {
      if (H > 1) prefetch(x + h * sH + kAhead / sizeof(T), W);
      split_row(x + h * sH, W, s, memory + h * n, part, memory + s * part);
    }
  }
  return {memory, n, part};
}
// Whether the rows of a plane so read follow one another (s = 1).
template <class A, class T>
bool is_dense(int64_t sH, int64_t W) {
  return sH == W || !std::is_same_v<A, T>;
}
inline int64_t plane_size(int64_t H, int64_t W, int64_t s) { return s * H * ceil_div(W, s) + W; }

// -- sums over taps: y of the forward, dX of the backward -----------------------------------------

// V vectors from vector v0 on of J rows `pitch` apart, of which `count` are wanted: y = bias + Σ_t w[t] ·
// source_t, over the lanes that tap t reaches.
template <int J, int K, int S, int V, class A, class T>
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
      for (int m = 0; m < S * (J - 1) + K; ++m) {
        if (!group.source[m]) continue;
        const A* source = group.source[m] + tap.offset + v0 * L;
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
          const Vec<A> x = load<A>(source + v * L, mask[v]);
#pragma GCC unroll 8
          for (int a = 0; a < K; ++a)
            if (const int j = (m - a) / S; a <= m && (m - a) % S == 0 && j < J)
              acc[j][v] = fma(w[a], x, acc[j][v], mask[v]);
        }
      }
    }
#pragma GCC unroll 16
  for (int j = 0; j < J; ++j)
    if (j < count)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) store(y + j * pitch + (v0 + v) * L, acc[j][v], inside[v0 + v]);
}

template <int J, int K, int S = 1, class A, class T>
void sum_rows(const Columns<A>& columns, const std::vector<RowGroup<A>>& groups, A bias, T* y, int64_t pitch,
              int64_t count) {
  const Mask* inside = columns.masks.data();
  for (int64_t v = 0; v < columns.vectors; v += columns.block) {
    const int64_t V = std::min(columns.block, columns.vectors - v);
    if (V == 1) sum_vectors<J, K, S, 1>(groups, bias, v, inside, y, pitch, count);
    if (V == 2) sum_vectors<J, K, S, 2>(groups, bias, v, inside, y, pitch, count);
    if constexpr (kMaxVectors > 2)
      if (V == 3) sum_vectors<J, K, S, 3>(groups, bias, v, inside, y, pitch, count);
  }
}

// -- forward --------------------------------------------------------------------------------------

// How the plane of one rate is worked on: rows d apart read source rows S·r apart.
template <class A>
struct RatePlan {
  int64_t S;
  Tiling tiling;
  std::vector<Columns<A>> columns;  // [kind of long row]

  RatePlan(const Geometry& g, int64_t rate, bool dense)
      : RatePlan(g, rate, g.rows[rate], g.columns[rate], dense) {}

 private:
  RatePlan(const Geometry& g, int64_t rate, const Axis& y, const Axis& x, bool dense)
      : S(y.s / std::gcd(y.s, y.r)),
        tiling(y.out, y.r * S / y.s, kRows + y.k - 1, y.p, y.in,
               dense && y.s == 1 && x.s == 1 && x.in == x.out) {
    for (int64_t rows : tiling.kinds)
      columns.emplace_back(g.forward_columns(rate), g.R, x.out, x.s, y.in * ceil_div(x.in, x.s), rows);
  }
};

template <int K, int S, class A, class T>
void forward_plane(const Geometry& g, int64_t rate, const RatePlan<A>& plan, Plane<A> x, const A* w, A bias,
                   T* y, std::vector<RowGroup<A>>& groups) {
  const Axis& axis = g.rows[rate];
  const int64_t W = g.W_out(), d = plan.tiling.d, step = d * axis.s / S;  // step: between source rows
  groups.resize(axis.k / K);
  for (int64_t i = 0; i < axis.k / K; ++i) groups[i].w = w + i * K * g.kw(), groups[i].step = g.kw();
  plan.tiling.for_each([&](size_t kind, int64_t h, int64_t count) {
    int64_t first = h * axis.s - axis.p;
    for (RowGroup<A>& group : groups) {
      for (int64_t m = 0; m < S * (kRows - 1) + K; ++m) {
        const int64_t row = first + m * step;
        group.source[m] = row >= 0 && row < axis.in ? x.data + row * x.row : nullptr;
      }
      group.taps = &plan.columns[kind].taps[rate];
      first += K * axis.r;
    }
    sum_rows<kRows, K, S>(plan.columns[kind], groups, bias, y + h * W, d * W, count);
  });
}

// Items [first, last) of (image, channel): every rate of that plane. w [R, C, k_h, k_w], bias [R, C], y
// dense.
template <class T>
void forward_planes(const ForwardPlan& f, const T* x, const T* w, const T* bias, T* y, int64_t first,
                    int64_t last) {
  using A = acc_t<T>;
  const Geometry& g = f.geometry;
  const int64_t s = g.columns[0].s, H = g.H(), W = g.W(), size_out = g.H_out() * g.W_out();
  std::vector<RatePlan<A>> rates;
  for (int64_t rate = 0; rate < g.R; ++rate) rates.emplace_back(g, rate, is_dense<A, T>(f.x.sH, W));
  std::vector<A> memory(plane_size(H, W, s));
  std::vector<RowGroup<A>> groups;
  A weights[kMaxKernel * kMaxKernel], shift = 0;
  for (int64_t item = first; item < last; ++item) {
    const int64_t image = item / g.C, c = item % g.C;
    const Plane<A> plane = read_plane(x + image * f.x.sB + c * f.x.sC, f.x.sH, H, W, s, memory.data());
    for (int64_t rate = 0; rate < g.R; ++rate) {
      widen_row<A>(w + (rate * g.C + c) * g.taps(), g.taps(), weights);
      if (bias) widen_row<A>(bias + rate * g.C + c, 1, &shift);
      by_group(g.kh(), rates[rate].S, [&](auto K, auto S) {
        forward_plane<K, S>(g, rate, rates[rate], plane, weights, shift,
                            y + ((image * g.R + rate) * g.C + c) * size_out, groups);
      });
    }
  }
}

}  // namespace SEGKERNELS_ISA
}  // namespace
}  // namespace segkernels

#include "depthwise_conv2d/cpu_planes_backward.h"
