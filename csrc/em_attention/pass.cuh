// One iteration's pass over the pixels: what each pixel makes of its scores against at most 64 bases, and
// sums of that over the pixels. The rows of a tile of pixels never leave shared memory, unless they are asked
// for.
//
// A block owns a part of an image's pixels and all bases. It walks over the channels once for the scores,
// then once for the sums; the features of its tile are still in a cache by then.
#pragma once

#include "common/node_product.cuh"

namespace segkernels::cuda {

enum class Pass {
  expectation,  // z = softmax_k λ(⟨p_k, x⟩ + b_k); sums of z v and of z
  gradient      // dl = z (dz − Σ_k z dz), dz = ⟨da_k, x⟩ + ds_k + dq; sums of dl v
};

// p, da [B, K, C] and b (or ds) [B, K]; b and λ may be absent (0, 1), as da is from an expectation.
template <class A>
struct PassNodes {
  const A *p, *b, *lam, *da;
  int64_t p_stride, da_stride;  // from image to image
  bool p_vectors, da_vectors;   // they can be read by 16 bytes
};
// z, dl and dq may be absent.
template <class T>
struct PassMaps {
  PixelMap<const T> x, v;
  PixelMap<acc_t<T>> z, dl;
  PixelMap<const acc_t<T>> dq;
  int origin;  // the pixel of an image that x and v begin with
};
// sums [B, splits, K, C], which may be absent, and masses [B, splits, K]; a part has `pixels` pixels, the
// last one of an image what is left.
template <class A>
struct PassSums {
  A *sums, *masses;
  int splits, pixels;
};
// One of those parts: its pixels, and its place among all sums.
struct Part {
  int64_t image, place;
  int begin, end;
};

// A warp has 16 pixels of the scores and 16 channels of the sums.
template <class T, Pass PASS, int NJ>
struct PassStage {
  using A = acc_t<T>;
  static constexpr int WARPS = 8, THREADS = WARPS * WARP, PIXELS = WARPS * 16, NODES = 8 * NJ;
  static constexpr int CHANNELS = WARPS * 16;
  static constexpr int RESIDENT = PASS == Pass::expectation && NJ == 1 ? 2 : 1;  // blocks of a multiprocessor
  static_assert(DEPTH<A> == 16, "the pixels of a warp are one stage of the sums");
  using OfMap = OperandRow<T, HALVES_OF_MAP<T>>;
  using BesideMap = OperandRow<T, HALVES_BESIDE_MAP<T>>;
  struct Scores {
    OfMap x[PIXELS];
    BesideMap p[NODES], da[PASS == Pass::gradient ? NODES : 1];
  };
  union {
    Scores scores;
    OfMap v[CHANNELS];
    A mass[WARPS][NODES];
  };
  BesideMap rows[WARPS][NODES];                // z or dl
  A bias[NODES];                               // b or ds
  int64_t offset_x[PIXELS], offset_v[PIXELS];  // −1 beyond the last pixel
};

// Over the four lanes that share a row.
template <class A, class F>
__device__ inline A reduce_quad(A value, F f) {
  for (int step = 1; step < 4; step *= 2) value = f(value, __shfl_xor_sync(ALL_LANES, value, step));
  return value;
}

// f(e, j, node) over a thread's accumulators in row(first) of a product
template <int NJ, class F>
__device__ inline void over_row(int first, int nodes, F f) {
#pragma unroll
  for (int j = 0; j < NJ; ++j)
#pragma unroll
    for (int e = first; e < first + 2; ++e)
      if (const int k = 8 * j + 2 * (threadIdx.x % 4) + e % 2; k < nodes) f(j, e, k);
}

// Scores become responsibilities; see softmax_row() in common/scores.cuh.
template <class T, int NJ, class F>
__device__ inline void softmax_rows(NodeProduct<T, NJ>& z, int nodes, F score) {
  using A = acc_t<T>;
#pragma unroll
  for (int first = 0; first < 4; first += 2) {
    A most = -INFINITY, sum = 0;
    over_row<NJ>(first, nodes, [&](int j, int e, int k) {
      const A a = z.acc[j][e] = score(z.acc[j][e], k);
      most = a > most ? a : most;
    });
    most = reduce_quad(most, [](A a, A b) { return b > a ? b : a; });
    over_row<NJ>(first, nodes, [&](int j, int e, int) { sum += z.acc[j][e] = exp(z.acc[j][e] - most); });
    sum = reduce_quad(sum, [](A a, A b) { return a + b; });
    over_row<NJ>(first, nodes, [&](int j, int e, int) { z.acc[j][e] /= sum; });
  }
}
// dz becomes dl.
template <class T, int NJ>
__device__ inline void gradient_rows(NodeProduct<T, NJ>& dz, const NodeProduct<T, NJ>& z, int nodes) {
  using A = acc_t<T>;
#pragma unroll
  for (int first = 0; first < 4; first += 2) {
    A mean = 0;
    over_row<NJ>(first, nodes, [&](int j, int e, int) { mean += z.acc[j][e] * dz.acc[j][e]; });
    mean = reduce_quad(mean, [](A a, A b) { return a + b; });
    over_row<NJ>(first, nodes,
                 [&](int j, int e, int) { dz.acc[j][e] = z.acc[j][e] * (dz.acc[j][e] - mean); });
  }
}

// f(accumulator, element of the map) over the warp's rows, which are `count` pixels from `pixel` on
template <class T, int NJ, class M, class F>
__device__ inline void over_map(NodeProduct<T, NJ>& rows, const M& map, int64_t image, int pixel, int count,
                                const NodeShape& shape, F f) {
  if (!map.at) return;
#pragma unroll
  for (int first = 0; first < 4; first += 2) {
    const int m = rows.row(first);
    if (m >= count) continue;
    const int64_t at = map.offset(image, pixel + m, shape.columns);
    over_row<NJ>(first, shape.nodes,
                 [&](int j, int e, int k) { f(rows.acc[j][e], map.at[at + k * map.strides.c]); });
  }
}

// z = ⟨p_k, x⟩ and dz = ⟨da_k, x⟩ of a tile's pixels
template <class T, Pass PASS, int NJ>
__device__ inline void pass_scores(PassStage<T, PASS, NJ>& stage, const PassNodes<acc_t<T>>& nodes,
                                   const PassMaps<T>& maps, const NodeShape& shape, int64_t image,
                                   NodeProduct<T, NJ>& z, NodeProduct<T, NJ>& dz) {
  using A = acc_t<T>;
  using Stage = PassStage<T, PASS, NJ>;
  constexpr bool GRADIENT = PASS == Pass::gradient;
  const int C = shape.channels, m_warp = threadIdx.x / WARP * 16;
  Operand<T, T, false, Stage::PIXELS, Stage::THREADS> x;
  Operand<T, A, false, Stage::NODES, Stage::THREADS> p, da;
  const Source<T> from_x = source_of(maps.x, C);
  const Source<A> from_p = {nodes.p + image * nodes.p_stride, 1, C, nodes.p_vectors};
  const Source<A> from_da = {nodes.da + image * nodes.da_stride, 1, C, nodes.da_vectors};
  const auto fetch = [&](int c0) {
    const auto pixel = [&](int m) { return stage.offset_x[m]; };
    const auto node = [&](int n) { return n < shape.nodes ? int64_t(n) * C : -1; };
    const auto as_it_is = [](A a, int) { return a; };
    x.fetch(from_x, pixel, c0, as_it_is);
    p.fetch(from_p, node, c0, as_it_is);
    if constexpr (GRADIENT) da.fetch(from_da, node, c0, as_it_is);
  };
  auto& tile = stage.scores;
  fetch(0);
  for (int c0 = 0; c0 < C; c0 += DEPTH<A>) {
    __syncthreads();  // the stage before has been used
    x.put(from_x, tile.x);
    p.put(from_p, tile.p);
    if constexpr (GRADIENT) da.put(from_da, tile.da);
    __syncthreads();
    if (c0 + DEPTH<A> < C) fetch(c0 + DEPTH<A>);
    z.multiply(tile.x + m_warp, tile.p);
    if constexpr (GRADIENT) dz.multiply(tile.x + m_warp, tile.da);
  }
}

// write(channel, node, Σ_i rows_ik v_ic) over a tile of `count` pixels
template <class T, Pass PASS, int NJ, class F>
__device__ inline void pass_sums(PassStage<T, PASS, NJ>& stage, const PassMaps<T>& maps,
                                 const NodeShape& shape, int count, F write) {
  using A = acc_t<T>;
  using Stage = PassStage<T, PASS, NJ>;
  const int C = shape.channels, m_warp = threadIdx.x / WARP * 16;
  const int stages = (count + DEPTH<A> - 1) / DEPTH<A>;
  Operand<T, T, true, Stage::CHANNELS, Stage::THREADS> v;
  const Source<T> from_v = source_of(maps.v, C);
  const auto fetch = [&](int c0, int s) {
    v.fetch(from_v, [&](int k) { return stage.offset_v[s * DEPTH<A> + k]; }, c0, [](A a, int) { return a; });
  };
  fetch(0, 0);
  for (int c0 = 0; c0 < C; c0 += Stage::CHANNELS) {
    NodeProduct<T, NJ> sum;
    for (int s = 0; s < stages; ++s) {
      __syncthreads();  // the stage before has been used, and all rows are there
      v.put(from_v, stage.v);
      __syncthreads();
      if (s + 1 < stages)
        fetch(c0, s + 1);
      else if (c0 + Stage::CHANNELS < C)
        fetch(c0 + Stage::CHANNELS, 0);
      sum.multiply(stage.v + m_warp, stage.rows[s]);
    }
#pragma unroll
    for (int j = 0; j < NJ; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int c = c0 + m_warp + sum.row(e), k = sum.column(j, e);
        if (c < C && k < shape.nodes) write(c, k, sum.acc[j][e]);
      }
  }
}

// By a block: one part.
template <class T, Pass PASS, int NJ>
__device__ inline void pass_over(PassStage<T, PASS, NJ>& stage, const PassNodes<acc_t<T>>& nodes,
                                 const PassMaps<T>& maps, const PassSums<acc_t<T>>& out,
                                 const NodeShape& shape, const Part& part) {
  using A = acc_t<T>;
  using Stage = PassStage<T, PASS, NJ>;
  const int C = shape.channels, K = shape.nodes, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const int64_t image = part.image;
  const A lam = nodes.lam ? *nodes.lam : A(1);
  A mass[(Stage::NODES + WARP - 1) / WARP] = {};
  for (int k = threadIdx.x; k < K; k += Stage::THREADS)
    stage.bias[k] = nodes.b ? nodes.b[image * K + k] : A(0);
  for (int first = part.begin; first < part.end; first += Stage::PIXELS) {
    const int count = min(Stage::PIXELS, part.end - first);
    __syncthreads();  // the tile before has been used
    for (int m = threadIdx.x; m < Stage::PIXELS; m += Stage::THREADS) {
      const int pixel = first - maps.origin + m;
      stage.offset_x[m] = m < count ? maps.x.offset(image, pixel, shape.columns) : -1;
      stage.offset_v[m] = m < count ? maps.v.offset(image, pixel, shape.columns) : -1;
    }
    __syncthreads();
    NodeProduct<T, NJ> z, dz;
    pass_scores(stage, nodes, maps, shape, image, z, dz);

    const int pixel = first + warp * 16, mine = count - warp * 16;  // this warp's
    const auto to_map = [](A& a, A& place) { place = a; };
    if constexpr (PASS == Pass::expectation) {
      softmax_rows(z, K, [&](A a, int k) { return lam * (a + stage.bias[k]); });
    } else {
      softmax_rows(z, K, [&](A a, int) { return lam * a; });
      for (int i = 0; i < 4; i += 2)
        over_row<NJ>(i, K, [&](int j, int e, int k) { dz.acc[j][e] += stage.bias[k]; });
      over_map(dz, maps.dq, image, pixel, mine, shape, [](A& a, A dq) { a += dq; });
      gradient_rows(dz, z, K);
      over_map(dz, maps.dl, image, pixel, mine, shape, to_map);
    }
    over_map(z, maps.z, image, pixel, mine, shape, to_map);
    if (!out.sums) continue;

    NodeProduct<T, NJ>& rows = PASS == Pass::gradient ? dz : z;
#pragma unroll
    for (int j = 0; j < NJ; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool there = rows.row(e) < mine && rows.column(j, e) < K;
        stage.rows[warp][rows.column(j, e)].put(rows.row(e), Vector<A, 1>{{there ? rows.acc[j][e] : A(0)}});
      }
    if constexpr (PASS == Pass::expectation) {
      __syncwarp();
#pragma unroll
      for (int i = 0; i < int(sizeof mass / sizeof(A)); ++i)
        if (const int k = lane + i * WARP; k < K)
          for (int m = 0; m < 16; ++m) mass[i] += stage.rows[warp][k].get(m);
    }
    pass_sums(stage, maps, shape, count, [&](int c, int k, A sum) {
      A& at = out.sums[(part.place * K + k) * C + c];
      at = first == part.begin ? sum : at + sum;
    });
  }
  if (PASS != Pass::expectation || !out.sums) return;
  __syncthreads();  // the stages make room
#pragma unroll
  for (int i = 0; i < int(sizeof mass / sizeof(A)); ++i)
    if (const int k = lane + i * WARP; k < K) stage.mass[warp][k] = mass[i];
  __syncthreads();
  for (int k = threadIdx.x; k < K; k += Stage::THREADS) {
    A sum = 0;
    for (int w = 0; w < Stage::WARPS; ++w) sum += stage.mass[w][k];
    out.masses[part.place * K + k] = sum;
  }
}

// The part `split` of an image, whose sums are the `place`th.
template <class A>
__device__ inline Part part_of(const PassSums<A>& out, const NodeShape& shape, int64_t image, int64_t place,
                               int split) {
  const int begin = split * out.pixels;
  return {image, place * out.splits + split, begin, min(shape.pixels, begin + out.pixels)};
}

template <class T, Pass PASS, int NJ>
__global__ void __launch_bounds__(PassStage<T, PASS, NJ>::THREADS, PassStage<T, PASS, NJ>::RESIDENT)
    em_attention_pass_kernel(PassNodes<acc_t<T>> nodes, PassMaps<T> maps, PassSums<acc_t<T>> out,
                             NodeShape shape) {
  using Stage = PassStage<T, PASS, NJ>;
  extern __shared__ __align__(16) double shared[];
  const int64_t image = blockIdx.x / out.splits;
  pass_over(*reinterpret_cast<Stage*>(shared), nodes, maps, out, shape,
            part_of(out, shape, image, image, blockIdx.x % out.splits));
}

}  // namespace segkernels::cuda
