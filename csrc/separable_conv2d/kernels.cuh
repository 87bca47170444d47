// Separable convolution: o = v · φ₁(γ₁·N₁(w ⊛ x) + β₁), y = φ₂(γ₂·o + β₂), per rate, without h in global
// memory.
//
// A block owns a tile of output pixels × output channels. It walks over the inner channels in stages of 64
// bytes: for each it makes h of its pixels in shared memory, straight from x (all taps of the depthwise
// kernel), and multiplies it with the same stage of v while the next stage is being made. With w absent h
// comes from a map that holds d (training, where the moments of d had to be known first), and with v read
// transposed the same product is the gradient of h.
#pragma once

#include "common/product.cuh"
#include "separable_conv2d/affine.cuh"

namespace segkernels::cuda {

// The left operand h of the product, [pixels, inner channels] at each rate.
template <class T>
struct Inner {
  const T* x;
  Strides strides;
  int64_t rate_stride;   // elements from one rate's channels to the next's: 0 where the rates share x
  const T* w;            // [R, C, kh, kw], or null: h is made of x's own pixels
  Correlation geometry;  // w null: that of a 1×1 kernel
  Affine<acc_t<T>> affine;
};

// The right operand: element (rate, n, k) of v.
template <class T>
struct Weights {
  const T* v;
  int64_t rate_stride, n_stride, k_stride;
};

// Where results go, and what is done to them; moments: null or [pixel tiles][3][R·N] of the stored values.
template <class T>
struct Outer {
  T* y;
  Strides strides;
  Affine<acc_t<T>> affine;
  acc_t<T>* moments;
  bool pairs;  // two neighbouring channels can be stored by one instruction
};

struct ProductShape {
  int64_t pixels;  // B · H' · W'
  int inner, outer, rates, outer_tiles;
  bool channels_last;
};

struct Pixel {
  int64_t in, out;  // element offsets of the window's origin (before padding) and of the output pixel
  int row, column;  // of the origin; row is far outside for pixels beyond the last
};

// Shared memory of a block of PR × PC warps.
template <class T, int PR, int PC>
struct ProductStage {
  static constexpr int ROWS = PR * WARP_ROWS, COLUMNS = PC * WARP_COLUMNS, THREADS = PR * PC * WARP;
  T left[2][ROWS][PITCH<T>];
  T right[2][COLUMNS][PITCH<T>];
  Pixel pixel[ROWS];
  acc_t<T> centre[2][DEPTH<T>], scale[2][DEPTH<T>], shift[2][DEPTH<T>];

