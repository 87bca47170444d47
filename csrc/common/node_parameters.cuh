// The tiny parts over nodes and channels: the coefficients of scores, and sums over what blocks have made.
#pragma once

#include "common/device.cuh"

namespace segkernels::cuda {

// Scores are ⟨p_k, x̃⟩ + ⟨r_k, x̃²⟩ + Σ_parts b_k with x̃ = x − centre; a part of b is of 32 channels.
template <class A>
struct Coefficients {
  A *centre, *p, *r, *b;  // [C], [K, C], [K, C], [C / 32, K]
};
template <class D>
struct Coefficient {
  D p, r, b;
};
constexpr int COEFFICIENT_THREADS = 256, COEFFICIENT_WARPS = COEFFICIENT_THREADS / WARP;
constexpr int SAMPLE = 16;  // nodes whose median is the centre

// The (lower) median of at most SAMPLE of the nodes in a channel. It stays among most of them wherever a few
// others are.
template <class A>
__device__ inline A median_node(const A* __restrict__ w, int nodes, int channels) {
  const int step = (nodes + SAMPLE - 1) / SAMPLE, taken = (nodes + step - 1) / step;
  const int middle = (SAMPLE - 1) / 2, below = middle - (taken - 1) / 2;  // −∞ put the median in the middle
  A sorted[SAMPLE];
#pragma unroll
  for (int i = 0; i < SAMPLE; ++i)
    sorted[i] = i < taken ? w[int64_t(i) * step * channels] : A(i < taken + below ? -INFINITY : INFINITY);
#pragma unroll
  for (int pass = 0; pass < SAMPLE; ++pass)
#pragma unroll
    for (int i = pass % 2; i + 1 < SAMPLE; i += 2) {
      const A least = min(sorted[i], sorted[i + 1]);
      sorted[i + 1] = max(sorted[i], sorted[i + 1]);
      sorted[i] = least;
    }
  return sorted[middle];
}

// One block per 32 channels: about the median node, (p, r, b) = of(k, c, w_kc − centre_c). The lanes of a
// warp are channels, its nodes every eighth. Computed in double, whose rounding is lost in that of the
// results.
template <class A, class F>
__device__ inline void write_coefficients(const A* __restrict__ w, int nodes, int channels,
                                          const Coefficients<A>& out, F of) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, c = blockIdx.x * WARP + lane;
  const bool there = c < channels;
  const A centre = there ? median_node(w + c, nodes, channels) : A(0);
  if (there && warp == 0) out.centre[c] = centre;
  for (int k = warp; k < nodes; k += COEFFICIENT_WARPS) {
    Coefficient<double> made = {0, 0, 0};
    const int64_t at = int64_t(k) * channels + c;
    if (there) {
      made = of(k, c, double(w[at]) - centre);
      out.p[at] = A(made.p);
      out.r[at] = A(made.r);
    }
    for (int step = 1; step < WARP; step *= 2) made.b += __shfl_xor_sync(ALL_LANES, made.b, step);
    if (lane == 0) out.b[int64_t(blockIdx.x) * nodes + k] = A(made.b);
  }
}

// In shared memory: the sum over the block of one value a thread, given to all threads.
struct BlockSum {
  double strand[BLOCK / WARP], total;

  __device__ double operator()(double value) {
    double values[1] = {value};
    sum_over_columns(values, 1, strand, [&](int, int, double sum) { total = sum; });
    return total;
  }
};

// The sum in order of `splits` values, `stride` apart.
template <class A>
__device__ inline A sum_of_parts(const A* parts, int splits, int64_t stride) {
  A sum = 0;
#pragma unroll 4
  for (int s = 0; s < splits; ++s) sum += parts[s * stride];
  return sum;
}

// out [B, size] from its partial sums [B, splits, size]; one thread per element.
template <class T>
__global__ void __launch_bounds__(BLOCK, 1)
    node_sums_kernel(const acc_t<T>* __restrict__ sums, int splits, int64_t size, int64_t images,
                     T* __restrict__ out) {
  const int64_t i = int64_t(blockIdx.x) * BLOCK + threadIdx.x;
  if (i >= images * size) return;
  out[i] = narrow<T>(sum_of_parts(sums + i / size * splits * size + i % size, splits, size));
}

}  // namespace segkernels::cuda
