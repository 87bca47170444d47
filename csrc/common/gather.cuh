// Maps gathered to nodes: Σ_i a_ik x̃_i, [K, pixels] · [pixels, C], and the masses Σ_i a_ik.
#pragma once

#include "common/node_product.cuh"

namespace segkernels::cuda {

// Every group of `group` pixels, counted through all images, has sums of its own, made in `splits` parts of
// `split` pixels.
struct GatherShape {
  NodeShape of;
  int64_t group, split;
  int splits, channel_tiles, node_tiles;
};

// A block owns 64 channels × 8·NJ nodes and walks over the pixels of its part.
template <class T, int NJ>
struct GatherStage {
  using A = acc_t<T>;
  static constexpr int RESIDENT = sizeof(T) == 2 ? 3 : 2;  // blocks of a multiprocessor
  static constexpr int WARPS = 4, THREADS = WARPS * WARP, CHANNELS = WARPS * 16, NODES = 8 * NJ;
  OperandRow<T> x[CHANNELS], square[CHANNELS], a[NODES];
  int64_t offset_x[2][DEPTH<A>], offset_a[2][DEPTH<A>];  // of the pixels of two stages; −1 beyond the last
};

// sums[group][split][SQUARES: 2, else 1][K][C]: of a x̃ and of a x̃²; masses[group][split][K]. centre null: 0.
template <class T, int NJ, bool SQUARES>
__global__ void __launch_bounds__(GatherStage<T, NJ>::THREADS, GatherStage<T, NJ>::RESIDENT)
    node_gather_kernel(PixelMap<const acc_t<T>> a, PixelMap<const T> x, const acc_t<T>* __restrict__ centre,
                       acc_t<T>* __restrict__ sums, acc_t<T>* __restrict__ masses, GatherShape shape) {
  using A = acc_t<T>;
  using Stage = GatherStage<T, NJ>;
  constexpr int THREADS = Stage::THREADS;
  extern __shared__ __align__(16) double shared[];
  Stage& stage = *reinterpret_cast<Stage*>(shared);
  const int C = shape.of.channels, K = shape.of.nodes;
  const int channel_tile = blockIdx.x % shape.channel_tiles, c0 = channel_tile * Stage::CHANNELS;
  const int n0 = blockIdx.x / shape.channel_tiles % shape.node_tiles * Stage::NODES;
  const int64_t part = blockIdx.x / shape.channel_tiles / shape.node_tiles;
  const int64_t begin = part / shape.splits * shape.group, from = begin + part % shape.splits * shape.split;
  const int64_t end = min(begin + shape.group, from + shape.split);

  const auto locate = [&](int s) {
    for (int k = threadIdx.x; k < DEPTH<A>; k += THREADS) {
      const int64_t i = from + int64_t(s) * DEPTH<A> + k, image = i / shape.of.pixels;
      const int pixel = int(i % shape.of.pixels);
      stage.offset_x[s & 1][k] = i < end ? x.offset(image, pixel, shape.of.columns) : -1;
      stage.offset_a[s & 1][k] = i < end ? a.offset(image, pixel, shape.of.columns) : -1;
    }
  };
  Operand<T, T, true, Stage::CHANNELS, THREADS> xs;
  Operand<T, A, true, Stage::NODES, THREADS> as;
  const Source<T> from_x = source_of(x, C);
  const Source<A> from_a = source_of(a, K);
  const auto fetch = [&](int s) {
    const int64_t *at_x = stage.offset_x[s & 1], *at_a = stage.offset_a[s & 1];
    xs.fetch(
        from_x, [&](int k) { return at_x[k]; }, c0, [&](A a, int c) { return centre ? a - centre[c] : a; });
    as.fetch(from_a, [&](int k) { return at_a[k]; }, n0, [](A a, int) { return a; });
  };
  const int m_warp = threadIdx.x / WARP * 16, stages = int((end - from + DEPTH<A> - 1) / DEPTH<A>);
  NodeProduct<T, NJ> product, squares;
  A mass = 0;
  locate(0);
  for (int s = -1; s < stages; ++s) {
    __syncthreads();  // the stage before has been used
    if (s >= 0) {
      xs.put(from_x, stage.x);
      as.put(from_a, stage.a);
      if constexpr (SQUARES) xs.put(from_x, stage.square, [](A a) { return a * a; });
      __syncthreads();
    }
    if (s + 1 < stages) fetch(s + 1);
    locate(s + 2);
    if (s < 0) continue;
    product.multiply(stage.x + m_warp, stage.a);
    if constexpr (SQUARES) squares.multiply(stage.square + m_warp, stage.a);
    if (channel_tile == 0 && threadIdx.x < Stage::NODES)
#pragma unroll 1
      for (int k = 0; k < DEPTH<A>; ++k) mass += stage.a[threadIdx.x].get(k);
  }
  if (channel_tile == 0 && threadIdx.x < Stage::NODES && n0 + int(threadIdx.x) < K)
    masses[part * K + n0 + threadIdx.x] = mass;
  constexpr int KINDS = SQUARES ? 2 : 1;
#pragma unroll
  for (int j = 0; j < NJ; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int c = c0 + m_warp + product.row(e), n = n0 + product.column(j, e);
      if (c >= C || n >= K) continue;
      A* at = sums + (part * KINDS * K + n) * C + c;
      at[0] = product.acc[j][e];
      if constexpr (SQUARES) at[int64_t(K) * C] = squares.acc[j][e];
    }
}

}  // namespace segkernels::cuda
