// Depthwise convolution of R rates over one input, forward and backward.
//
//     y[b, ρC + c, i, j] = bias[ρ, c] + Σ_ef w[ρ, c, e, f] · x[b, c, i·s − p_ρ + e·r_ρ, j·s − p_ρ + f·r_ρ]
//
// Stride 1, K×K (K = 3, 5): the walk. A rate-r convolution is r_h × r_w independent dense ones on interleaved
// sub-images. A thread owns V channels of one column and walks rows i, i + r, i + 2r, … of one residue class
// with K running accumulators, so every row is loaded once (per column tap) and feeds K outputs. Rows outside
// are skipped. The gradient of x is the same walk over dy with the taps reversed, and dw_ef = Σ x · dy uses
// the very dy taps it loads: x is read at the centre only. Everything else (stride 2, other kernels, the sum
// of dx over several rates): one thread per element, all taps.
#pragma once

#include "common/device.cuh"

namespace segkernels::cuda {

// A walk: row `row`, row + r, … (`length` of them at most) of column `column`.
struct Walk {
  int row, column, steps;
};
__device__ inline Walk walk_of(int64_t item, const Correlation& k, int rate, int length) {
  const int r = k.rate_h[rate], classes = min(r, k.out_rows);
  const int column = item % k.out_columns;
  const int64_t rest = item / k.out_columns;
  const int64_t row = rest % classes + rest / classes * length * r;
  if (row >= k.out_rows) return {0, 0, 0};
  return {int(row), column, min(length, (k.out_rows - int(row) + r - 1) / r)};
}

// The K column taps of the rows that a walk comes by; a row or column outside the map gives none.
template <class T, int V, int K>
struct Taps {
  const T* next;  // tap 0 in the coming row
  int64_t down, right;
  bool inside[K];
  int row, rows, rate;

  __device__ Taps(const T* map, const Strides& s, const Correlation& k, int rate_, const Walk& walk) {
    rate = k.rate_h[rate_], rows = k.rows, row = walk.row - k.pad_h[rate_];
    const int column = walk.column - k.pad_w[rate_], apart = k.rate_w[rate_];
#pragma unroll
    for (int f = 0; f < K; ++f) inside[f] = column + f * apart >= 0 && column + f * apart < k.columns;
    next = map + row * s.h + column * s.w;
    down = rate * s.h, right = apart * s.w;
  }
  // Whether this row lies inside; if so, its taps.
  __device__ bool load_row(Vector<T, V> (&tap)[K]) {
    const bool here = row >= 0 && row < rows;
    if (here) {
#pragma unroll
      for (int f = 0; f < K; ++f)
        if (inside[f]) tap[f] = load<V>(next + f * right);
    }
    row += rate;
    next += down;
    return here;
  }
};

// w of V channels, widened; reversed in both directions for the gradient of x. w: [R, C, K, K]
template <class T, int V, int K>
__device__ inline void load_weights(acc_t<T> (&weight)[K][K][V], const T* w, const Correlation& k,
                                    const Place& at, bool reversed) {
#pragma unroll
  for (int v = 0; v < V; ++v)
#pragma unroll
    for (int e = 0; e < K * K; ++e)
      weight[e / K][e % K][v] =
          widen(w[(int64_t(at.rate) * k.channels + at.c + v) * K * K + (reversed ? K * K - 1 - e : e)]);
}

// Merges the threads' moments per channel and writes those of this block: moments [splits][3][R·C].
template <int V, class A>
__device__ inline void write_moments(RunningMoments<A> (&running)[V], A* moments, const Tiling& tiling,
                                     const Place& at, int channels, A* shared) {
  const int warp = threadIdx.x / WARP, warps = blockDim.x / WARP, width = tiling.lanes * V;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    Moments<A> m = running[v].moments();
    for (int step = tiling.lanes; step < WARP; step *= 2) m = merge_across(m, step);
    if (int(threadIdx.x % WARP) < tiling.lanes) {
      A* slot = shared + (warp * width + at.lane * V + v) * 3;
      slot[0] = m.n, slot[1] = m.mean, slot[2] = m.m2;
    }
  }
  __syncthreads();
  for (int e = threadIdx.x; e < width; e += blockDim.x) {
    Moments<A> m = {shared[e * 3], shared[e * 3 + 1], shared[e * 3 + 2]};
    for (int k = 1; k < warps; ++k) {
      const A* slot = shared + (k * width + e) * 3;
      m = merge(m, Moments<A>{slot[0], slot[1], slot[2]});
    }
    const int c = at.c - at.lane * V + e;
    if (c >= channels) continue;
    const int64_t all = int64_t(tiling.rates) * channels;
    A* out = moments + at.split * 3 * all + int64_t(at.rate) * channels + c;
    out[0] = m.n, out[all] = m.mean, out[2 * all] = m.m2;
  }
}