  // Behind the struct: the depthwise weights [2][taps][DEPTH].
  __device__ acc_t<T>* weight(int slot, int taps, int tap) {
    return reinterpret_cast<acc_t<T>*>(this + 1) + (slot * taps + tap) * DEPTH<T>;
  }
  static size_t bytes(int taps) { return sizeof(ProductStage) + 2 * sizeof(acc_t<T>) * taps * DEPTH<T>; }
};

// Per-channel parameters of the stage that begins at channel k0.
template <class T, class Stage>
__device__ inline void stage_parameters(Stage& stage, int slot, const Inner<T>& inner, int rate, int k0,
                                        int depth) {
  const int taps = inner.geometry.kh * inner.geometry.kw;
  for (int k = threadIdx.x; k < DEPTH<T>; k += blockDim.x) {
    if (k0 + k >= depth) continue;
    const int64_t c = int64_t(rate) * depth + k0 + k;
    stage.centre[slot][k] = inner.affine.centre(c);
    stage.scale[slot][k] = inner.affine.scale(c) * inner.affine.weight(c);
    stage.shift[slot][k] = inner.affine.shift(c);
  }
  if (!inner.w) return;
#pragma unroll 1
  for (int e = threadIdx.x; e < taps * DEPTH<T>; e += blockDim.x) {
    const int tap = e % taps, k = e / taps;
    if (k0 + k < depth)
      stage.weight(slot, taps, tap)[k] = widen(inner.w[(int64_t(rate) * depth + k0 + k) * taps + tap]);
  }
}

// d of one pixel and V channels from k0 + k on.
template <class T, int V, class Stage>
__device__ inline void depthwise_at(acc_t<T> (&d)[V], Stage& stage, int slot, const Inner<T>& inner, int rate,
                                    const Pixel& pixel, int k0, int k) {
  const Correlation& g = inner.geometry;
  const T* x = inner.x + rate * inner.rate_stride + (k0 + k) * inner.strides.c + pixel.in;
  for (int e = 0; e < g.kh; ++e) {
    const int row = pixel.row - g.pad_h[rate] + e * g.rate_h[rate];
    if (row < 0 || row >= g.rows) continue;
    for (int f = 0; f < g.kw; ++f) {
      const int column = pixel.column - g.pad_w[rate] + f * g.rate_w[rate];
      if (column < 0 || column >= g.columns) continue;
      const Vector<T, V> in = load<V>(x + int64_t(row - pixel.row) * inner.strides.h +
                                      int64_t(column - pixel.column) * inner.strides.w);
      const acc_t<T>* weight = stage.weight(slot, g.kh * g.kw, e * g.kw + f) + k;
#pragma unroll
      for (int v = 0; v < V; ++v) d[v] += (inner.w ? weight[v] : acc_t<T>(1)) * widen(in.at[v]);
    }
  }
}

template <class T, int V, class Stage>
__device__ inline void fill_left(Stage& stage, int slot, const Inner<T>& inner, const ProductShape& shape,
                                 int rate, int k0) {
  constexpr int VECTORS = DEPTH<T> / V;
#pragma unroll 1
  for (int e = threadIdx.x; e < Stage::ROWS * VECTORS; e += Stage::THREADS) {
    const int m = shape.channels_last ? e / VECTORS : e % Stage::ROWS;
    const int k = (shape.channels_last ? e % VECTORS : e / Stage::ROWS) * V;
    Vector<T, V> h = {};
    if (k0 + k < shape.inner && stage.pixel[m].row >= 0) {
      acc_t<T> d[V] = {};
      depthwise_at<T, V>(d, stage, slot, inner, rate, stage.pixel[m], k0, k);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const acc_t<T> n = (d[v] - stage.centre[slot][k + v]) * stage.scale[slot][k + v];
        h.at[v] = narrow<T>(activate(inner.affine.act, n + stage.shift[slot][k + v]));
      }
    }
    store<V>(&stage.left[slot][m][k], h);
  }
}

template <class T, int V, class Stage>
__device__ inline void fill_right(Stage& stage, int slot, const Weights<T>& v, const ProductShape& shape,
                                  int rate, int n0, int k0) {
  const T* base = v.v + rate * v.rate_stride;
  if (v.k_stride == 1) {
#pragma unroll 1
    for (int e = threadIdx.x; e < Stage::COLUMNS * (DEPTH<T> / V); e += Stage::THREADS) {
      const int n = e / (DEPTH<T> / V), k = e % (DEPTH<T> / V) * V;
      Vector<T, V> in = {};
      if (n0 + n < shape.outer && k0 + k < shape.inner) in = load<V>(base + (n0 + n) * v.n_stride + k0 + k);
      store<V>(&stage.right[slot][n][k], in);
    }
  } else {
#pragma unroll 1
    for (int e = threadIdx.x; e < Stage::COLUMNS * DEPTH<T>; e += Stage::THREADS) {
      const int n = e % Stage::COLUMNS, k = e / Stage::COLUMNS;
      T in = {};
      if (n0 + n < shape.outer && k0 + k < shape.inner)
        in = base[(n0 + n) * v.n_stride + (k0 + k) * v.k_stride];
      stage.right[slot][n][k] = in;
    }
  }
}

