// What the executor must do as a device does, one small kernel each; test_semantics.py says what y must be.
#include "../toy.h"

#include "common/async.cuh"
#include "common/barriers.cuh"
#include "common/mma.cuh"

namespace segkernels::cuda {

__device__ inline int index() { return blockIdx.x * blockDim.x + threadIdx.x; }
__device__ inline int lane() { return threadIdx.x % WARP; }

// The lanes of the warp, and those of halves and quarters with their own masks and widths.
__global__ void shuffles_kernel(const float* x, float* y, int n) {
  const float a = x[index()];
  y[index()] = __shfl_xor_sync(ALL_LANES, a, 5);
  y[index() + n / 5] = __shfl_up_sync(ALL_LANES, a, 3, 16);
  y[index() + n / 5 * 2] = __shfl_down_sync(ALL_LANES, a, 7, 8);
  y[index() + n / 5 * 3] = __shfl_sync(ALL_LANES, a, 2, 4);
  const bool high = lane() >= 16;  // two groups, each at a place of its own
  float b = 0;
  if (high)
    b = __shfl_xor_sync(0xffff0000u, a, 1);
  else
    b = __shfl_xor_sync(0x0000ffffu, a, 2);
  y[index() + n / 5 * 4] = b;
}

// y: ballot, any, all, and the block's count, or, and of x > 0.
__global__ void votes_kernel(const float* x, float* y, int n) {
  const bool positive = x[index()] > 0;
  const int part = n / 6, i = index();
  y[i] = float(__ballot_sync(ALL_LANES, positive) >> 8 & 0xffff);
  y[i + part] = float(__any_sync(ALL_LANES, positive));
  y[i + 2 * part] = float(__all_sync(ALL_LANES, positive));
  y[i + 3 * part] = float(__syncthreads_count(positive));
  y[i + 4 * part] = float(__syncthreads_or(positive));
  y[i + 5 * part] = float(__syncthreads_and(positive));
}

// Reverses each block's values, through static and then dynamic shared memory.
__global__ void shared_memory_kernel(const float* x, float* y, int) {
  extern __shared__ __align__(16) double shared[];
  __shared__ float fixed[64];
  float* dynamic = reinterpret_cast<float*>(shared);
  const int last = blockDim.x - 1;
  fixed[threadIdx.x] = x[index()];
  __syncthreads();
  dynamic[threadIdx.x] = fixed[last - threadIdx.x] + 1;
  __syncthreads();
  y[index()] = fixed[last - threadIdx.x] + dynamic[0];
}

// Warps pass values to each other by __syncwarp alone.
__global__ void warp_memory_kernel(const float* x, float* y, int) {
  __shared__ float values[128];
  values[threadIdx.x] = x[index()];
  __syncwarp();
  y[index()] = values[threadIdx.x ^ 1];
}

// y: sum, largest, smallest of the integers x, and how often a compare-and-swap loop added one.
__global__ void atomics_kernel(const float* x, float* y, int) {
  __shared__ int sum, largest, smallest, swaps;
  if (threadIdx.x == 0) sum = 0, largest = -1000, smallest = 1000, swaps = 0;
  __syncthreads();
  atomicAdd(&sum, int(x[index()]));
  atomicMax(&largest, int(x[index()]));
  atomicMin(&smallest, int(x[index()]));
  for (int old = 0;;) {
    const int seen = atomicCAS(&swaps, old, old + 1);
    if (seen == old) break;
    old = seen;
  }
  __syncthreads();
  if (threadIdx.x == 0) y[0] = float(sum), y[1] = float(largest), y[2] = float(smallest), y[3] = float(swaps);
}

// The block that comes last adds up what all left: y[0] = Σ x. y: the sum, a counter (zero), a place for each
// block.
__global__ void last_block_kernel(const float* x, float* y, int) {
  float sum = 0;
  for (unsigned i = 0; i < blockDim.x; ++i) sum += x[blockIdx.x * blockDim.x + i];
  if (threadIdx.x != 0) return;
  y[2 + blockIdx.x] = sum;
  __threadfence();
  if (atomicAdd(reinterpret_cast<unsigned*>(y + 1), 1u) + 1 < gridDim.x) return;
  __threadfence();
  y[0] = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) y[0] += y[2 + b];
}

// All blocks of a cooperative grid wait for each other: y = x of the next block. y: a counter (zero) and the
// blocks' values, then the result.
__global__ void grid_barrier_kernel(const float* x, float* y, int) {
  unsigned* arrived = reinterpret_cast<unsigned*>(y);
  y[1 + index()] = x[index()];
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(arrived, 1u);
    while (atomicAdd(arrived, 0u) < gridDim.x) {
    }
    __threadfence();
  }
  __syncthreads();
  const int all = gridDim.x * blockDim.x;
  y[1 + all + index()] = y[1 + (index() + blockDim.x) % all];
}

// Teams of two blocks do so three times, by one counter for each: y = x of the other block, three times over.
// y: the counters (zero), what the blocks tell each other, the results.
__global__ void counted_barrier_kernel(const float* x, float* y, int) {
  const int teams = gridDim.x / 2, all = gridDim.x * blockDim.x;
  unsigned* arrived = reinterpret_cast<unsigned*>(y) + blockIdx.x / 2;
  float *told = y + teams, *out = told + all;
  const int other = (blockIdx.x ^ 1) * blockDim.x + threadIdx.x;
  float value = x[index()];
  for (int turn = 0; turn < 3; ++turn) {
    told[index()] = value;
    counted_barrier(arrived, 2);
    value = told[other];
    counted_barrier(arrived, 2);
    out[turn * all + index()] = value;
  }
}

