// EM attention: the tiny parts between the passes over the pixels (common/scores.cuh, gather.cuh,
// spread.cuh). Sums over channels are made in double.
#pragma once

#include "common/node_parameters.cuh"
#include "common/node_product.cuh"

namespace segkernels::cuda {

constexpr double EPSILON = 1e-6;  // of the additive norm
constexpr double LEAST = 1e-12;   // of the clamped one

// The divisor d of an M-step. A NaN among r and s passes through.
struct Norm {
  bool clamp;
  __device__ static double mass(double s) { return s < LEAST ? LEAST : s; }
  __device__ static bool is_short(double r, double s) { return r < LEAST * mass(s); }

  __device__ double divisor(double r, double s) const {
    if (!clamp) return r + EPSILON * (EPSILON + s);
    return is_short(r, s) ? LEAST * mass(s) : r;
  }
  __device__ double by_length(double r, double s) const { return clamp && is_short(r, s) ? 0 : 1; }
  __device__ double by_mass(double r, double s) const {
    if (!clamp) return EPSILON;
    return is_short(r, s) && !(s < LEAST) ? LEAST : 0;
  }
};

// Values of the nodes of every image, whose images are `stride` apart; at null: there are none.
template <class A>
struct OfNodes {
  A* at;
  int64_t stride;
  __device__ A* row(int64_t image, int64_t within) const { return at + image * stride + within; }
};

// An M-step: μ = a / d from the parts of a [B, splits, K, D] and of s [B, mass_splits, K]; shift [D], which
// may be absent, comes to a for each unit of mass. s and r may be absent.
template <class A>
struct MStep {
  const A *sums, *masses, *shift;
  int splits, mass_splits;
  Norm norm;
  OfNodes<A> mu, s, r;
};

// By a block: the bases first, first + step, … of an image, whose sums are the `place`th. All threads add up
// the parts, then a warp owns a base.
template <class A>
__device__ inline void make_bases(const MStep<A>& of, int64_t image, int64_t place, int first, int step,
                                  int nodes, int channels) {
  const int64_t size = int64_t(nodes) * channels;
  const A* const masses = of.masses + place * of.mass_splits * nodes;
  const auto mass = [&](int k) { return sum_of_parts(masses + k, of.mass_splits, nodes); };
  const auto row = [&](int k) { return of.mu.row(image, int64_t(k) * channels); };
  for (int k = first; k < nodes; k += step)
    for (int c = threadIdx.x; c < channels; c += blockDim.x) {
      const A a = sum_of_parts(of.sums + (place * of.splits * nodes + k) * channels + c, of.splits, size);
      row(k)[c] = of.shift ? a + mass(k) * of.shift[c] : a;
    }
  __syncthreads();
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  for (int k = first + warp * step; k < nodes; k += warps * step) {
    A* const mu = row(k);
    double square = 0;
    for (int c = lane; c < channels; c += WARP) square += double(mu[c]) * mu[c];
    for (int over = 1; over < WARP; over *= 2) square += __shfl_xor_sync(ALL_LANES, square, over);
    const A s = mass(k);
    const double length = sqrt(square), divisor = of.norm.divisor(length, s);
    for (int c = lane; c < channels; c += WARP) mu[c] = A(mu[c] / divisor);
    if (lane == 0 && of.s.at) *of.s.row(image, k) = s, *of.r.row(image, k) = A(length);
  }
}

// One block per (image, base).
template <class A>
__global__ void __launch_bounds__(BLOCK, 1) em_attention_bases_kernel(MStep<A> of, int nodes, int channels) {
  const int64_t image = blockIdx.x / nodes;
  make_bases(of, image, image, blockIdx.x % nodes, nodes, nodes, channels);
}

// What the backward does between two passes over the pixels. `sums`, in `splits` parts, are of z dyᵀ in front
// of the first, then u; they are the gradient of the bases μ but for the factor λ and an addend.
template <class A>
struct BasesGradient {
  const A* sums;
  int splits;
  const A *lam, *addend;  // null: one, none
  OfNodes<const A> mu;
  A* dmu;
  double* heat;           // ⟨μ, sums⟩ [B, K], where it is wanted
  OfNodes<A> slope;       // λ μ, where it is wanted
  OfNodes<const A> s, r;  // of the M-step that made μ; at null: there is none
  OfNodes<A> da;          // the gradients of that one's a [K, C] and s [B, K]
  A* ds;
};

// One block per (image, base). da = dμ / d − ⟨μ, dμ⟩ ∂d/∂r μ / r and ds = −⟨μ, dμ⟩ / d ∂d/∂s.
template <class A>
__global__ void __launch_bounds__(BLOCK, 1)
    em_attention_bases_gradient_kernel(BasesGradient<A> g, int nodes, int channels, Norm norm) {
  __shared__ BlockSum sum_of;
  const int64_t image = blockIdx.x / nodes, size = int64_t(nodes) * channels;
  const int k = blockIdx.x % nodes;
  const int64_t first = int64_t(k) * channels;
  const A* const mu = g.mu.row(image, first);
  A* const dmu = g.dmu + image * size + first;
  const A lam = g.lam ? *g.lam : A(1);
  double heat = 0, along = 0;  // ⟨μ, sums⟩ and ⟨μ, dμ⟩
  for (int c = threadIdx.x; c < channels; c += BLOCK) {
    const A sum = g.sums ? sum_of_parts(g.sums + image * g.splits * size + first + c, g.splits, size) : A(0);
    const A whole = lam * sum + (g.addend ? g.addend[image * size + first + c] : A(0));
    dmu[c] = whole;
    heat += double(mu[c]) * sum;
    along += double(mu[c]) * whole;
    if (g.slope.at) g.slope.row(image, first)[c] = lam * mu[c];
  }
  if (g.heat) {
    heat = sum_of(heat);
    if (threadIdx.x == 0) g.heat[blockIdx.x] = heat;
  }
  if (!g.s.at) return;
  along = sum_of(along);
  const double s = *g.s.row(image, k), r = *g.r.row(image, k), d = norm.divisor(r, s);
  const double share = r == 0 ? 0 : along * norm.by_length(r, s) / r;
  for (int c = threadIdx.x; c < channels; c += BLOCK)
    g.da.row(image, first)[c] = A(dmu[c] / d - share * mu[c]);
  if (threadIdx.x == 0) g.ds[blockIdx.x] = A(-along / d * norm.by_mass(r, s));
}

// dλ from its `count` shares. One block.
template <class A>
__global__ void __launch_bounds__(BLOCK, 1)
    em_attention_heat_kernel(const double* __restrict__ heat, int64_t count, A* __restrict__ dlam) {
  __shared__ BlockSum sum_of;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += BLOCK) sum += heat[i];
  sum = sum_of(sum);
  if (threadIdx.x == 0) *dlam = A(sum);
}

