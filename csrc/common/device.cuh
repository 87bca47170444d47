// Device code that two or more operators use: types, vectors, activations, and reductions in a fixed order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace segkernels::cuda {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int BLOCK = 128;     // threads, unless a kernel says otherwise
constexpr int MAX_RATES = 16;  // rates of one call (ASPP has 3, DPC 5)

template <class T>
struct accumulation {
  using type = float;
};
template <>
struct accumulation<double> {
  using type = double;
};
template <class T>
using acc_t = typename accumulation<T>::type;

// Storage type to accumulation type and back (to nearest, ties to even).
__device__ inline float widen(__half a) { return __half2float(a); }
__device__ inline float widen(__nv_bfloat16 a) { return __bfloat162float(a); }
__device__ inline float widen(float a) { return a; }
__device__ inline double widen(double a) { return a; }

template <class T>
__device__ inline T narrow(acc_t<T> a);
template <>
__device__ inline __half narrow<__half>(float a) {
  return __float2half_rn(a);
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float a) {
  return __float2bfloat16_rn(a);
}
template <>
__device__ inline float narrow<float>(float a) {
  return a;
}
template <>
__device__ inline double narrow<double>(double a) {
  return a;
}

// V neighbouring elements, moved by one instruction. The address must be aligned to the whole vector.
template <class T, int V>
struct alignas(sizeof(T) * V) Vector {
  T at[V];
};
template <int V, class T>
__device__ inline Vector<T, V> load(const T* p) {
  return *reinterpret_cast<const Vector<T, V>*>(p);
}
template <int V, class T>
__device__ inline void store(T* p, const Vector<T, V>& a) {
  *reinterpret_cast<Vector<T, V>*>(p) = a;
}

// The element strides of a map [B, C, H, W]; any memory format is a choice of these.
struct Strides {
  int64_t b, c, h, w;
};

// Sizes of one convolution. For the gradient of x the map that is read is dy (see reversed()).
struct Correlation {
  int channels;       // C
  int rows, columns;  // of the map that is read
  int out_rows, out_columns;
  int kh, kw, stride_h, stride_w;
  int pad_h[MAX_RATES], pad_w[MAX_RATES], rate_h[MAX_RATES], rate_w[MAX_RATES];
};

enum class Activation : int { none, relu, relu6 };

// Comparisons are written so that NaN passes through.
template <class A>
__device__ inline A activate(Activation act, A a) {
  if (act != Activation::none && a < A(0)) a = A(0);
  if (act == Activation::relu6 && a > A(6)) a = A(6);
  return a;
}
// The derivative, from the input or from the output of the activation: both tell alike.
template <class A>
__device__ inline bool passes(Activation act, A a) {
  return act == Activation::none || (!(a <= A(0)) && !(act == Activation::relu6 && a >= A(6)));
}

// How a block of threads lies over a map: `lanes` (a power of two ≤ 32) vectors of V channels, and for each
// of them blockDim.x / lanes items (pixels, or walks over pixels). channels_last: the lanes of a warp read
// neighbouring channels. NCHW: lanes = 1, and neighbouring threads own neighbouring columns. A block is (map,
// tile of `items` · `turns`, channel tile, rate), the rate fastest, so that the rates over one input meet in
// the L2 cache.
struct Tiling {
  int lanes, turns, tiles, channel_tiles, rates;
  __host__ __device__ int64_t splits(int64_t B) const { return B * tiles; }
  __host__ __device__ int64_t blocks(int64_t B) const { return splits(B) * channel_tiles * rates; }
};
struct Place {
  int rate, c, tile, lane, column, columns;
  int64_t b, split;
};
template <int V>
__device__ inline Place place_of(const Tiling& t) {
  Place p;
  unsigned block = blockIdx.x;
  p.rate = block % t.rates;
  block /= t.rates;
  p.lane = threadIdx.x % t.lanes;
  p.c = (block % t.channel_tiles * t.lanes + p.lane) * V;
  block /= t.channel_tiles;
  p.tile = block % t.tiles;
  p.b = block / t.tiles;
  p.split = block;
  p.column = threadIdx.x / t.lanes;
  p.columns = blockDim.x / t.lanes;
  return p;
}

