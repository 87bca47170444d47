// A host executor for CUDA kernels: g++ compiles csrc/<op>/cuda.cu and kernels.cuh unchanged against the
// headers of this folder, and a launch runs the grid here. It is meant to find wrong results, not to be fast.
//
// - Threads are fibres of one OS thread (x86-64). A fibre runs until it waits: at a barrier, an exchange of
//   its warp, an atomic. Blocks that must be resident together (a cluster, a cooperative grid) are a team;
//   each block of a team has an OS thread, of which one runs at a time. The orders of blocks and of threads
//   are shuffled anew at every launch (SEGKERNELS_SIMT_SEED starts the sequence).
// - __shared__ is thread_local: one OS thread runs a block, so its fibres share it. Dynamic shared memory is
//   `extern __shared__ __align__(16) double shared[]` (that name and type). All of it is filled with 0xff
//   (NaN in every floating type) before each block.
// - A fault (a barrier that not all threads reach, an exchange with absent lanes, and what watch.cpp finds)
//   ends the launch like an error on a device: the operator raises RuntimeError with kernel, block, thread.
//
// What differs from a device:
// - Barriers and full masks want all threads of the block or warp, also where some have returned.
// - A warp advances lane by lane: code that relies on lockstep without __syncwarp() goes wrong here in some
//   order of the threads, as it may on a GPU. __activemask() names the lanes that have not returned.
// - memcpy in a kernel is not watched; a loop that waits for a volatile is a hang (atomics let others run).
// - Clocks, textures, printf and dynamic parallelism are absent.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ thread_local

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

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

// What the running thread asks of the engine (engine/). Values go through untyped memory, so that nothing of
// the engine's own is touched by instrumented code.
namespace simt {

constexpr int LANES = 32;
constexpr size_t SHARED_BYTES = 227 * 1024;  // what one block can have on sm_90

// Waits for all threads of the block; the sum of their votes.
int barrier(int vote);
// Named barrier 1 … 15: waits for `threads` of them, or only arrives.
void named_barrier(int name, unsigned threads, bool wait);
void cluster_arrive();
void cluster_wait();
unsigned cluster_rank();
unsigned cluster_blocks();
// The place in block `rank`'s shared memory of p in this block's.
void* shared_of(void* p, unsigned rank);
// Gives `mine` to the lanes of `mask` and takes what each gave: all[lane], `bytes` apart; which lanes there
// are. It orders nothing.
unsigned exchange(const char* what, unsigned mask, const void* mine, size_t bytes, void* all);
[[noreturn]] void absent_lane(const char* what, int lane);
// Waits for the lanes of `mask` and orders their accesses to memory.
void warp_barrier(unsigned mask);
unsigned active_lanes();
// Copies that the thread has begun arrive when it waits for their group.
void copy_begin(void* target, const void* source, size_t bytes, size_t filled);
void copy_commit();
void copy_wait(size_t groups_left);
// The old value of *p, replaced by change(old, argument), which reads it or not; ordered by fences alone.
void atomic(void* p, size_t bytes, bool reads, void (*change)(void* value, const void* argument),
            const void* argument, void* old);
void fence();
// *p, ordered after the atomics that made it so.
unsigned load_acquire(const unsigned* p);

// What the device says of itself: to begin with, an H200.
struct Device {
  int ptx = 90;  // what the kernels are compiled for; clusters from 90 on
  int multiprocessors = 132;
  size_t shared_bytes = SHARED_BYTES;  // that a block can have
  int l2_bytes = 50 << 20;
};
Device& device();
// Blocks of a multiprocessor by threads and shared memory.
inline size_t resident(unsigned threads, size_t shared_bytes) {
  const size_t by_threads = 2048 / threads,
               by_shared = (device().shared_bytes + 1024) / (shared_bytes + 1024);
  return by_threads < by_shared ? by_threads : by_shared;
}

struct Launch {
  const void* kernel;
  dim3 grid, block;
  unsigned cluster;  // blocks; 1: none
  bool cooperative;
  size_t shared_bytes;
  void (*body)(void* arguments);
  void* arguments;  // a tuple of them
  size_t argument_bytes;
};
int launch(const Launch&);  // a cudaError_t
size_t& allowed_shared(const void* kernel);

template <class X>
X lane_value(const char* what, unsigned mask, X value, int lane) {
  X all[LANES];
  const unsigned there = exchange(what, mask, &value, sizeof(X), all);
  if (!(there >> lane & 1)) absent_lane(what, lane);
  return all[lane];
}
inline int lane() { return int(threadIdx.x % LANES); }

template <class T, class F>
T atomically(T* p, T argument, F f, bool reads = true) {
  struct Given {
    T argument;
    F f;
  } given{argument, f};
  T old;
  const auto change = [](void* value, const void* given) {
    const Given& g = *static_cast<const Given*>(given);
    T a;
    std::memcpy(&a, value, sizeof a);
    a = g.f(a, g.argument);
    std::memcpy(value, &a, sizeof a);
  };
  atomic(p, sizeof(T), reads, change, &given, &old);
  return old;
}

}  // namespace simt

