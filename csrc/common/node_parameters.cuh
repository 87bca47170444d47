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

// One block per 32 channels: about the mean node, (p, r, b) = of(k, c, w_kc − centre_c). The lanes of a warp
// are channels, its nodes every eighth. Computed in double, whose rounding is lost in that of the results.
template <class A, class F>
__device__ inline void write_coefficients(const A* __restrict__ w, int nodes, int channels,
                                          const Coefficients<A>& out,
                                          double (&strand)[COEFFICIENT_WARPS][WARP], F of) {
  constexpr int WARPS = COEFFICIENT_WARPS;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, c = blockIdx.x * WARP + lane;
  const bool there = c < channels;
  double sum = 0;
  if (there)
    for (int k = warp; k < nodes; k += WARPS) sum += w[int64_t(k) * channels + c];
  strand[warp][lane] = sum;
  __syncthreads();
  sum = 0;
  for (int i = 0; i < WARPS; ++i) sum += strand[i][lane];
  const A centre = A(sum / nodes);
  if (there && warp == 0) out.centre[c] = centre;
  for (int k = warp; k < nodes; k += WARPS) {
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

}  // namespace segkernels::cuda