// Sums each of N values over the threads of the block that have the same lane, in an order that the launch
// alone fixes, and calls write(n, lane, total) once per sum. All threads must arrive. shared: (blockDim.x /
// 32) · N · lanes values.
template <int N, class A, class F>
__device__ inline void sum_over_columns(A (&value)[N], int lanes, A* shared, F write) {
  const int warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
#pragma unroll
  for (int n = 0; n < N; ++n)
    for (int step = lanes; step < WARP; step *= 2) value[n] += __shfl_xor_sync(ALL_LANES, value[n], step);
  if (int(threadIdx.x % WARP) < lanes) {
#pragma unroll
    for (int n = 0; n < N; ++n) shared[(warp * N + n) * lanes + threadIdx.x % WARP] = value[n];
  }
  __syncthreads();
  for (int e = threadIdx.x; e < N * lanes; e += blockDim.x) {
    A total = shared[e];
    for (int k = 1; k < warps; ++k) total += shared[k * N * lanes + e];
    write(e / lanes, e % lanes, total);
  }
  __syncthreads();
}

// Count, mean and sum of squared deviations of a set; sets are merged by Chan's formula (Chan, Golub, LeVeque
// 1983).
template <class A>
struct Moments {
  A n, mean, m2;
};
template <class A>
__device__ inline Moments<A> merge(const Moments<A>& p, const Moments<A>& q) {
  if (q.n == A(0)) return p;
  if (p.n == A(0)) return q;
  const A n = p.n + q.n, delta = q.mean - p.mean, share = q.n / n;
  return {n, p.mean + delta * share, p.m2 + q.m2 + delta * delta * p.n * share};
}
template <class A>
__device__ inline Moments<A> shuffle_xor(const Moments<A>& m, int step) {
  return {__shfl_xor_sync(ALL_LANES, m.n, step), __shfl_xor_sync(ALL_LANES, m.mean, step),
          __shfl_xor_sync(ALL_LANES, m.m2, step)};
}
// Merging is not symmetric in the last bit: the lower lane's set always comes first.
template <class A>
__device__ inline Moments<A> merge_across(const Moments<A>& mine, int step) {
  const Moments<A> other = shuffle_xor(mine, step);
  return threadIdx.x & step ? merge(other, mine) : merge(mine, other);
}

// A thread's running moments about its first value: no cancellation, and no division until the end.
template <class A>
struct RunningMoments {
  A n = 0, first = 0, s1 = 0, s2 = 0;
  __device__ void add(A a) {
    if (n == A(0)) first = a;
    n += A(1);
    const A t = a - first;
    s1 += t;
    s2 += t * t;
  }
  __device__ Moments<A> moments() const {
    if (n == A(0)) return {0, 0, 0};
    const A t = s1 / n;
    return {n, first + t, s2 - s1 * t};
  }
};

// mean and biased variance [channels] from the blocks' moments [splits][3][channels], merged in order.
template <class A>
__global__ void __launch_bounds__(BLOCK, 1)
    merge_moments_kernel(const A* __restrict__ moments, int64_t splits, int channels, A* __restrict__ mean,
                         A* __restrict__ var) {
  __shared__ A strand[3][BLOCK];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  const int c = blockIdx.x * WARP + lane;
  Moments<A> m = {0, 0, 0};
  if (c < channels)
    for (int64_t s = warp; s < splits; s += warps) {
      const A* p = moments + s * 3 * channels + c;
      m = merge(m, Moments<A>{p[0], p[channels], p[2 * int64_t(channels)]});
    }
  strand[0][threadIdx.x] = m.n, strand[1][threadIdx.x] = m.mean, strand[2][threadIdx.x] = m.m2;
  __syncthreads();
  if (warp != 0 || c >= channels) return;
  for (int k = 1; k < warps; ++k) {
    const int t = k * WARP + lane;
    m = merge(m, Moments<A>{strand[0][t], strand[1][t], strand[2][t]});
  }
  mean[c] = m.mean;
  var[c] = m.m2 / m.n;
}

}  // namespace segkernels::cuda
