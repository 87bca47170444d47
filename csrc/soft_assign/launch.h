// The products of pixels and nodes as other operators' host code calls them (CUDA).
#pragma once

#include "common/cuda.h"
#include "common/node_parameters.cuh"

namespace segkernels::cuda {

using MaybeTensor = std::optional<Tensor>;
using Ints = std::vector<int64_t>;

// In all of these the rows of nodes, [.., C], are dense, and an absent addend is zero, an absent factor one.

// Coefficients of scores, about `centre` [C]; see node_parameters.cuh.
struct __attribute__((visibility("hidden"))) ScoreCoefficients {
  Tensor centre, p, r, b;

  ScoreCoefficients(const Tensor& like, int64_t nodes, int64_t channels)
      : centre(empty(like, {channels})),
        p(empty(like, {nodes, channels})),
        r(empty(like, {nodes, channels})),
        b(empty(like, {parts(channels), nodes})) {}
  static int64_t parts(int64_t channels) { return ceil_div(channels, WARP); }
  template <class A>
  Coefficients<A> on_device() const {
    return {mutable_data<A>(centre), mutable_data<A>(p), mutable_data<A>(r), mutable_data<A>(b)};
  }
};

// An uninitialised map [B, channels, H, W] beside `map`, in its memory format.
Tensor map_like(const Tensor& map, int64_t channels, ScalarType type);

// q [B, K, H, W], in x's memory format.
Tensor assign(const Queue& queue, const Tensor& x, const ScoreCoefficients& nodes);
// z = softmax_k λ(⟨p_k, x⟩ + b_k) into z; p [B, K, C], b [B, K], λ one number.
void responsibilities(const Queue& queue, const Tensor& x, const Tensor& p, const MaybeTensor& b,
                      const MaybeTensor& lam, const Tensor& z);
// dl = q (g − Σ_k q g) into dl, g = ⟨h_k, x̃⟩ + t_k + dq; h [B, K, C], t [B, K].
void assignment_gradient(const Queue& queue, const Tensor& x, const MaybeTensor& centre, const Tensor& h,
                         const MaybeTensor& t, const Tensor& q, const MaybeTensor& dq, const Tensor& dl);
// ⟨z_k, dy⟩ + dq, [B, K, H, W]; z [B, K, D], in the accumulation type.
Tensor assignment_cotangent(const Queue& queue, const Tensor& dy, const Tensor& z, const MaybeTensor& dq);
// dq = ⟨z_k, dy⟩ like q; z [B, K, D].
Tensor node_products(const Queue& queue, const Tensor& dy, const Tensor& z, const Tensor& q);

// Partial sums over pixels: sums [groups, splits, 1 or 2, K, C] of a x̃ (and a x̃²), masses [groups, splits, K]
// of a. A group is an image, or all of them.
struct __attribute__((visibility("hidden"))) Gathered {
  Tensor sums, masses;
  int splits() const { return int(masses.size(1)); }
};
Gathered gather_images(const Queue& queue, const Tensor& a, const Tensor& x, const MaybeTensor& centre);
Gathered gather_squares(const Queue& queue, const Tensor& a, const Tensor& x, const Tensor& centre);
// The sums of images into `out` [B, K, C].
void add_parts(const Queue& queue, const Gathered& gathered, const Tensor& out);

// y = r + Σ_k q z_k into y.
void reprojection(const Queue& queue, const Tensor& z, const Tensor& q, const MaybeTensor& r,
                  const Tensor& y);
// y = Σ_k q z_k into y; z [B, K, D], in the accumulation type.
void reconstruction(const Queue& queue, const Tensor& z, const Tensor& q, const Tensor& y);
// dx = Σ_k q h_k + dl (p_k + 2 r_k x̃), like x.
Tensor features_gradient(const Queue& queue, const Tensor& x, const ScoreCoefficients& nodes, const Tensor& h,
                         const Tensor& q, const Tensor& dl);

}  // namespace segkernels::cuda
