// h = φ(γ·N(a) + β) per channel and its gradient. N is the identity (mean null) or standardisation by the
// batch's moments.
//
// With g = dh · φ'(γ·N + β): dβ = Σ g, dγ = Σ g·N; da = γ·g, or with standardisation (n values per channel)
//     da = γ/√(var + eps) · (g − Σg/n − N·Σ(g·N)/n).
#pragma once

#include "common/device.cuh"

namespace segkernels::cuda {

template <class A>
struct Affine {
  const A *gamma, *beta, *mean, *var;  // [channels]; null: 1, 0, no standardisation
  A eps;
  Activation act;

  __device__ A centre(int64_t c) const { return mean ? mean[c] : A(0); }
  __device__ A scale(int64_t c) const { return mean ? A(1) / sqrt(var[c] + eps) : A(1); }  // of N
  __device__ A weight(int64_t c) const { return gamma ? gamma[c] : A(1); }
  __device__ A shift(int64_t c) const { return beta ? beta[c] : A(0); }
};

// Calls f(pixel's row, column) for the pixels of this thread.
template <class F>
__device__ inline void for_pixels(const Tiling& tiling, const Place& at, int rows, int columns, F f) {
  for (int turn = 0; turn < tiling.turns; ++turn) {
    const int64_t pixel = (int64_t(at.tile) * tiling.turns + turn) * at.columns + at.column;
    if (pixel >= int64_t(rows) * columns) break;
    f(int(pixel / columns), int(pixel % columns));
  }
}

// h = φ(γ·N(a) + β)
template <class T, int V>
__global__ void __launch_bounds__(BLOCK, 1)
    affine_kernel(const T* __restrict__ a, Strides as, T* __restrict__ h, Strides hs, Affine<acc_t<T>> affine,
                  int channels, int rows, int columns, Tiling tiling) {
  using A = acc_t<T>;
  const Place at = place_of<V>(tiling);
  if (at.c >= channels) return;
  A centre[V], scale[V], shift[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    centre[v] = affine.centre(at.c + v), shift[v] = affine.shift(at.c + v);
    scale[v] = affine.scale(at.c + v) * affine.weight(at.c + v);
  }
  for_pixels(tiling, at, rows, columns, [&](int i, int j) {
    const Vector<T, V> in = load<V>(a + at.b * as.b + at.c * as.c + i * as.h + j * as.w);
    Vector<T, V> out;
#pragma unroll
    for (int v = 0; v < V; ++v)
      out.at[v] = narrow<T>(activate(affine.act, (widen(in.at[v]) - centre[v]) * scale[v] + shift[v]));
    store<V>(h + at.b * hs.b + at.c * hs.c + i * hs.h + j * hs.w, out);
  });
}

// What a thread needs to form g and N of its V channels. The slope of φ is read off h where it is given, else
// off γ·N(a) + β; a may be absent where neither N nor that slope is asked for.
template <class T, int V>
struct Slope {
  using A = acc_t<T>;
  A centre[V], scale[V], weight[V], shift[V];
  Activation act;
  bool from_output;

  __device__ Slope(const Affine<A>& affine, int c, bool from_output_)
      : act(affine.act), from_output(from_output_) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      centre[v] = affine.centre(c + v), scale[v] = affine.scale(c + v);
      weight[v] = affine.weight(c + v), shift[v] = affine.shift(c + v);
    }
  }
  __device__ A standard(int v, T a) const { return (widen(a) - centre[v]) * scale[v]; }
  __device__ A gradient(int v, T dh, A n, T h) const {
    return passes(act, from_output ? widen(h) : n * weight[v] + shift[v]) ? widen(dh) : A(0);
  }
};