// A matrix [M, N] of any strides, and a dense vector [M] as a column behind its last, which may be absent.
template <class A>
struct Folded {
  const A *w, *b;
  int64_t down, across;
  int rows, columns;  // M, N
};
constexpr int FOLD_ROWS = 16, FOLD_DEPTH = 32;  // of a block's tile; its columns are the lanes of a warp

// One block per 16 rows × 32 columns of [rows, M] · [M, N], the last column to a place of its own.
template <class A>
__global__ void __launch_bounds__(BLOCK, 1)
    em_attention_fold_kernel(const A* __restrict__ in, Folded<A> by, int64_t rows, int column_tiles,
                             A* __restrict__ out, A* __restrict__ out_b) {
  __shared__ A left[FOLD_ROWS][FOLD_DEPTH + 1], right[FOLD_DEPTH][WARP + 1];
  constexpr int EACH = FOLD_ROWS / (BLOCK / WARP);  // rows of a thread
  const int64_t row0 = int64_t(blockIdx.x / column_tiles) * FOLD_ROWS;
  const int n0 = blockIdx.x % column_tiles * WARP, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  A sum[EACH] = {};
  for (int m0 = 0; m0 < by.rows; m0 += FOLD_DEPTH) {
    for_each<FOLD_ROWS, BLOCK>(false, FOLD_ROWS, FOLD_DEPTH, [&](int i, int m) {
      const bool there = row0 + i < rows && m0 + m < by.rows;
      left[i][m] = there ? in[(row0 + i) * by.rows + m0 + m] : A(0);
    });
    for_each<FOLD_DEPTH, BLOCK>(by.across != 1, FOLD_DEPTH, WARP, [&](int m, int j) {
      const int64_t row = m0 + m, column = n0 + j;
      A value = 0;
      if (row < by.rows && column < by.columns) value = by.w[row * by.down + column * by.across];
      if (row < by.rows && column == by.columns && by.b) value = by.b[row];
      right[m][j] = value;
    });
    __syncthreads();
    for (int m = 0; m < FOLD_DEPTH; ++m)
#pragma unroll
      for (int i = 0; i < EACH; ++i) sum[i] += left[warp * EACH + i][m] * right[m][lane];
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int64_t row = row0 + warp * EACH + i;
    if (row >= rows) continue;
    if (n0 + lane < by.columns) out[row * by.columns + n0 + lane] = sum[i];
    if (n0 + lane == by.columns && by.b) out_b[row] = sum[i];
  }
}

}  // namespace segkernels::cuda