inline void __syncthreads() { simt::barrier(0); }
inline int __syncthreads_count(int predicate) { return simt::barrier(predicate != 0); }
inline int __syncthreads_or(int predicate) { return simt::barrier(predicate != 0) != 0; }
inline int __syncthreads_and(int predicate) { return simt::barrier(predicate == 0) == 0; }
inline void __syncwarp(unsigned mask = ~0u) { simt::warp_barrier(mask); }
inline unsigned __activemask() { return simt::active_lanes(); }

// Lanes that a width or a step leaves without a partner get their own value, as on a device.
template <class X>
inline X __shfl_sync(unsigned mask, X value, int source, int width = simt::LANES) {
  const int first = simt::lane() / width * width;
  return simt::lane_value("__shfl_sync", mask, value, first + (source & (width - 1)));
}
template <class X>
inline X __shfl_xor_sync(unsigned mask, X value, int step, int width = simt::LANES) {
  const int from = simt::lane() ^ step, last = simt::lane() / width * width + width - 1;
  return simt::lane_value("__shfl_xor_sync", mask, value, from > last ? simt::lane() : from);
}
template <class X>
inline X __shfl_down_sync(unsigned mask, X value, unsigned step, int width = simt::LANES) {
  const int from = simt::lane() + int(step), last = simt::lane() / width * width + width - 1;
  return simt::lane_value("__shfl_down_sync", mask, value, from > last ? simt::lane() : from);
}
template <class X>
inline X __shfl_up_sync(unsigned mask, X value, unsigned step, int width = simt::LANES) {
  const int from = simt::lane() - int(step), first = simt::lane() / width * width;
  return simt::lane_value("__shfl_up_sync", mask, value, from < first ? simt::lane() : from);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  int all[simt::LANES];
  const unsigned there = simt::exchange("__ballot_sync", mask, &predicate, sizeof predicate, all);
  unsigned votes = 0;
  for (int i = 0; i < simt::LANES; ++i)
    if (there >> i & 1 && all[i]) votes |= 1u << i;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

template <class T>
inline T atomicAdd(T* p, T value) {
  return simt::atomically(p, value, [](T a, T b) { return T(a + b); });
}
template <class T>
inline T atomicMax(T* p, T value) {
  return simt::atomically(p, value, [](T a, T b) { return a < b ? b : a; });
}
template <class T>
inline T atomicMin(T* p, T value) {
  return simt::atomically(p, value, [](T a, T b) { return b < a ? b : a; });
}
template <class T>
inline T atomicExch(T* p, T value) {
  return simt::atomically(p, value, [](T, T b) { return b; }, false);
}
template <class T>
inline T atomicCAS(T* p, T compare, T value) {
  return simt::atomically(p, value, [compare](T a, T b) { return a == compare ? b : a; });
}
inline void __threadfence() { simt::fence(); }

template <class T>
inline T __ldg(const T* p) {
  return *p;
}
inline float rsqrtf(float a) { return 1 / sqrtf(a); }
inline double rsqrt(double a) { return 1 / sqrt(a); }
inline float __expf(float a) { return expf(a); }
