// Nodes spread over the pixels, [pixels, K] · [K, C]: a re-projection, or the gradient of an assignment's
// features.
#pragma once

#include "common/node_product.cuh"

namespace segkernels::cuda {

enum class Spread {
  reprojection,    // y = r + Σ_k q z_k
  reconstruction,  // y = Σ_k q z_k, the nodes in the accumulation type
  gradient         // dx = Σ_k q h_k + dl (p_k + 2 r_k x̃)
};

// z (or h) [B, K, C]; p, r [K, C] and centre [C] of the gradient.
template <class T, Spread SPREAD>
struct SpreadNodes {
  using Z = std::conditional_t<SPREAD == Spread::reprojection, T, acc_t<T>>;
  const Z* z;
  const acc_t<T>*p, *r, *centre;
  bool vectors;  // z, p and r can be read by 16 bytes
};
template <class T>
struct SpreadMaps {
  PixelMap<const acc_t<T>> q, dl;
  PixelMap<const T> in;  // the residual, which may be absent, or x
  PixelMap<T> out;
};

template <class T, Spread SPREAD, int WARPS = 4>
struct SpreadStage {
  using A = acc_t<T>;
  static constexpr bool GRADIENT = SPREAD == Spread::gradient;
  static constexpr int NJ = sizeof(T) == 8 ? 4 : 8;  // what the registers hold
  static constexpr int THREADS = WARPS * WARP, PIXELS = WARPS * 16, CHANNELS = 8 * NJ;
  struct Operands {
    OperandRow<T> q[PIXELS], dl[GRADIENT ? PIXELS : 1];
    OperandRow<T> z[CHANNELS], p[GRADIENT ? CHANNELS : 1], r[GRADIENT ? CHANNELS : 1];
  };
  union {
    Operands operands;
    A result[PIXELS][CHANNELS + 1];
  };
  int64_t offset_q[PIXELS], offset_dl[PIXELS], offset_in[PIXELS], offset_out[PIXELS];
};

// By a block: up to 16·WARPS of an image's pixels from `first` to before `end` × 8·NJ channels from c0 on. It
// walks over the nodes.
template <class T, Spread SPREAD, int WARPS>
__device__ inline void spread_tile(SpreadStage<T, SPREAD, WARPS>& stage, const SpreadNodes<T, SPREAD>& nodes,
                                   const SpreadMaps<T>& maps, const NodeShape& shape, int64_t image,
                                   int first, int end, int c0) {
  using A = acc_t<T>;
  using Stage = SpreadStage<T, SPREAD, WARPS>;
  constexpr int PIXELS = Stage::PIXELS, CHANNELS = Stage::CHANNELS, THREADS = Stage::THREADS;
  constexpr bool GRADIENT = Stage::GRADIENT;
  const int count = min(PIXELS, end - first), C = shape.channels, K = shape.nodes;

  for (int m = threadIdx.x; m < count; m += THREADS) {
    stage.offset_q[m] = maps.q.offset(image, first + m, shape.columns);
    if (GRADIENT) stage.offset_dl[m] = maps.dl.offset(image, first + m, shape.columns);
    if (maps.in.at) stage.offset_in[m] = maps.in.offset(image, first + m, shape.columns);
    stage.offset_out[m] = maps.out.offset(image, first + m, shape.columns);
  }
  __syncthreads();

  using Z = typename SpreadNodes<T, SPREAD>::Z;
  Operand<T, A, false, PIXELS, THREADS> q, dl;
  Operand<T, Z, true, CHANNELS, THREADS> z;
  Operand<T, A, true, CHANNELS, THREADS> p, r;
  const Source<A> from_q = source_of(maps.q, K), from_dl = source_of(maps.dl, K);
  const Source<Z> from_z = {nodes.z + image * K * C, 1, C, nodes.vectors};
  const Source<A> from_p = {nodes.p, 1, C, nodes.vectors}, from_r = {nodes.r, 1, C, nodes.vectors};
  const auto fetch = [&](int k0) {
    const auto in_q = [&](int m) { return m < count ? stage.offset_q[m] : -1; };
    const auto in_dl = [&](int m) { return m < count ? stage.offset_dl[m] : -1; };
    const auto node = [&](int k) { return k0 + k < K ? int64_t(k0 + k) * C : -1; };
    const auto as_it_is = [](A a, int) { return a; };
    q.fetch(from_q, in_q, k0, as_it_is);
    z.fetch(from_z, node, c0, as_it_is);
    if constexpr (GRADIENT) {
      dl.fetch(from_dl, in_dl, k0, as_it_is);
      p.fetch(from_p, node, c0, as_it_is);
      r.fetch(from_r, node, c0, as_it_is);
    }
  };
  const int m_warp = threadIdx.x / WARP * 16;
  NodeProduct<T, Stage::NJ> sum, slope;
  auto& tile = stage.operands;
  for (int k0 = -DEPTH<A>; k0 < K; k0 += DEPTH<A>) {
    if (k0 >= 0) {
      __syncthreads();  // the stage before has been used
      q.put(from_q, tile.q);
      z.put(from_z, tile.z);
      if constexpr (GRADIENT) dl.put(from_dl, tile.dl), p.put(from_p, tile.p), r.put(from_r, tile.r);
      __syncthreads();
    }
    if (k0 + DEPTH<A> < K) fetch(k0 + DEPTH<A>);
    if (k0 < 0) continue;
    sum.multiply(tile.q + m_warp, tile.z);
    if constexpr (GRADIENT) {
      sum.multiply(tile.dl + m_warp, tile.p);
      slope.multiply(tile.dl + m_warp, tile.r);
    }
  }
  // The result meets the map that comes in, in shared memory: both maps are then moved in their own order.
  const auto over_tile = [&](const auto& map, const int64_t* offset, auto f) {
    __syncthreads();
    for_each<PIXELS, THREADS>(!map.channels_are_dense(), count, min(CHANNELS, C - c0), [&](int m, int n) {
      f(stage.result[m][n], offset[m] + (c0 + n) * map.strides.c, c0 + n);
    });
  };
  if (maps.in.at)
    over_tile(maps.in, stage.offset_in, [&](A& u, int64_t at, int c) {
      u = widen(maps.in.at[at]);
      if (GRADIENT) u -= nodes.centre[c];
    });
  __syncthreads();
#pragma unroll
  for (int j = 0; j < Stage::NJ; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int m = m_warp + sum.row(e), n = sum.column(j, e);
      if (m >= count || c0 + n >= C) continue;
      A& u = stage.result[m][n];
      if constexpr (GRADIENT)
        u = sum.acc[j][e] + 2 * slope.acc[j][e] * u;
      else
        u = maps.in.at ? sum.acc[j][e] + u : sum.acc[j][e];
    }
  over_tile(maps.out, stage.offset_out, [&](A& u, int64_t at, int) { maps.out.at[at] = narrow<T>(u); });
}

// One block per tile; the tiles of an image are pixels' first.
template <class T, Spread SPREAD>
__global__ void __launch_bounds__(SpreadStage<T, SPREAD>::THREADS, 1)
    node_spread_kernel(SpreadNodes<T, SPREAD> nodes, SpreadMaps<T> maps, NodeShape shape, int pixel_tiles,
                       int channel_tiles) {
  using Stage = SpreadStage<T, SPREAD>;
  extern __shared__ __align__(16) double shared[];
  const int c0 = blockIdx.x % channel_tiles * Stage::CHANNELS;
  const int first = blockIdx.x / channel_tiles % pixel_tiles * Stage::PIXELS;
  const int64_t image = blockIdx.x / channel_tiles / pixel_tiles;
  spread_tile(*reinterpret_cast<Stage*>(shared), nodes, maps, shape, image, first, shape.pixels, c0);
}

}  // namespace segkernels::cuda