// y = w ⊛ x + bias by walks; `reversed` turns the kernel round (gradient of x). MOMENTS: also of the stored
// y.
template <class T, int V, int K, bool MOMENTS>
__global__ void __launch_bounds__(BLOCK, K == 3 && !MOMENTS ? 3 : 1)
    depthwise_conv2d_walk_kernel(const T* __restrict__ x, Strides xs, const T* __restrict__ w,
                                 const T* __restrict__ bias, T* __restrict__ y, Strides ys, Correlation k,
                                 Tiling tiling, int length, bool reversed, acc_t<T>* __restrict__ moments) {
  using A = acc_t<T>;
  const Place at = place_of<V>(tiling);
  RunningMoments<A> running[MOMENTS ? V : 1];
  if (at.c < k.channels) {
    A weight[K][K][V];
    load_weights<T, V, K>(weight, w, k, at, reversed);
    if (bias) bias += int64_t(at.rate) * k.channels + at.c;

    for (int turn = 0; turn < tiling.turns; ++turn) {
      const Walk walk =
          walk_of((int64_t(at.tile) * tiling.turns + turn) * at.columns + at.column, k, at.rate, length);
      if (walk.steps == 0) break;
      Taps<T, V, K> taps(x + at.b * xs.b + at.c * xs.c, xs, k, at.rate, walk);
      T* out = y + at.b * ys.b + (int64_t(at.rate) * k.channels + at.c) * ys.c + walk.row * ys.h +
               walk.column * ys.w;

      A acc[K][V] = {};  // output u of the walk lives in slot u % K
      for (int t0 = 0; t0 < walk.steps + K - 1; t0 += K) {
#pragma unroll
        for (int s = 0; s < K; ++s) {
          const int t = t0 + s;  // row of the input: tap e of output t − e
          if (t >= walk.steps + K - 1) break;
          Vector<T, V> tap[K] = {};
          if (taps.load_row(tap)) {
#pragma unroll
            for (int f = 0; f < K; ++f) {
              if (!taps.inside[f]) continue;
              A in[V];
#pragma unroll
              for (int v = 0; v < V; ++v) in[v] = widen(tap[f].at[v]);
#pragma unroll
              for (int e = 0; e < K; ++e) {
                if (t - e < 0 || t - e >= walk.steps) continue;
#pragma unroll
                for (int v = 0; v < V; ++v) acc[(s - e + K) % K][v] += weight[e][f][v] * in[v];
              }
            }
          }
          if (t >= K - 1) {  // output t − (K − 1) is complete
            Vector<T, V> done;
#pragma unroll
            for (int v = 0; v < V; ++v) {
              done.at[v] = narrow<T>(acc[(s + 1) % K][v] + (bias ? widen(bias[v]) : A(0)));
              if constexpr (MOMENTS) running[v].add(widen(done.at[v]));
            }
            store<V>(out, done);
            out += k.rate_h[at.rate] * ys.h;
          }
#pragma unroll
          for (int v = 0; v < V; ++v) acc[(s + 1) % K][v] = A(0);
        }
      }
    }
  }
  if constexpr (MOMENTS) {
    extern __shared__ __align__(16) double shared[];
    write_moments<V>(running, moments, tiling, at, k.channels, reinterpret_cast<A*>(shared));
  }
}

