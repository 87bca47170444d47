// A host executor for CUDA kernels: g++ compiles csrc/<op>/cuda.cu and kernels.cuh unchanged against the
// headers of this folder, and a launch runs the grid here. It is meant to find wrong results, not to be fast.
//
// - Blocks run one after another; threads are fibres of one OS thread (x86-64), resumed in an order that
//   SEGKERNELS_SIMT_SEED shuffles. A fibre runs until it waits at a barrier or a warp exchange.
// - __shared__ is thread_local: one OS thread runs the block, so its fibres share it. Dynamic shared memory
// is
//   `extern __shared__ __align__(16) double shared[]` (that name and type), filled with 0xff (NaN in every
//   floating type) before each block; under the address sanitizer nothing beyond the launch's size can be
//   read.
// - __syncthreads: every thread of the block must arrive, and none may have returned: else the launch aborts.
// - __shfl_xor_sync, __syncwarp and mma are exchanges among all 32 lanes of a warp, with the same demand.
//
// Not here yet: partial masks, ballots, atomics, cp.async, clusters, races between barriers.
#pragma once

#include <math.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <tuple>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ thread_local

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

template <class T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
inline T max(T a, T b) {
  return a < b ? b : a;
}

namespace segkernels::cuda {
extern thread_local __align__(16) double shared[];
}

namespace simt {

constexpr size_t SHARED_BYTES = 227 * 1024;  // what one block can have on sm_90
constexpr int LANES = 32;

struct Warp {
  alignas(16) char slot[2][LANES]
                       [64];  // by parity of the exchange: a fast lane cannot overwrite what a slow one reads
  int arrived = 0;
  unsigned exchanges = 0;
};

struct Fibre {
  void* stack_pointer = nullptr;  // while it does not run
  std::unique_ptr<char[]> stack;
  bool done = true;
  const unsigned* counter = nullptr;  // waits while *counter == seen
  unsigned seen = 0;
};

class Block {
 public:
  // Runs body() once per thread of a block of `threads`.
  void run(unsigned threads, size_t shared_bytes, unsigned seed, void (*body)(void*), void* argument);

  void barrier() {
    if (++arrived_ == threads_) {
      arrived_ = 0;
      ++barriers_;
    } else {
      wait(barriers_);
    }
  }

  // Gives `value` to the warp and returns what its 32 lanes gave. Valid until the lane's next exchange but
  // one.
  template <class X>
  const char (*exchange(const X& value))[64] {
    static_assert(sizeof(X) <= 64, "");
    Warp& warp = warps_[threadIdx.x / LANES];
    const unsigned parity = warp.exchanges & 1;
    std::memcpy(warp.slot[parity][threadIdx.x % LANES], &value, sizeof(X));
    if (++warp.arrived == LANES) {
      warp.arrived = 0;
      ++warp.exchanges;
    } else {
      wait(warp.exchanges);
    }
    return warp.slot[parity];
  }

  static Block& current();

 private:
  void wait(const unsigned& counter);
  static void enter();

  std::vector<Fibre> fibres_;
  std::vector<Warp> warps_;
  std::vector<unsigned> order_;
  void* scheduler_ = nullptr;
  unsigned threads_ = 0, arrived_ = 0, barriers_ = 0, running_ = 0;
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
};

template <class X>
X lane_value(const char (*slots)[64], int lane) {
  X value;
  std::memcpy(&value, slots[lane], sizeof(X));
  return value;
}

unsigned seed();

template <class... P>
void launch(dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(P...), std::tuple<P...> arguments) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...>& arguments;
  } call{kernel, arguments};
  gridDim = grid, blockDim = block;
  for (unsigned b = 0; b < grid.x; ++b) {
    blockIdx = dim3(b, 0, 0);
    Block::current().run(
        block.x, shared_bytes, seed() + b,
        [](void* p) {
          Call& c = *static_cast<Call*>(p);
          std::apply(c.kernel, c.arguments);
        },
        &call);
  }
}

}  // namespace simt

inline void __syncthreads() { simt::Block::current().barrier(); }
inline void __syncwarp(unsigned = ~0u) { simt::Block::current().exchange(0); }
template <class X>
inline X __shfl_xor_sync(unsigned, X value, int step) {
  return simt::lane_value<X>(simt::Block::current().exchange(value), (threadIdx.x % simt::LANES) ^ step);
}