// Stores a warp's results, two neighbouring columns at a time; beyond the last pixel or channel nothing.
template <class T, class Stage>
__device__ inline void store_product(WarpProduct<T>& product, const Stage& stage, const Outer<T>& outer,
                                     const ProductShape& shape, int rate, int m0, int n0) {
  using A = acc_t<T>;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int n = n0 + WarpProduct<T>::column(j, 0);
    A centre[2], scale[2], shift[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int64_t c = int64_t(rate) * shape.outer + min(n + e, shape.outer - 1);
      centre[e] = outer.affine.centre(c), shift[e] = outer.affine.shift(c);
      scale[e] = outer.affine.scale(c) * outer.affine.weight(c);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      A* pair = &product.acc[i / 2][j][i % 2 * 2];
      const Pixel& pixel = stage.pixel[m0 + WarpProduct<T>::row(i / 2, i % 2 * 2)];
      Vector<T, 2> out;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        out.at[e] = narrow<T>(activate(outer.affine.act, (pair[e] - centre[e]) * scale[e] + shift[e]));
        pair[e] = widen(out.at[e]);  // what the moments are taken of
      }
      if (pixel.row < 0 || n >= shape.outer) continue;
      T* y = outer.y + pixel.out + (int64_t(rate) * shape.outer + n) * outer.strides.c;
      if (outer.pairs) {
        store<2>(y, out);
      } else {
        y[0] = out.at[0];
        if (n + 1 < shape.outer) y[outer.strides.c] = out.at[1];
      }
    }
  }
}

// Per-channel moments of the block's results: within the warp by shuffles, across the PR warps through
// `shared`.
template <class T, int PR, class Stage>
__device__ inline void product_moments(WarpProduct<T>& product, const Stage& stage, const Outer<T>& outer,
                                       const ProductShape& shape, int rate, int64_t tile, int m0, int n0,
                                       int first, acc_t<T>* shared) {
  using A = acc_t<T>;
#pragma unroll
  for (int j = 0; j < 8; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      RunningMoments<A> running;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (stage.pixel[m0 + WarpProduct<T>::row(i / 2, i % 2 * 2)].row >= 0)
          running.add(product.acc[i / 2][j][i % 2 * 2 + e]);
      Moments<A> m = running.moments();
      for (int step = 4; step < WARP; step *= 2) m = merge_across(m, step);
      A* slot = shared + (m0 / WARP_ROWS * Stage::COLUMNS + n0 + WarpProduct<T>::column(j, e)) * 3;
      if (threadIdx.x % WARP < 4) slot[0] = m.n, slot[1] = m.mean, slot[2] = m.m2;
    }
  __syncthreads();
  for (int n = threadIdx.x; n < Stage::COLUMNS && first + n < shape.outer; n += Stage::THREADS) {
    Moments<A> m = {0, 0, 0};
    for (int k = 0; k < PR; ++k) {
      const A* slot = shared + (k * Stage::COLUMNS + n) * 3;
      m = merge(m, Moments<A>{slot[0], slot[1], slot[2]});
    }
    const int64_t all = int64_t(shape.rates) * shape.outer;
    A* out = outer.moments + tile * 3 * all + int64_t(rate) * shape.outer + first + n;
    out[0] = m.n, out[all] = m.mean, out[2 * all] = m.m2;
  }
}