// dx (if DX) and partial sums of dw and db in one pass, by walks over the rows of x. k is reversed: it reads
// dy. partial: [splits][R][K·K + 1][C], the last row is db, counted at the centre tap (same padding only:
// `centred`).
template <class T, int V, int K, bool DX>
__global__ void __launch_bounds__(BLOCK, K == 3 ? 3 : 1)
    depthwise_conv2d_walk_backward_kernel(const T* __restrict__ dy, Strides dys, const T* __restrict__ x,
                                          Strides xs, const T* __restrict__ w, T* __restrict__ dx,
                                          Strides dxs, acc_t<T>* __restrict__ partial, Correlation k,
                                          Tiling tiling, int length) {
  using A = acc_t<T>;
  const Place at = place_of<V>(tiling);
  A dw[(K * K + 1) * V] = {};
  if (at.c < k.channels) {
    A weight[DX ? K : 1][K][V];
    if constexpr (DX) load_weights<T, V, K>(weight, w, k, at, true);

    for (int turn = 0; turn < tiling.turns; ++turn) {
      const Walk walk =
          walk_of((int64_t(at.tile) * tiling.turns + turn) * at.columns + at.column, k, at.rate, length);
      if (walk.steps == 0) break;
      Taps<T, V, K> taps(dy + at.b * dys.b + (int64_t(at.rate) * k.channels + at.c) * dys.c, dys, k, at.rate,
                         walk);
      const int64_t stride = int64_t(k.rate_h[at.rate]);
      const T* in = x + at.b * xs.b + at.c * xs.c + walk.row * xs.h + walk.column * xs.w;
      T* out = DX ? dx + at.b * dxs.b + at.c * dxs.c + walk.row * dxs.h + walk.column * dxs.w : nullptr;

      A acc[DX ? K : 1][V] = {}, here[K][V] = {};  // dx and x of row u of the walk: slot u % K
      for (int t0 = 0; t0 < walk.steps + K - 1; t0 += K) {
#pragma unroll
        for (int s = 0; s < K; ++s) {
          const int t = t0 + s;
          if (t >= walk.steps + K - 1) break;
          if (t < walk.steps) {
            const Vector<T, V> raw = load<V>(in);
            in += stride * xs.h;
#pragma unroll
            for (int v = 0; v < V; ++v) here[s][v] = widen(raw.at[v]);
          }
          Vector<T, V> tap[K] = {};
          if (taps.load_row(tap)) {
#pragma unroll
            for (int f = 0; f < K; ++f) {
              if (!taps.inside[f]) continue;
              A in[V];
#pragma unroll
              for (int v = 0; v < V; ++v) in[v] = widen(tap[f].at[v]);
#pragma unroll
              for (int e = 0; e < K; ++e) {
                if (t - e < 0 || t - e >= walk.steps) continue;
                const int u = (s - e + K) % K;
#pragma unroll
                for (int v = 0; v < V; ++v) {
                  if constexpr (DX) acc[u][v] += weight[e][f][v] * in[v];
                  dw[(K * K - 1 - (e * K + f)) * V + v] += here[u][v] * in[v];
                  if (e == K / 2 && f == K / 2) dw[K * K * V + v] += in[v];
                }
              }
            }
          }
          if constexpr (DX) {
            if (t >= K - 1) {
              Vector<T, V> done;
#pragma unroll
              for (int v = 0; v < V; ++v) done.at[v] = narrow<T>(acc[(s + 1) % K][v]);
              store<V>(out, done);
              out += stride * dxs.h;
            }
#pragma unroll
            for (int v = 0; v < V; ++v) acc[(s + 1) % K][v] = A(0);
          }
        }
      }
    }
  }
  extern __shared__ __align__(16) double shared[];
  sum_over_columns(dw, tiling.lanes, reinterpret_cast<A*>(shared), [&](int n, int lane, A total) {
    const int c = at.c + (lane - at.lane) * V + n % V;
    if (c < k.channels)
      partial[((at.split * tiling.rates + at.rate) * (K * K + 1) + n / V) * k.channels + c] = total;
  });
}

