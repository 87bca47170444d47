// All iterations of EM attention and the reconstruction in one launch.
//
// Blocks work in teams, an image at a time: each makes its part of the sums, the team waits, each makes its
// share of the bases, the team waits. Parts, and the order of every sum, are those of a launch for each pass
// and M-step, so the results are too, bit for bit. Sums and bases pass from block to block through the L2
// cache, in clusters as well: there the features leave no room for partial sums in shared memory.
#pragma once

#include "common/async.cuh"
#include "common/barriers.cuh"
#include "common/spread.cuh"
#include "em_attention/kernels.cuh"
#include "em_attention/pass.cuh"

namespace segkernels::cuda {

struct Team {
  int blocks;  // of every team
  __device__ int count() const { return gridDim.x / blocks; }
  __device__ int index() const { return blockIdx.x / blocks; }
  __device__ int rank() const { return blockIdx.x % blocks; }
};
// Of a cooperative grid. The features come out of the L2 cache in each iteration.
struct GridTeam : Team {
  static constexpr bool KEEPS_FEATURES = false;
  unsigned* arrived;  // [teams], zero at first
  __device__ void barrier() const { counted_barrier(arrived + index(), unsigned(blocks)); }
};
// A cluster. Each block keeps the features of its part in shared memory.
struct ClusterTeam : Team {
  static constexpr bool KEEPS_FEATURES = true;
  __device__ void barrier() const {
    cluster_arrive();
    cluster_wait();
  }
};

// Where the bases in front of E-step t belong, and s and r of its M-step: m [B, K, C], at the end the bases
// behind the last; h [B, steps − first, K, C] and s, r [B, depth, K] of the last steps.
template <class A>
struct Course {
  A *m, *h, *s, *r;
  int steps, first, depth;
  bool vectors;  // bases can be read by 16 bytes

  __device__ OfNodes<A> bases(int t, int64_t size) const {
    if (t < first || t == steps) return {m, size};
    return {h + (t - first) * size, (steps - first) * size};
  }
  __device__ OfNodes<A> of_step(A* kept, int t, int nodes) const {
    const int at = t - steps + depth;
    if (at < 0) return {};
    return {kept + int64_t(at) * nodes, int64_t(depth) * nodes};
  }
};

template <class T>
struct Iterations {
  PixelMap<const T> x;
  PixelMap<acc_t<T>> z;  // of the last E-step
  PixelMap<T> y;
  const acc_t<T>* lam;
  Course<acc_t<T>> course;
  Norm norm;
  int64_t images;
  PassSums<acc_t<T>> sums;  // of every team
};

template <class T, int NJ>
union IterationStage {
  using Tile = PassStage<T, Pass::expectation, NJ>;
  Tile pass;
  SpreadStage<T, Spread::reconstruction, Tile::WARPS> spread;
};

// The features of a part in shared memory, [pixel][channel]: one stage of channels of neighbouring pixels
// meets no bank conflict.
template <class T>
struct KeptFeatures {
  static constexpr int V = 16 / int(sizeof(T)), LINE = 128 / int(sizeof(T));
  static constexpr int MOST = 144;  // pixels
  __host__ __device__ static int pitch(int channels) {
    return (channels + LINE - 1) / LINE * LINE + DEPTH<acc_t<T>>;
  }
  static size_t bytes(int pixels, int channels) { return size_t(pixels) * pitch(channels) * sizeof(T); }

  // By the whole block: the part's features as a map that begins with its first pixel.
  template <int THREADS>
  __device__ static PixelMap<const T> copy(T* to, const PixelMap<const T>& x, const NodeShape& shape,
                                           const Part& part) {
    const int C = shape.channels, apart = pitch(C), count = part.end - part.begin;
    const auto from = [&](int m) { return x.at + x.offset(part.image, part.begin + m, shape.columns); };
    if (x.vectors)
      for_each<MOST, THREADS>(false, count, C / V,
                              [&](int m, int i) { copy_async<16>(to + m * apart + i * V, from(m) + i * V); });
    else
      for_each<MOST, THREADS>(!x.channels_are_dense(), count, C,
                              [&](int m, int c) { to[m * apart + c] = from(m)[c * x.strides.c]; });
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    return {to, {0, 1, int64_t(shape.columns) * apart, apart}, C % V == 0};
  }
};

template <class T, int NJ, class TEAM>
__global__ void __launch_bounds__(IterationStage<T, NJ>::Tile::THREADS, 1)
    em_attention_iterations_kernel(TEAM team, Iterations<T> of, NodeShape shape) {
  using Stage = IterationStage<T, NJ>;
  extern __shared__ __align__(16) double shared[];
  Stage& stage = *reinterpret_cast<Stage*>(shared);
  const int C = shape.channels, K = shape.nodes;
  const Course<acc_t<T>>& course = of.course;
  for (int64_t image = team.index(); image < of.images; image += team.count()) {
    const Part part = part_of(of.sums, shape, image, team.index(), team.rank());
    PassMaps<T> maps = {of.x, of.x};
    if constexpr (TEAM::KEEPS_FEATURES) {
      T* const features = reinterpret_cast<T*>(&stage + 1);
      maps.x = maps.v = KeptFeatures<T>::template copy<Stage::Tile::THREADS>(features, of.x, shape, part);
      maps.origin = part.begin;
    }
    for (int t = 0; t < course.steps; ++t) {
      if (t + 1 == course.steps) maps.z = of.z;
      const OfNodes<acc_t<T>> p = course.bases(t, int64_t(K) * C);
      pass_over(stage.pass, {p.at, nullptr, of.lam, nullptr, p.stride, 0, course.vectors, false}, maps,
                of.sums, shape, part);
      team.barrier();
      make_bases<acc_t<T>>({of.sums.sums, of.sums.masses, nullptr, of.sums.splits, of.sums.splits, of.norm,
                            course.bases(t + 1, int64_t(K) * C), course.of_step(course.s, t, K),
                            course.of_step(course.r, t, K)},
                           image, team.index(), team.rank(), team.blocks, K, C);
      team.barrier();
    }
    for (int first = part.begin; first < part.end; first += Stage::Tile::PIXELS)
      for (int c0 = 0; c0 < C; c0 += decltype(Stage::spread)::CHANNELS) {
        spread_tile(stage.spread, {course.m, nullptr, nullptr, nullptr, course.vectors},
                    {{of.z.at, of.z.strides, of.z.vectors}, {}, {}, of.y}, shape, image, first, part.end, c0);
        __syncthreads();  // the tile has been used
      }
  }
}

}  // namespace segkernels::cuda