// y[pixel, rate, n] = φ₂(γ₂ · Σ_k h[pixel, rate, k] · v[rate, n, k] + β₂)
template <class T, int V, int PR, int PC>
__global__ void __launch_bounds__(PR * PC * WARP, 1)
    separable_conv2d_kernel(Inner<T> inner, Weights<T> v, Outer<T> outer, ProductShape shape) {
  using Stage = ProductStage<T, PR, PC>;
  extern __shared__ __align__(16) double shared[];
  Stage& stage = *reinterpret_cast<Stage*>(shared);
  const int n0 = blockIdx.x % shape.outer_tiles * Stage::COLUMNS;
  const int rate = blockIdx.x / shape.outer_tiles % shape.rates;
  const int64_t tile = blockIdx.x / shape.outer_tiles / shape.rates;
  const Correlation& g = inner.geometry;

  for (int m = threadIdx.x; m < Stage::ROWS; m += Stage::THREADS) {
    const int64_t pixel = tile * Stage::ROWS + m;
    const int j = pixel % g.out_columns, i = pixel / g.out_columns % g.out_rows;
    const int64_t b = pixel / g.out_columns / g.out_rows;
    Pixel p = {0, 0, -1, 0};
    if (pixel < shape.pixels) {
      p.row = i * g.stride_h, p.column = j * g.stride_w;
      p.in = b * inner.strides.b + p.row * inner.strides.h + p.column * inner.strides.w;
      p.out = b * outer.strides.b + i * outer.strides.h + j * outer.strides.w;
    }
    stage.pixel[m] = p;
  }
  const int warp = threadIdx.x / WARP, m_warp = warp % PR * WARP_ROWS, n_warp = warp / PR * WARP_COLUMNS;
  const int stages = (shape.inner + DEPTH<T> - 1) / DEPTH<T>;
  WarpProduct<T> product;
  stage_parameters(stage, 0, inner, rate, 0, shape.inner);
  for (int s = -1; s < stages; ++s) {
    __syncthreads();  // stage s is there, and nobody uses stage s − 1 or its parameters any more
    const int slot = s & 1, next = slot ^ 1, k0 = (s + 1) * DEPTH<T>;
    if (s + 1 < stages) {
      fill_left<T, V>(stage, next, inner, shape, rate, k0);
      fill_right<T, V>(stage, next, v, shape, rate, n0, k0);
    }
    if (s >= 0) product.multiply(&stage.left[slot][m_warp][0], &stage.right[slot][n_warp][0]);
    stage_parameters(stage, slot, inner, rate, k0 + DEPTH<T>, shape.inner);
  }
  store_product(product, stage, outer, shape, rate, m_warp, n0 + n_warp);
  if (!outer.moments) return;
  __syncthreads();  // the stages make room
  product_moments<T, PR>(product, stage, outer, shape, rate, tile, m_warp, n_warp, n0,
                         reinterpret_cast<acc_t<T>*>(&stage.left[0][0][0]));
}

// Shared memory of the product over pixels.
template <class T, int PR, int PC>
struct GramStage {
  static constexpr int ROWS = PR * WARP_ROWS, COLUMNS = PC * WARP_COLUMNS, THREADS = PR * PC * WARP;
  T left[2][ROWS][PITCH<T>];
  T right[2][COLUMNS][PITCH<T>];
  int64_t offset[2][2][DEPTH<T>];  // of the stage's pixels in g and in d; −1 beyond the last
};

// [channels][pixels of a stage] of one map; `make(vector, first channel)` turns what is loaded into what is
// stored.
template <class T, int V, int ROWS, int THREADS, class F>
__device__ inline void fill_transposed(T (*tile)[PITCH<T>], const T* map, int64_t c_stride,
                                       const int64_t* offset, int c0, int channels, bool channels_last,
                                       F make) {
  for (int e = threadIdx.x; e < DEPTH<T> * (ROWS / V); e += THREADS) {
    const int k = channels_last ? e / (ROWS / V) : e % DEPTH<T>;
    const int c = (channels_last ? e % (ROWS / V) : e / DEPTH<T>)*V;
    Vector<T, V> in = {};
    if (c0 + c < channels && offset[k] >= 0)
      in = make(load<V>(map + offset[k] + (c0 + c) * c_stride), c0 + c);
#pragma unroll
    for (int v = 0; v < V; ++v) tile[c + v][k] = in.at[v];
  }
}

