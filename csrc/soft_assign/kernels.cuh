// Soft assignment to nodes with a scale per channel: what comes before and after the passes over the pixels
// (common/scores.cuh, gather.cuh, spread.cuh). The sums are tiny and made in double.
#pragma once

#include "common/node_parameters.cuh"

namespace segkernels::cuda {

// p = w̃ / s², r = −½ (1/s² − min_k 1/s²), b = −½ Σ_c w̃² / s²
template <class A>
__global__ void __launch_bounds__(COEFFICIENT_THREADS, 1)
    soft_assign_coefficients_kernel(const A* __restrict__ w, const A* __restrict__ s, int nodes, int channels,
                                    Coefficients<A> out) {
  const int c = blockIdx.x * WARP + threadIdx.x % WARP;
  const auto precision = [&](int k) {
    const double scale = s[int64_t(k) * channels + c];
    return 1 / (scale * scale);
  };
  double least = INFINITY;
  if (c < channels)
    for (int k = 0; k < nodes; ++k) least = min(least, precision(k));
  write_coefficients(w, nodes, channels, out, [&](int k, int, double w) {
    const double g = precision(k);
    return Coefficient<double>{w * g, -0.5 * (g - least), -0.5 * w * w * g};
  });
}

// What a call was asked for.
struct Standardisation {
  bool average, normalise;
  double eps;
  __device__ double divisor(double mass) const { return average ? mass + eps : 1; }
};
constexpr double SHORTEST = 1e-12;  // a node's length is taken for no less

// One block per (image, node): the residual sums e = Σ q x̃ − m w̃ and the nodes z made of them.
template <class T>
__global__ void __launch_bounds__(BLOCK, 1)
    soft_assign_nodes_kernel(const acc_t<T>* __restrict__ sums, const acc_t<T>* __restrict__ masses,
                             int splits, const acc_t<T>* __restrict__ w, const acc_t<T>* __restrict__ s,
                             const acc_t<T>* __restrict__ centre, int nodes, int channels,
                             Standardisation standard, T* __restrict__ z, acc_t<T>* __restrict__ e,
                             acc_t<T>* __restrict__ m) {
  __shared__ BlockSum sum_of;
  using A = acc_t<T>;
  const int64_t row = blockIdx.x, image = row / nodes, size = int64_t(nodes) * channels;
  const int k = row % nodes;
  const A mass = sum_of_parts(masses + image * splits * nodes + k, splits, nodes);
  if (threadIdx.x == 0) m[row] = mass;
  double square = 0;
  const auto standardised = [&](A residual, int c) {
    return residual / double(s[int64_t(k) * channels + c]) / standard.divisor(mass);
  };
  for (int c = threadIdx.x; c < channels; c += BLOCK) {
    const int64_t node = int64_t(k) * channels + c;
    const A sum = sum_of_parts(sums + image * splits * size + node, splits, size);
    const A residual = A(sum - double(mass) * (double(w[node]) - centre[c]));
    e[row * channels + c] = residual;
    const double u = standardised(residual, c);
    square += u * u;
  }
  const double length = sqrt(sum_of(square));
  const double divisor = standard.normalise ? (length < SHORTEST ? SHORTEST : length) : 1;
  for (int c = threadIdx.x; c < channels; c += BLOCK)
    z[row * channels + c] = narrow<T>(A(standardised(e[row * channels + c], c) / divisor));
}

// One block per (image, node): h and t with g = ⟨h, x̃⟩ + t + dq, from dz; dz null: zeros.
template <class T>
__global__ void __launch_bounds__(BLOCK, 1)
    soft_assign_cotangents_kernel(const T* __restrict__ dz, const acc_t<T>* __restrict__ w,
                                  const acc_t<T>* __restrict__ s, const acc_t<T>* __restrict__ centre,
                                  const acc_t<T>* __restrict__ e, const acc_t<T>* __restrict__ m, int nodes,
                                  int channels, Standardisation standard, acc_t<T>* __restrict__ h,
                                  acc_t<T>* __restrict__ t) {
  __shared__ BlockSum sum_of;
  using A = acc_t<T>;
  const int64_t row = blockIdx.x;
  const int64_t node = row % nodes * channels;
  const double divisor = standard.divisor(m[row]);
  const auto cotangent = [&](int c) { return dz ? double(widen(dz[row * channels + c])) : 0; };
  const auto standardised = [&](int c) { return e[row * channels + c] / double(s[node + c]) / divisor; };
  double square = 0, along = 0;  // ‖z'‖² and ⟨z', dz⟩
  for (int c = threadIdx.x; c < channels; c += BLOCK) {
    square += standardised(c) * standardised(c);
    along += standardised(c) * cotangent(c);
  }
  const double length = sqrt(sum_of(square));
  along = sum_of(along);
  const double clamped = length < SHORTEST ? SHORTEST : length;
  // dz' = (dz − z ⟨z, dz⟩) / ‖z'‖; a clamped length is a constant
  const double share = length < SHORTEST ? 0 : along / (clamped * clamped);
  double shift = 0;  // t
  for (int c = threadIdx.x; c < channels; c += BLOCK) {
    double u = cotangent(c);
    if (standard.normalise) u = (u - standardised(c) * share) / clamped;
    const A hc = dz ? A(u / s[node + c] / divisor) : A(0);
    h[row * channels + c] = hc;
    if (standard.average) shift -= u * standardised(c) / divisor;
    shift -= hc * (double(w[node + c]) - centre[c]);
  }
  shift = sum_of(shift);
  if (threadIdx.x == 0) t[row] = dz ? A(shift) : A(0);
}

// One thread per (node, channel): dw = Σ −m h + (a₁ − w̃ a₀)/s², ds = Σ −h e/s + (a₂ − 2 w̃ a₁ + w̃² a₀)/s³;
// either may be absent. sums [splits][2][K][C] of dl x̃ and dl x̃², masses [splits][K] of dl.
template <class A>
__global__ void __launch_bounds__(BLOCK, 1)
    soft_assign_finish_kernel(const A* __restrict__ sums, const A* __restrict__ masses, int splits,
                              const A* __restrict__ w, const A* __restrict__ s, const A* __restrict__ centre,
                              const A* __restrict__ h, const A* __restrict__ e, const A* __restrict__ m,
                              int64_t images, int nodes, int channels, A* __restrict__ dw,
                              A* __restrict__ ds) {
  const int64_t size = int64_t(nodes) * channels, node = int64_t(blockIdx.x) * BLOCK + threadIdx.x;
  if (node >= size) return;
  const int k = node / channels;
  const double a0 = sum_of_parts(masses + k, splits, nodes);
  const double a1 = sum_of_parts(sums + node, splits, 2 * size);
  const double a2 = sum_of_parts(sums + size + node, splits, 2 * size);
  const double v = double(w[node]) - centre[node % channels], scale = s[node];
  double from_w = (a1 - v * a0) / (scale * scale);
  double from_s = (a2 - 2 * v * a1 + v * v * a0) / (scale * scale * scale);
  for (int64_t b = 0; b < images; ++b) {
    const double cotangent = h[b * size + node];
    from_w -= m[b * nodes + k] * cotangent;
    from_s -= cotangent * e[b * size + node] / scale;
  }
  if (dw) dw[node] = A(from_w);
  if (ds) ds[node] = A(from_s);
}

}  // namespace segkernels::cuda
