// Scores of pixels against nodes, [pixels, C] · [C, K], and what is made of a pixel's row of them.
//
// A block owns a tile of pixels and all K nodes, and walks over the channels in stages.
#pragma once

#include "common/node_product.cuh"

namespace segkernels::cuda {

enum class Score {
  assignment,  // q = softmax_k (⟨p_k, x̃⟩ + ⟨r_k, x̃²⟩ + b_k)
  softmax,     // q = softmax_k λ(⟨p_k, x⟩ + b_k)
  gradient,    // dl = q (g − Σ_k q g), g = ⟨p_k, x̃⟩ + b_k + dq
  cotangent,   // ⟨p_k, x⟩ + dq
  product      // ⟨p_k, x⟩, the nodes in the type of the map
};

// The nodes' side: p [K, C] and b [K], each image's own where the strides are not 0; r [K, C]. b comes as
// `parts` rows to be added; 0: there is none.
template <class T, Score SCORE>
struct ScoreNodes {
  using P = std::conditional_t<SCORE == Score::product, T, acc_t<T>>;
  const P* p;
  const acc_t<T>*r, *b, *centre, *lam;  // x̃ = x − centre, which may be absent, as λ may (1)
  int64_t p_stride, b_stride;
  int parts;
  bool vectors;  // p and r can be read by 16 bytes
};
template <class A>
struct ScoreMaps {
  PixelMap<A> out;
  PixelMap<const A> q, dq;  // of the gradient (and cotangent); dq may be absent
};

// NODE_WARPS warps of 8·NJ nodes each; of pixels there are 16 to a warp.
template <class T, Score SCORE, int NJ, int NODE_WARPS>
struct ScoreStage {
  using A = acc_t<T>;
  static constexpr bool SQUARES = SCORE == Score::assignment, AS_IT_IS = SCORE == Score::softmax;  // x
  static constexpr int WARPS = NODE_WARPS > 4 ? NODE_WARPS : 4, THREADS = WARPS * WARP;
  static constexpr int PIXELS = WARPS / NODE_WARPS * 16, NODES = NODE_WARPS * 8 * NJ;
  static constexpr int RESIDENT = THREADS > 128 ? 1 : 3;  // blocks of a multiprocessor
  struct Operands {
    OperandRow<T, AS_IT_IS ? HALVES_OF_MAP<T> : HALVES<T>> x[PIXELS];
    OperandRow<T, AS_IT_IS ? HALVES_BESIDE_MAP<T> : HALVES<T>> p[NODES];
    OperandRow<T> square[SQUARES ? PIXELS : 1], r[SQUARES ? NODES : 1];
  };
  struct Rows {
    A score[PIXELS][NODES + 1], q[SCORE == Score::gradient ? PIXELS : 1][NODES + 1];
  };
  union {
    Operands operands;
    Rows rows;
  };
  A bias[NODES];
  int64_t offset[PIXELS];
};

template <class A, class F>
__device__ inline A reduce_row(A value, F f) {
  for (int step = 1; step < WARP; step *= 2) value = f(value, __shfl_xor_sync(ALL_LANES, value, step));
  return value;
}

// One row of scores, by one warp. A NaN among them makes the sum NaN, whatever the maximum is.
template <class A>
__device__ inline void softmax_row(A* row, const A* bias, A lam, int nodes) {
  const int lane = threadIdx.x % WARP;
  A most = -INFINITY, sum = 0;
  for (int k = lane; k < nodes; k += WARP) {
    row[k] = lam * (row[k] + bias[k]);
    most = row[k] > most ? row[k] : most;
  }
  most = reduce_row(most, [](A a, A b) { return b > a ? b : a; });
  for (int k = lane; k < nodes; k += WARP) sum += row[k] = exp(row[k] - most);
  sum = reduce_row(sum, [](A a, A b) { return a + b; });
  for (int k = lane; k < nodes; k += WARP) row[k] /= sum;
}
template <class A>
__device__ inline void gradient_row(A* row, const A* q, const A* bias, int nodes) {
  const int lane = threadIdx.x % WARP;
  A mean = 0;
  for (int k = lane; k < nodes; k += WARP) {
    row[k] += bias[k];
    mean += q[k] * row[k];
  }
  mean = reduce_row(mean, [](A a, A b) { return a + b; });
  for (int k = lane; k < nodes; k += WARP) row[k] = q[k] * (row[k] - mean);
}

// shape.tiles blocks an image
template <class T, Score SCORE, int NJ, int NODE_WARPS>
__global__ void __launch_bounds__(ScoreStage<T, SCORE, NJ, NODE_WARPS>::THREADS,
                                  ScoreStage<T, SCORE, NJ, NODE_WARPS>::RESIDENT)
    node_scores_kernel(PixelMap<const T> x, ScoreNodes<T, SCORE> nodes, ScoreMaps<acc_t<T>> maps,
                       NodeShape shape, int tiles) {
  using A = acc_t<T>;
  using Stage = ScoreStage<T, SCORE, NJ, NODE_WARPS>;
  constexpr int PIXELS = Stage::PIXELS, NODES = Stage::NODES, THREADS = Stage::THREADS;
  constexpr bool SQUARES = Stage::SQUARES;
  constexpr bool BIASED = SCORE != Score::cotangent && SCORE != Score::product;
  extern __shared__ __align__(16) double shared[];
  Stage& stage = *reinterpret_cast<Stage*>(shared);
  const int64_t image = blockIdx.x / tiles;
  const int first = blockIdx.x % tiles * PIXELS, count = min(PIXELS, shape.pixels - first);
  const int C = shape.channels, K = shape.nodes;

  for (int m = threadIdx.x; m < count; m += THREADS)
    stage.offset[m] = x.offset(image, first + m, shape.columns);
  if constexpr (BIASED)
    for (int k = threadIdx.x; k < K; k += THREADS) {
      A b = 0;
      for (int part = 0; part < nodes.parts; ++part) b += nodes.b[image * nodes.b_stride + part * K + k];
      stage.bias[k] = b;
    }
  const A lam = nodes.lam ? *nodes.lam : A(1);
  __syncthreads();

  using P = typename ScoreNodes<T, SCORE>::P;
  Operand<T, T, false, PIXELS, THREADS> pixels;
  Operand<T, P, false, NODES, THREADS> p;
  Operand<T, A, false, NODES, THREADS> r;
  const Source<T> from_x = source_of(x, C);
  const Source<P> from_p = {nodes.p + image * nodes.p_stride, 1, C, nodes.vectors};
  const Source<A> from_r = {nodes.r, 1, C, nodes.vectors};
  const auto fetch = [&](int c0) {
    const auto pixel = [&](int m) { return m < count ? stage.offset[m] : -1; };
    const auto node = [&](int n) { return n < K ? int64_t(n) * C : -1; };
    const auto as_it_is = [](A a, int) { return a; };
    pixels.fetch(from_x, pixel, c0, [&](A a, int c) { return nodes.centre ? a - nodes.centre[c] : a; });
    p.fetch(from_p, node, c0, as_it_is);
    if constexpr (SQUARES) r.fetch(from_r, node, c0, as_it_is);
  };
  const int warp = threadIdx.x / WARP, n_warp = warp % NODE_WARPS * 8 * NJ, m_warp = warp / NODE_WARPS * 16;
  NodeProduct<T, NJ> product;
  auto& tile = stage.operands;
  for (int c0 = -DEPTH<A>; c0 < C; c0 += DEPTH<A>) {
    if (c0 >= 0) {
      __syncthreads();  // the stage before has been used
      pixels.put(from_x, tile.x);
      p.put(from_p, tile.p);
      if constexpr (SQUARES) {
        pixels.put(from_x, tile.square, [](A a) { return a * a; });
        r.put(from_r, tile.r);
      }
      __syncthreads();
    }
    if (c0 + DEPTH<A> < C) fetch(c0 + DEPTH<A>);
    if (c0 < 0 || n_warp >= K) continue;
    product.multiply(tile.x + m_warp, tile.p + n_warp);
    if constexpr (SQUARES) product.multiply(tile.square + m_warp, tile.r + n_warp);
  }
  __syncthreads();  // the stages make room for the scores
  auto& rows = stage.rows;
#pragma unroll
  for (int j = 0; j < NJ; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      rows.score[m_warp + product.row(e)][n_warp + product.column(j, e)] = product.acc[j][e];
  // f(m, k, offset) over the tile's elements in a map
  const auto over_tile = [&](const auto& map, auto f) {
    __syncthreads();
    for (int m = threadIdx.x; m < count; m += THREADS)
      stage.offset[m] = map.offset(image, first + m, shape.columns);
    __syncthreads();
    for_each<PIXELS, THREADS>(!map.channels_are_dense(), count, K,
                              [&](int m, int k) { f(m, k, stage.offset[m] + k * map.strides.c); });
  };
  if constexpr (SCORE == Score::gradient)
    over_tile(maps.q, [&](int m, int k, int64_t at) { rows.q[m][k] = maps.q.at[at]; });
  if constexpr (SCORE == Score::gradient || SCORE == Score::cotangent)
    if (maps.dq.at) over_tile(maps.dq, [&](int m, int k, int64_t at) { rows.score[m][k] += maps.dq.at[at]; });
  __syncthreads();
  for (int m = warp; m < count; m += Stage::WARPS) {
    if constexpr (SCORE == Score::assignment) softmax_row(rows.score[m], stage.bias, A(1), K);
    if constexpr (SCORE == Score::softmax) softmax_row(rows.score[m], stage.bias, lam, K);
    if constexpr (SCORE == Score::gradient) gradient_row(rows.score[m], rows.q[m], stage.bias, K);
  }
  over_tile(maps.out, [&](int m, int k, int64_t at) { maps.out.at[at] = rows.score[m][k]; });
}

}  // namespace segkernels::cuda