// The order in which the threads came by. y: a counter (zero), then each thread's place.
__global__ void arrivals_kernel(const float*, float* y, int) {
  y[1 + threadIdx.x] = float(atomicAdd(reinterpret_cast<unsigned*>(y), 1u));
}

// Two stages of copies in flight: y = x of the block, shifted by one stage of 32, the tail zero.
__global__ void copies_kernel(const float* x, float* y, int n) {
  extern __shared__ __align__(16) double shared[];
  float* stage = reinterpret_cast<float*>(shared);  // [2][32]
  const int stages = n / 32;
  const auto fetch = [&](int s) {
    if (threadIdx.x < 8) {
      const int valid = s < stages - 1 ? 16 : threadIdx.x < 4 ? 8 : 0;  // half of a vector, then nothing
      copy_async<16>(stage + s % 2 * 32 + threadIdx.x * 4, x + s * 32 + threadIdx.x * 4, valid);
    }
    commit_copies();
  };
  fetch(0);
  for (int s = 0; s < stages; ++s) {
    if (s + 1 < stages)
      fetch(s + 1);
    else
      commit_copies();
    wait_copies<1>();
    __syncthreads();
    y[s * 32 + threadIdx.x] = stage[s % 2 * 32 + threadIdx.x];
    __syncthreads();
  }
}

// Blocks of a cluster read the next one's shared memory.
__global__ void cluster_kernel(const float* x, float* y, int) {
  __shared__ float mine[32];
  mine[threadIdx.x] = x[index()];
  cluster_arrive();
  cluster_wait();
  const unsigned next = (cluster_rank() + 1) % cluster_blocks();
  y[index()] = shared_of(mine, next)[threadIdx.x] + 100 * cluster_rank();
  cluster_arrive();
  cluster_wait();
}

// Warp 0 makes what warps 1 and 2 take, twice: barrier 1 says full, barrier 2 says empty.
__global__ void named_barriers_kernel(const float* x, float* y, int) {
  __shared__ float slot[32];
  const int warp = threadIdx.x / WARP;
  for (int turn = 0; turn < 2; ++turn) {
    if (warp == 0) {
      slot[lane()] = x[turn * 32 + lane()];
      named_barrier_arrive(1, 96);
      named_barrier_wait(2, 96);
    } else {
      named_barrier_wait(1, 96);
      y[turn * 64 + (warp - 1) * 32 + lane()] = slot[lane()] * float(warp);
      named_barrier_arrive(2, 96);
    }
  }
}

// y [16, 8] = a [16, K] · b [K, 8], one warp; x holds a, then b.
template <class T>
__global__ void product16_kernel(const float* x, float* y, int) {
  const float* b = x + 16 * 16;
  const int g = lane() / 4, t = lane() % 4;
  Vector<T, 2> left[4], right[2];
  for (int i = 0; i < 4; ++i)
    for (int e = 0; e < 2; ++e)
      left[i].at[e] = narrow<T>(x[(g + 8 * (i % 2)) * 16 + 2 * t + 8 * (i / 2) + e]);
  for (int i = 0; i < 2; ++i)
    for (int e = 0; e < 2; ++e) right[i].at[e] = narrow<T>(b[(2 * t + 8 * i + e) * 8 + g]);
  float c[4] = {};
  mma_m16n8k16<T>(c, left, right);
  for (int i = 0; i < 4; ++i) y[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = c[i];
}
__global__ void product8_kernel(const float* x, float* y, int) {
  const float* b = x + 16 * 8;
  const int g = lane() / 4, t = lane() % 4;
  float left[4], right[2], c[4] = {};
  for (int i = 0; i < 4; ++i) left[i] = to_tf32(x[(g + 8 * (i % 2)) * 8 + t + 4 * (i / 2)]);
  for (int i = 0; i < 2; ++i) right[i] = to_tf32(b[(t + 4 * i) * 8 + g]);
  mma_m16n8k8(c, left, right);
  for (int i = 0; i < 4; ++i) y[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = c[i];
}

// Roundings of float: to bfloat16, to half, to TF32.
__global__ void roundings_kernel(const float* x, float* y, int n) {
  const int i = index(), part = n / 3;
  if (i >= part) return;
  y[i] = widen(narrow<__nv_bfloat16>(x[i]));
  y[part + i] = widen(narrow<__half>(x[i]));
  y[2 * part + i] = to_tf32(x[i]);
}

const Kernels semantics_kernels = {
    {"shuffles", shuffles_kernel},
    {"votes", votes_kernel},
    {"shared_memory", shared_memory_kernel},
    {"warp_memory", warp_memory_kernel},
    {"atomics", atomics_kernel},
    {"last_block", last_block_kernel},
    {"grid_barrier", grid_barrier_kernel},
    {"counted_barrier", counted_barrier_kernel},
    {"arrivals", arrivals_kernel},
    {"copies", copies_kernel},
    {"cluster", cluster_kernel},
    {"named_barriers", named_barriers_kernel},
    {"product16_bf16", product16_kernel<__nv_bfloat16>},
    {"product16_half", product16_kernel<__half>},
    {"product8", product8_kernel},
    {"roundings", roundings_kernel},
};

TOYS(semantics, semantics_kernels)

}  // namespace segkernels::cuda