// y by one thread per pixel and vector of channels: any kernel, any stride.
template <class T, int V, bool MOMENTS>
__global__ void __launch_bounds__(BLOCK, 1)
    depthwise_conv2d_gather_kernel(const T* __restrict__ x, Strides xs, const T* __restrict__ w,
                                   const T* __restrict__ bias, T* __restrict__ y, Strides ys, Correlation k,
                                   Tiling tiling, acc_t<T>* __restrict__ moments) {
  using A = acc_t<T>;
  const Place at = place_of<V>(tiling);
  const int64_t channel = int64_t(at.rate) * k.channels + at.c, pixels = int64_t(k.out_rows) * k.out_columns;
  const int taps = k.kh * k.kw;
  RunningMoments<A> running[MOMENTS ? V : 1];
  for (int turn = 0; turn < tiling.turns; ++turn) {
    const int64_t pixel = (int64_t(at.tile) * tiling.turns + turn) * at.columns + at.column;
    if (at.c >= k.channels || pixel >= pixels) break;
    const int i = pixel / k.out_columns, j = pixel % k.out_columns;
    A acc[V];
#pragma unroll
    for (int v = 0; v < V; ++v) acc[v] = bias ? widen(bias[channel + v]) : A(0);
    for (int e = 0; e < k.kh; ++e) {
      const int row = i * k.stride_h - k.pad_h[at.rate] + e * k.rate_h[at.rate];
      if (row < 0 || row >= k.rows) continue;
      for (int f = 0; f < k.kw; ++f) {
        const int column = j * k.stride_w - k.pad_w[at.rate] + f * k.rate_w[at.rate];
        if (column < 0 || column >= k.columns) continue;
        const Vector<T, V> in = load<V>(x + at.b * xs.b + at.c * xs.c + row * xs.h + column * xs.w);
#pragma unroll
        for (int v = 0; v < V; ++v) acc[v] += widen(w[(channel + v) * taps + e * k.kw + f]) * widen(in.at[v]);
      }
    }
    Vector<T, V> done;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      done.at[v] = narrow<T>(acc[v]);
      if constexpr (MOMENTS) running[v].add(widen(done.at[v]));
    }
    store<V>(y + at.b * ys.b + channel * ys.c + i * ys.h + j * ys.w, done);
  }
  if constexpr (MOMENTS) {
    extern __shared__ __align__(16) double shared[];
    write_moments<V>(running, moments, tiling, at, k.channels, reinterpret_cast<A*>(shared));
  }
}

// The output row (column) that tap e of a strided window sends to input row m, or −1.
__device__ inline int source(int m, int pad, int rate, int e, int stride, int size) {
  const int64_t n = int64_t(m) + pad - int64_t(rate) * e;
  return n < 0 || n % stride || n / stride >= size ? -1 : int(n / stride);
}

// dx, summed over the rates in the accumulation type: any kernel, any stride. k is that of the forward pass.
template <class T, int V>
__global__ void __launch_bounds__(BLOCK, 1)
    depthwise_conv2d_gather_dx_kernel(const T* __restrict__ dy, Strides dys, const T* __restrict__ w,
                                      T* __restrict__ dx, Strides dxs, Correlation k, int rates,
                                      Tiling tiling) {
  using A = acc_t<T>;
  const Place at = place_of<V>(tiling);
  const int64_t pixel = int64_t(at.tile) * at.columns + at.column;
  if (at.c >= k.channels || pixel >= int64_t(k.rows) * k.columns) return;
  const int m = pixel / k.columns, n = pixel % k.columns, taps = k.kh * k.kw;
  A acc[V] = {};
  for (int rate = 0; rate < rates; ++rate) {
    const int64_t channel = int64_t(rate) * k.channels + at.c;
    for (int e = 0; e < k.kh; ++e) {
      const int i = source(m, k.pad_h[rate], k.rate_h[rate], e, k.stride_h, k.out_rows);
      if (i < 0) continue;
      for (int f = 0; f < k.kw; ++f) {
        const int j = source(n, k.pad_w[rate], k.rate_w[rate], f, k.stride_w, k.out_columns);
        if (j < 0) continue;
        const Vector<T, V> in = load<V>(dy + at.b * dys.b + channel * dys.c + i * dys.h + j * dys.w);
#pragma unroll
        for (int v = 0; v < V; ++v) acc[v] += widen(w[(channel + v) * taps + e * k.kw + f]) * widen(in.at[v]);
      }
    }
  }
  Vector<T, V> done;
#pragma unroll
  for (int v = 0; v < V; ++v) done.at[v] = narrow<T>(acc[v]);
  store<V>(dx + at.b * dxs.b + at.c * dxs.c + m * dxs.h + n * dxs.w, done);
}

