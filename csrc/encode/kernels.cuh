// Residual encoding: what comes before and after the passes over the pixels, which are soft_assign's with r
// the same for all channels. The sums are tiny and made in double.
#pragma once

#include "common/node_parameters.cuh"

namespace segkernels::cuda {

// p = −2 s c̃, r = s − s₀, b = s ‖c̃‖²; s₀: the scale nearest to zero where all have one sign, else zero
template <class A>
__global__ void __launch_bounds__(COEFFICIENT_THREADS, 1)
    encode_coefficients_kernel(const A* __restrict__ c, const A* __restrict__ s, int nodes, int channels,
                               Coefficients<A> out) {
  double least = s[0], most = s[0];
  for (int k = 1; k < nodes; ++k) least = min(least, double(s[k])), most = max(most, double(s[k]));
  const double shared = max(least, 0.0) + min(most, 0.0);
  write_coefficients(c, nodes, channels, out, [&](int k, int, double c) {
    return Coefficient<double>{-2 * s[k] * c, s[k] - shared, s[k] * c * c};
  });
}

// One block per (image, codeword): e = Σ q x̃ − m c̃ and m.
template <class T>
__global__ void __launch_bounds__(BLOCK, 1)
    encode_residuals_kernel(const acc_t<T>* __restrict__ sums, const acc_t<T>* __restrict__ masses,
                            int splits, const acc_t<T>* __restrict__ c, const acc_t<T>* __restrict__ centre,
                            int nodes, int channels, T* __restrict__ e, acc_t<T>* __restrict__ m) {
  const int64_t row = blockIdx.x, image = row / nodes, size = int64_t(nodes) * channels;
  const int k = row % nodes;
  const acc_t<T> mass = sum_of_parts(masses + image * splits * nodes + k, splits, nodes);
  if (threadIdx.x == 0) m[row] = mass;
  for (int i = threadIdx.x; i < channels; i += BLOCK) {
    const int64_t node = int64_t(k) * channels + i;
    const acc_t<T> sum = sum_of_parts(sums + image * splits * size + node, splits, size);
    e[row * channels + i] = narrow<T>(acc_t<T>(sum - double(mass) * (double(c[node]) - centre[i])));
  }
}

// One block per (image, codeword): h = de and t = −⟨de, c̃⟩.
template <class T>
__global__ void __launch_bounds__(BLOCK, 1)
    encode_cotangents_kernel(const T* __restrict__ de, const acc_t<T>* __restrict__ c,
                             const acc_t<T>* __restrict__ centre, int nodes, int channels,
                             acc_t<T>* __restrict__ h, acc_t<T>* __restrict__ t) {
  __shared__ BlockSum sum_of;
  const int64_t row = blockIdx.x, node = row % nodes * channels;
  double shift = 0;
  for (int i = threadIdx.x; i < channels; i += BLOCK) {
    const acc_t<T> cotangent = widen(de[row * channels + i]);
    h[row * channels + i] = cotangent;
    shift -= cotangent * (double(c[node + i]) - centre[i]);
  }
  shift = sum_of(shift);
  if (threadIdx.x == 0) t[row] = acc_t<T>(shift);
}

// One block per codeword: dc = Σ −m de − 2 s (a₁ − c̃ a₀), ds = Σ_c a₂ − 2 c̃ a₁ + c̃² a₀; either may be
// absent. sums and masses as in soft_assign's.
template <class A>
__global__ void __launch_bounds__(BLOCK, 1)
    encode_finish_kernel(const A* __restrict__ sums, const A* __restrict__ masses, int splits,
                         const A* __restrict__ c, const A* __restrict__ s, const A* __restrict__ centre,
                         const A* __restrict__ h, const A* __restrict__ m, int64_t images, int nodes,
                         int channels, A* __restrict__ dc, A* __restrict__ ds) {
  __shared__ BlockSum sum_of;
  const int64_t size = int64_t(nodes) * channels;
  const int k = blockIdx.x;
  const double a0 = sum_of_parts(masses + k, splits, nodes);
  double from_s = 0;
  for (int i = threadIdx.x; i < channels; i += BLOCK) {
    const int64_t node = int64_t(k) * channels + i;
    const double a1 = sum_of_parts(sums + node, splits, 2 * size);
    const double a2 = sum_of_parts(sums + size + node, splits, 2 * size);
    const double v = double(c[node]) - centre[i];
    from_s += a2 - 2 * v * a1 + v * v * a0;
    double from_c = -2 * s[k] * (a1 - v * a0);
    for (int64_t b = 0; b < images; ++b) from_c -= double(m[b * nodes + k]) * h[b * size + node];
    if (dc) dc[node] = A(from_c);
  }
  from_s = sum_of(from_s);
  if (ds && threadIdx.x == 0) ds[k] = A(from_s);
}

}  // namespace segkernels::cuda