// partial[split][rate][n][c] = Σ over the split's pixels of g[pixel, rate, n] · h[pixel, rate, c], h =
// φ₁(γ₁·N₁(d) + β₁)
template <class T, int V, int PR, int PC>
__global__ void __launch_bounds__(PR * PC * WARP, 1)
    separable_conv2d_dv_kernel(const T* __restrict__ g, Strides gs, const T* __restrict__ d, Strides ds,
                               Affine<acc_t<T>> affine, acc_t<T>* __restrict__ partial, int64_t pixels,
                               int rows, int columns, int64_t split_pixels, ProductShape shape) {
  using A = acc_t<T>;
  using Stage = GramStage<T, PR, PC>;
  extern __shared__ __align__(16) double shared[];
  Stage& stage = *reinterpret_cast<Stage*>(shared);
  const int inner_tiles = (shape.inner + Stage::COLUMNS - 1) / Stage::COLUMNS;
  unsigned block = blockIdx.x;
  const int c0 = block % inner_tiles * Stage::COLUMNS;
  block /= inner_tiles;
  const int n0 = block % shape.outer_tiles * Stage::ROWS;
  block /= shape.outer_tiles;
  const int rate = block % shape.rates;
  const int64_t split = block / shape.rates, first = split * split_pixels;
  const int64_t last = first + split_pixels < pixels ? first + split_pixels : pixels;

  const auto locate = [&](int slot, int64_t from) {
    for (int k = threadIdx.x; k < DEPTH<T>; k += Stage::THREADS) {
      const int64_t pixel = from + k, b = pixel / columns / rows;
      const int j = pixel % columns, i = pixel / columns % rows;
      stage.offset[slot][0][k] = pixel < last ? b * gs.b + i * gs.h + j * gs.w : -1;
      stage.offset[slot][1][k] = pixel < last ? b * ds.b + i * ds.h + j * ds.w : -1;
    }
  };
  const auto fill = [&](int slot) {
    fill_transposed<T, V, Stage::ROWS, Stage::THREADS>(
        stage.left[slot], g + int64_t(rate) * shape.outer * gs.c, gs.c, stage.offset[slot][0], n0,
        shape.outer, shape.channels_last, [](const Vector<T, V>& in, int) { return in; });
    fill_transposed<T, V, Stage::COLUMNS, Stage::THREADS>(
        stage.right[slot], d + int64_t(rate) * shape.inner * ds.c, ds.c, stage.offset[slot][1], c0,
        shape.inner, shape.channels_last, [&](Vector<T, V> in, int c) {
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const int64_t channel = int64_t(rate) * shape.inner + c + v;
            const A n = (widen(in.at[v]) - affine.centre(channel)) * affine.scale(channel);
            in.at[v] = narrow<T>(activate(affine.act, n * affine.weight(channel) + affine.shift(channel)));
          }
          return in;
        });
  };
  const int warp = threadIdx.x / WARP, m_warp = warp % PR * WARP_ROWS, n_warp = warp / PR * WARP_COLUMNS;
  WarpProduct<T> product;
  locate(0, first);
  int slot = 1;
  for (int64_t from = first - DEPTH<T>; from < last; from += DEPTH<T>, slot ^= 1) {
    __syncthreads();  // as in the product above
    if (from + DEPTH<T> < last) fill(slot ^ 1);
    if (from >= first) product.multiply(&stage.left[slot][m_warp][0], &stage.right[slot][n_warp][0]);
    locate(slot, from + 2 * DEPTH<T>);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int n = n0 + m_warp + WarpProduct<T>::row(i, e), c = c0 + n_warp + WarpProduct<T>::column(j, e);
        if (n < shape.outer && c < shape.inner)
          partial[((split * shape.rates + rate) * shape.outer + n) * shape.inner + c] = product.acc[i][j][e];
      }
}

// dv[row] = γ₂ · M[row] and dγ₂ = Σ_c v·M, M = Σ partial in order; one block per row (rate, n). γ₂ null: 1.
template <class T>
__global__ void __launch_bounds__(BLOCK, 1)
    separable_conv2d_dv_finish_kernel(const acc_t<T>* __restrict__ partial, int64_t splits, int inner,
                                      const T* __restrict__ v, const acc_t<T>* __restrict__ gamma,
                                      T* __restrict__ dv, acc_t<T>* __restrict__ dgamma) {
  using A = acc_t<T>;
  extern __shared__ __align__(16) double shared[];
  const int64_t row = blockIdx.x, elements = int64_t(gridDim.x) * inner;
  A dot[1] = {0};
  for (int c = threadIdx.x; c < inner; c += blockDim.x) {
    A sum = 0;
    for (int64_t s = 0; s < splits; ++s) sum += partial[s * elements + row * inner + c];
    dot[0] += widen(v[row * inner + c]) * sum;
    if (dv) dv[row * inner + c] = narrow<T>(gamma ? gamma[row] * sum : sum);
  }
  sum_over_columns(dot, 1, reinterpret_cast<A*>(shared), [&](int, int, A total) {
    if (dgamma) dgamma[row] = total;
  });
}

}  // namespace segkernels::cuda