// Partial sums of dw and db: any kernel, any stride. partial: [splits][R][kh·kw + 1][C]
template <class T>
__global__ void __launch_bounds__(BLOCK, 1)
    depthwise_conv2d_gather_dw_kernel(const T* __restrict__ dy, Strides dys, const T* __restrict__ x,
                                      Strides xs, acc_t<T>* __restrict__ partial, Correlation k,
                                      Tiling tiling) {
  using A = acc_t<T>;
  extern __shared__ __align__(16) double shared[];
  const Place at = place_of<1>(tiling);
  const int64_t channel = int64_t(at.rate) * k.channels + at.c, pixels = int64_t(k.out_rows) * k.out_columns;
  const int taps = k.kh * k.kw;
  for (int tap = 0; tap <= taps; ++tap) {
    const int down = tap / k.kw * k.rate_h[at.rate] - k.pad_h[at.rate];
    const int right = tap % k.kw * k.rate_w[at.rate] - k.pad_w[at.rate];
    A sum[1] = {0};
    for (int turn = 0; turn < tiling.turns; ++turn) {
      const int64_t pixel = (int64_t(at.tile) * tiling.turns + turn) * at.columns + at.column;
      if (at.c >= k.channels || pixel >= pixels) break;
      const int i = pixel / k.out_columns, j = pixel % k.out_columns;
      const int row = i * k.stride_h + down, column = j * k.stride_w + right;
      if (tap < taps && (row < 0 || row >= k.rows || column < 0 || column >= k.columns)) continue;
      const A g = widen(dy[at.b * dys.b + channel * dys.c + i * dys.h + j * dys.w]);
      sum[0] += tap == taps ? g : g * widen(x[at.b * xs.b + at.c * xs.c + row * xs.h + column * xs.w]);
    }
    sum_over_columns(sum, tiling.lanes, reinterpret_cast<A*>(shared), [&](int, int lane, A total) {
      const int c = at.c + lane - at.lane;
      if (c < k.channels)
        partial[((at.split * tiling.rates + at.rate) * (taps + 1) + tap) * k.channels + c] = total;
    });
  }
}

// dw [R, C, taps] and db [R, C] from the partial sums, added in the order of the splits; either may be
// absent. Block: 32 channels × 8 strands of splits.
template <class T>
__global__ void __launch_bounds__(BLOCK, 1)
    depthwise_conv2d_finish_kernel(const acc_t<T>* __restrict__ partial, int64_t splits, int channels,
                                   int taps, T* __restrict__ dw, T* __restrict__ db) {
  using A = acc_t<T>;
  __shared__ A strand[BLOCK];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  const int tiles = (channels + WARP - 1) / WARP, c = blockIdx.x % tiles * WARP + lane;
  const int64_t row = blockIdx.x / tiles;  // rate · (taps + 1) + tap
  const int64_t rows = gridDim.x / tiles;
  A sum = 0;
  if (c < channels)
    for (int64_t s = warp; s < splits; s += warps) sum += partial[(s * rows + row) * channels + c];
  strand[threadIdx.x] = sum;
  __syncthreads();
  if (warp != 0 || c >= channels) return;
  for (int k = 1; k < warps; ++k) sum += strand[k * WARP + lane];
  const int64_t rate = row / (taps + 1), tap = row % (taps + 1), channel = rate * channels + c;
  if (tap < taps && dw) dw[channel * taps + tap] = narrow<T>(sum);
  if (tap == taps && db) db[channel] = narrow<T>(sum);
}

}  // namespace segkernels::cuda
