// The stages of the fused separable convolution on the CPU. Compiled once per instruction set (no include
// guard).
//
// Every stage walks over tiles of output pixels. d = w ⊛ x is made tile by tile by the depthwise kernels,
// never for a whole map, and made again where it is needed again: nine products cost less than the memory it
// would pass through.

#include "depthwise_conv2d/cpu_kernels.h"
#include "common/gemm.h"
#include "separable_conv2d/cpu_passes.h"

namespace segkernels {
namespace {
namespace SEGKERNELS_ISA {

// -- a tile of d ----------------------------------------------------------------------------------

// channels_last: d[pixel][channel − c0].
template <class T>
void depthwise_tile_last(const Call<T>& call, Tile tile, int64_t rate, int64_t c0, int64_t c1, Matrix<T> d) {
  const ForwardPlan& f = *call.plan;
  const int64_t W = call.sizes.W_out;
  for (int64_t p = tile.first; p < tile.last;) {
    const int64_t h = p / W, first = p % W, last = std::min(W, first + tile.last - p);
    forward_row(f, call.x + tile.image * f.x.sB, call.w, static_cast<const T*>(nullptr), rate, h, first, last,
                c0, c1, d.p + (p - tile.first) * d.step, d.step);
    p += last - first;
  }
}

// NCHW, d[channel − c0][pixel], where the rows of x follow one another and are as wide as those of d: a tile
// is one long row.
template <class T>
void depthwise_tile_dense(const Call<T>& call, Tile tile, int64_t rate, int64_t c0, int64_t c1, Matrix<T> d) {
  using A = acc_t<T>;
  const ForwardPlan& f = *call.plan;
  const Geometry& g = f.geometry;
  const Axis &rows = g.rows[rate], &columns = g.columns[rate];
  const int64_t W = g.W(), size = g.H() * W, n = tile.size(), left = columns.p,
                line = left + n + (columns.k - 1) * columns.r;  // what a row tap reads, at most
  const Columns<A> pixels(rows, g.forward_columns(rate), W, tile.first, tile.last);
  std::vector<A> memory(std::is_same_v<A, T> ? 0 : rows.k * line);
  A weights[kMaxKernel * kMaxKernel];
  std::vector<RowGroup<A>> groups;  // one a row tap
  for (int64_t a = 0; a < rows.k; ++a)
    groups.push_back({{}, weights + a * g.kw(), nullptr, 0, &pixels.taps[a]});
  for (int64_t c = c0; c < c1; ++c) {
    const T* x = call.x + tile.image * f.x.sB + c * f.x.sC;
    widen_row<A>(call.w + (rate * g.C + c) * g.taps(), g.taps(), weights);
    for (int64_t a = 0; a < rows.k; ++a) {
      if (pixels.taps[a].empty()) continue;
      const int64_t at = tile.first + (a * rows.r - rows.p) * W;
      if (c + 1 < c1) prefetch(x + f.x.sC + at, n);  // planes are too far apart for the hardware to foresee
      if constexpr (std::is_same_v<A, T>) {
        groups[a].source[0] = x + at;
      } else {
        A* to = memory.data() + a * line;
        const int64_t begin = std::max<int64_t>(0, at - left), end = std::min(size, at - left + line);
        widen_row<A>(x + begin, end - begin, to + begin - (at - left));
        groups[a].source[0] = to + left;
      }
    }
    sum_rows<1, 1>(pixels, groups, A(0), d.p + (c - c0) * d.step, 0, 1);
  }
}

// The part of a tile in one row of the output: pixels [first, last) of row h, for NCHW.
template <class A>
struct RowPart {
  int64_t h, first, last, pixel;  // pixel: of the tile
  Columns<A> columns;
  std::vector<RowGroup<A>> sources;
};

// NCHW in general. Rows of x that cannot be read in place are widened one by one.
template <class T>
void depthwise_tile_planes(const Call<T>& call, Tile tile, int64_t rate, int64_t c0, int64_t c1,
                           Matrix<T> d) {
  using A = acc_t<T>;
  const ForwardPlan& f = *call.plan;
  const Geometry& g = f.geometry;
  const RowTaps& taps = f.rows[rate];
  const int64_t W = call.sizes.W_out, s = g.columns[0].s, line = plane_size(1, g.W(), s);
  const bool in_place = std::is_same_v<A, T> && s == 1;
  std::vector<A> memory(in_place ? 0 : kMaxKernel * line);
  A weights[kMaxKernel * kMaxKernel];
  std::vector<RowPart<A>> parts;
  parts.reserve(tile.size() / W + 2);  // so that none moves: sources point into columns
  for (int64_t p = tile.first; p < tile.last;) {
    const int64_t h = p / W, first = p % W, last = std::min(W, first + tile.last - p);
    std::vector<ColumnTap> columns = g.forward_columns(rate);  // of the positions from `first` on
    for (ColumnTap& t : columns)
      t = {t.rate, t.b, t.source + s * first, std::max(t.begin, first) - first,
           std::min(t.end, last) - first};
    parts.push_back(
        {h, first, last, p - tile.first, {columns, g.R, last - first, s, ceil_div(g.W(), s)}, {}});
    for (const RowTap* tap = taps.begin(h); tap != taps.end(h); ++tap)
      parts.back().sources.push_back(
          {{}, weights + tap->a * g.kw(), nullptr, 0, &parts.back().columns.taps[rate]});
    p += last - first;
  }
  for (int64_t c = c0; c < c1; ++c) {
    const T* x = call.x + tile.image * f.x.sB + c * f.x.sC;
    widen_row<A>(call.w + (rate * g.C + c) * g.taps(), g.taps(), weights);
    for (RowPart<A>& part : parts) {
      const RowTap* tap = taps.begin(part.h);
      for (size_t i = 0; i < part.sources.size(); ++i) {
        const T* row = x + tap[i].row * f.x.sH;
        if (c + 1 < c1) prefetch(row + f.x.sC + part.first, part.last - part.first);
        part.sources[i].source[0] = read_plane(row, f.x.sH, 1, g.W(), s, memory.data() + i * line).data;
      }
      sum_rows<1, 1>(part.columns, part.sources, A(0), d.p + (c - c0) * d.step + part.pixel, 0, 1);
    }
  }
}

template <bool kLast, class T>
void depthwise_tile(const Call<T>& call, Tile tile, int64_t rate, int64_t chunk, Matrix<T> d) {
  const int64_t c0 = call.sizes.chunk_begin(chunk), c1 = call.sizes.chunk_end(chunk);
  if constexpr (kLast)
    depthwise_tile_last(call, tile, rate, c0, c1, d);
  else if (const Geometry& g = call.plan->geometry;
           g.rows[rate].s == 1 && g.columns[rate].s == 1 && g.W() == g.W_out() && call.plan->x.sH == g.W())
    depthwise_tile_dense(call, tile, rate, c0, c1, d);
  else
    depthwise_tile_planes(call, tile, rate, c0, c1, d);
}

// -- memory of one thread -------------------------------------------------------------------------

template <bool kLast>
SEGKERNELS_INLINE int64_t
tile_size(int64_t channels) {  // numbers, with the padding that matrix products may touch
  return kLast ? kPixels * row_step(channels) : round_up(channels, 32) * row_step(kPixels);
}
template <bool kLast>
SEGKERNELS_INLINE int64_t tile_step(int64_t channels) {
  return row_step(kLast ? channels : kPixels);
}

SEGKERNELS_INLINE int64_t chunk_width(const Sizes& s) { return std::min(s.C, kChannels); }

// -- the pointwise weights ------------------------------------------------------------------------

// Slot (rate, chunk) of the weights: forward h·vᵀ [pixels][D] or v·h [D][pixels], backward g·v or vᵀ·g.
template <class E, bool kLast, bool kBackward, class T>
SEGKERNELS_INLINE View<acc_t<T>> weights_view(const Call<T>& call, int64_t slot) {
  const Sizes& s = call.sizes;
  const acc_t<T>* v = call.v + slot / s.chunks() * s.D * s.C + s.chunk_begin(slot % s.chunks());
  if constexpr (kLast != kBackward) return {v, 1, s.C};  // element (c, d)
  return {v, s.C, 1};                                    // element (d, c)
}

template <class E, bool kLast, bool kBackward, class T>
void pack_weights(const Call<T>& call, int64_t first, int64_t last) {
  const Sizes& s = call.sizes;
  for (int64_t slot = first; slot < last; ++slot) {
    const auto v = weights_view<E, kLast, kBackward>(call, slot);
    char* out = call.weights + slot * call.weight_bytes;
    const int64_t width = s.chunk_end(slot % s.chunks()) - s.chunk_begin(slot % s.chunks());
    const int64_t k = kBackward ? s.D : width, n = kBackward ? width : s.D;
    if constexpr (kLast)
      E::packed(v, k, n, out);
    else
      E::left(v, n, k, out);
  }
}

template <class E, bool kLast>
int64_t weight_bytes(const Sizes& s, bool backward) {
  const int64_t width = chunk_width(s), k = backward ? s.D : width, n = backward ? width : s.D;
  return round_up(kLast ? E::right_bytes(k, n) : E::left_bytes(n, k), 64);
}

// C (+)= weights · tile, in the layout of the tile.
template <class E, bool kLast, bool kBackward, class T>
void multiply_weights(const Call<T>& call, int64_t slot, Matrix<acc_t<T>> in, Matrix<acc_t<T>> out,
                      int64_t pixels, int64_t k, int64_t n, bool add, void* scratch) {
  const View<acc_t<T>> tile{in.p, in.step, 1};
  const char* weights = call.weights + slot * call.weight_bytes;
  if constexpr (kLast)
    E::multiply(pixels, n, k, E::left(tile, pixels, k, scratch), E::right_at(weights, k), out.p, out.step,
                add);
  else
    E::multiply(n, pixels, k, E::left_at(weights_view<E, kLast, kBackward>(call, slot), weights),
                E::right(tile, k, pixels, scratch), out.p, out.step, add);
}

// -- forward --------------------------------------------------------------------------------------

// Moments of d over the tiles of groups [first, last).
template <class E, bool kLast, class T>
void inner_moments(const Call<T>& call, int64_t first, int64_t last) {
  using A = acc_t<T>;
  const Sizes& s = call.sizes;
  Scratch memory(tile_size<kLast>(chunk_width(s)) * sizeof(T) + (kChannels + 64) * (64 + 2 * sizeof(A)));
  const Matrix<T> d{memory.take<T>(tile_size<kLast>(chunk_width(s))), tile_step<kLast>(chunk_width(s))};
  A* tile_mean = memory.take<A>(kChannels + 64);
  const Partial<kLast, A> partial{memory.take<A>(kChannels * 64 / sizeof(A))};
  for (int64_t group = first; group < last; ++group) {
    const int64_t begin = group * s.tiles() / s.forward_groups(),
                  end = (group + 1) * s.tiles() / s.forward_groups();
    int64_t count = 0;
    for (int64_t t = begin; t < end; count += s.tile(t++).size())
      for (int64_t chunk = 0; chunk < s.chunks(); ++chunk)
        for (int64_t rate = 0; rate < s.R; ++rate) {
          const int64_t n = s.chunk_end(chunk) - s.chunk_begin(chunk), pixels = s.tile(t).size();
          const int64_t at = (group * s.R + rate) * s.C + s.chunk_begin(chunk);
          depthwise_tile<kLast>(call, s.tile(t), rate, chunk, d);
          add_moments<kLast, T>({d.p, d.step}, kLast ? pixels : n, kLast ? n : pixels, count,
                                call.sums1.first + at, call.sums1.second + at, partial, tile_mean);
        }
  }
}

// x → y, or x → o and its moments where the outer stage standardises, over the tiles of groups [first, last).
template <class E, bool kLast, class T>
void forward(const Call<T>& call, int64_t first, int64_t last) {
  using A = acc_t<T>;
  const Sizes& s = call.sizes;
  const int64_t width = chunk_width(s), o_size = tile_size<kLast>(s.D);
  const int64_t scratch = std::max(E::left_bytes(kPixels, width), E::right_bytes(width, kPixels));
  Scratch memory(tile_size<kLast>(width) * (sizeof(T) + sizeof(A)) + s.R * o_size * sizeof(A) + scratch +
                   (s.D + 64) * (64 + 2 * sizeof(A)) + 1024);
  const Matrix<T> d{memory.take<T>(tile_size<kLast>(width)), tile_step<kLast>(width)};
  const Matrix<A> h{memory.take<A>(tile_size<kLast>(width)), tile_step<kLast>(width)};
  A* o = memory.take<A>(s.R * o_size);
  A* tile_mean = memory.take<A>(s.D + 64);
  const Partial<kLast, A> partial{memory.take<A>(round_up(s.D, 32) * 64 / sizeof(A))};
  char* products = memory.take<char>(scratch);
  [[maybe_unused]] const typename E::Session session;

  for (int64_t group = first; group < last; ++group) {
    const int64_t begin = group * s.tiles() / s.forward_groups(),
                  end = (group + 1) * s.tiles() / s.forward_groups();
    int64_t count = 0;
    for (int64_t t = begin; t < end; count += s.tile(t++).size()) {
      const Tile tile = s.tile(t);
      const int64_t pixels = tile.size();
      for (int64_t chunk = 0; chunk < s.chunks(); ++chunk)
        for (int64_t rate = 0; rate < s.R; ++rate) {
          const int64_t n = s.chunk_end(chunk) - s.chunk_begin(chunk);
          depthwise_tile<kLast>(call, tile, rate, chunk, d);
          apply<kLast, T, A>({d.p, d.step}, h, kLast ? pixels : n, kLast ? n : pixels,
                             call.inner.from(rate * s.C + s.chunk_begin(chunk)));
          multiply_weights<E, kLast, false>(call, rate * s.chunks() + chunk, h,
                                            {o + rate * o_size, tile_step<kLast>(s.D)}, pixels, n, s.D,
                                            chunk > 0, products);
        }
      for (int64_t rate = 0; rate < s.R; ++rate) {
        const int64_t rows = kLast ? pixels : s.D, columns = kLast ? s.D : pixels;
        const int64_t at = s.offset(tile, s.R * s.D, rate * s.D), step = s.step(s.R * s.D);
        const Matrix<const A> product{o + rate * o_size, tile_step<kLast>(s.D)};
        if (call.outer.standardised) {
          const int64_t sum = (group * s.R + rate) * s.D;
          copy<A, T>(product, {call.o + at, step}, rows, columns);
          add_moments<kLast, T>({call.o + at, step}, rows, columns, count, call.sums2.first + sum,
                                call.sums2.second + sum, partial, tile_mean);
        } else {
          apply<kLast, A, T>(product, {call.y + at, step}, rows, columns, call.outer.from(rate * s.D));
        }
      }
    }
  }
}

// o → y over the tiles [first, last).
template <class E, bool kLast, class T>
void finish(const Call<T>& call, int64_t first, int64_t last) {
  const Sizes& s = call.sizes;
  const int64_t channels = s.R * s.D, step = s.step(channels);
  for (int64_t t = first; t < last; ++t) {
    const int64_t at = s.offset(s.tile(t), channels, 0), pixels = s.tile(t).size();
    apply<kLast, T, T>({call.o + at, step}, {call.y + at, step}, kLast ? pixels : channels,
                       kLast ? channels : pixels, call.outer);
  }
}

}  // namespace SEGKERNELS_ISA
}  // namespace
}  // namespace segkernels

#include "separable_conv2d/cpu_backward.h"