// Partial sums [splits][2][channels] of g and g·N.
template <class T, int V>
__global__ void __launch_bounds__(BLOCK, 1)
    affine_sums_kernel(const T* __restrict__ dh, Strides dhs, const T* __restrict__ a, Strides as,
                       const T* __restrict__ h, Strides hs, Affine<acc_t<T>> affine,
                       acc_t<T>* __restrict__ partial, int channels, int rows, int columns, Tiling tiling) {
  using A = acc_t<T>;
  const Place at = place_of<V>(tiling);
  A sums[2 * V] = {};
  if (at.c < channels) {
    const Slope<T, V> slope(affine, at.c, h != nullptr);
    for_pixels(tiling, at, rows, columns, [&](int i, int j) {
      const Vector<T, V> up = load<V>(dh + at.b * dhs.b + at.c * dhs.c + i * dhs.h + j * dhs.w);
      Vector<T, V> in = {}, out = {};
      if (a) in = load<V>(a + at.b * as.b + at.c * as.c + i * as.h + j * as.w);
      if (h) out = load<V>(h + at.b * hs.b + at.c * hs.c + i * hs.h + j * hs.w);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const A n = slope.standard(v, in.at[v]), g = slope.gradient(v, up.at[v], n, out.at[v]);
        sums[v] += g;
        sums[V + v] += g * n;
      }
    });
  }
  extern __shared__ __align__(16) double shared[];
  sum_over_columns(sums, tiling.lanes, reinterpret_cast<A*>(shared), [&](int n, int lane, A total) {
    const int c = at.c + (lane - at.lane) * V + n % V;
    if (c < channels) partial[(at.split * 2 + n / V) * channels + c] = total;
  });
}

// da; sum_g and sum_gn [channels] are those of the whole batch (used with standardisation only), count their
// n. da may be dh.
template <class T, int V>
__global__ void __launch_bounds__(BLOCK, 1)
    affine_backward_kernel(const T* dh, Strides dhs, const T* __restrict__ a, Strides as,
                           const T* __restrict__ h, Strides hs, Affine<acc_t<T>> affine,
                           const acc_t<T>* __restrict__ sum_g, const acc_t<T>* __restrict__ sum_gn,
                           acc_t<T> count, T* da, Strides das, int channels, int rows, int columns,
                           Tiling tiling) {
  using A = acc_t<T>;
  const Place at = place_of<V>(tiling);
  if (at.c >= channels) return;
  const Slope<T, V> slope(affine, at.c, h != nullptr);
  A mean_g[V] = {}, mean_gn[V] = {};
  if (affine.mean) {
#pragma unroll
    for (int v = 0; v < V; ++v) mean_g[v] = sum_g[at.c + v] / count, mean_gn[v] = sum_gn[at.c + v] / count;
  }
  for_pixels(tiling, at, rows, columns, [&](int i, int j) {
    const Vector<T, V> up = load<V>(dh + at.b * dhs.b + at.c * dhs.c + i * dhs.h + j * dhs.w);
    Vector<T, V> in = {}, out = {}, done;
    if (a) in = load<V>(a + at.b * as.b + at.c * as.c + i * as.h + j * as.w);
    if (h) out = load<V>(h + at.b * hs.b + at.c * hs.c + i * hs.h + j * hs.w);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const A n = slope.standard(v, in.at[v]);
      A g = slope.gradient(v, up.at[v], n, out.at[v]);
      if (affine.mean) g -= mean_g[v] + n * mean_gn[v];
      done.at[v] = narrow<T>(slope.weight[v] * slope.scale[v] * g);
    }
    store<V>(da + at.b * das.b + at.c * das.c + i * das.h + j * das.w, done);
  });
}

// Σ g and Σ g·N [channels] from the partial sums, added in a fixed order. Block: 32 elements × 4 strands of
// splits.
template <class A>
__global__ void __launch_bounds__(BLOCK, 1)
    affine_sums_finish_kernel(const A* __restrict__ partial, int64_t splits, int channels,
                              A* __restrict__ sum_g, A* __restrict__ sum_gn) {
  __shared__ A strand[BLOCK];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  const int64_t e = int64_t(blockIdx.x) * WARP + lane, elements = 2 * int64_t(channels);
  A sum = 0;
  if (e < elements)
    for (int64_t s = warp; s < splits; s += warps) sum += partial[s * elements + e];
  strand[threadIdx.x] = sum;
  __syncthreads();
  if (warp != 0 || e >= elements) return;
  for (int k = 1; k < warps; ++k) sum += strand[k * WARP + lane];
  (e < channels ? sum_g[e] : sum_gn[e - channels]) = sum;
}

}  // namespace segkernels::cuda
