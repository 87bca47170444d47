// One deliberate fault each, which the executor must report; test_faults.py says how.
#include "../toy.h"

#include "common/async.cuh"
#include "common/barriers.cuh"

namespace segkernels::cuda {

__global__ void unwritten_shared_kernel(const float* x, float* y, int) {
  __shared__ float values[64];
  if (threadIdx.x != 40) values[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = values[63 - threadIdx.x];
}
__global__ void unwritten_global_kernel(const float* x, float* y, int) { y[threadIdx.x] += x[threadIdx.x]; }

__global__ void beyond_tensor_kernel(const float* x, float* y, int) {
  y[threadIdx.x] = x[threadIdx.x] + x[threadIdx.x + 1];
}
__global__ void before_tensor_kernel(const float* x, float* y, int) {
  y[int(threadIdx.x) - 1] = x[threadIdx.x];
}
__global__ void beyond_dynamic_kernel(const float* x, float* y, int) {
  extern __shared__ __align__(16) double shared[];
  float* values = reinterpret_cast<float*>(shared);
  values[threadIdx.x + 1] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = 0;
}
__device__ float* after(float* values, int n) { return values + n; }
__global__ void beyond_static_kernel(const float* x, float* y, int) {
  __shared__ float values[64];
  *after(values, int(threadIdx.x) + 1) = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = 0;
}
__global__ void index_kernel(const float* x, float* y, int n) {
  __shared__ float values[32];
  values[threadIdx.x + n / 64] = x[threadIdx.x];
  y[threadIdx.x] = values[threadIdx.x + n / 64];
}
__global__ void overflow_kernel(const float* x, float* y, int n) {
  y[(int(threadIdx.x) + n) * 40000000 % 64] = x[threadIdx.x];
}
__global__ void input_written_kernel(const float* x, float* y, int) {
  y[threadIdx.x] = 0;
  const_cast<float*>(x)[threadIdx.x] = 0;
}
__global__ void misaligned_kernel(const float* x, float* y, int) {
  store<2>(y + 2 * threadIdx.x, load<2>(x + 1 + 2 * threadIdx.x));
}

__global__ void early_return_kernel(const float* x, float* y, int) {
  if (threadIdx.x >= 48) return;
  __syncthreads();
  y[threadIdx.x] = x[threadIdx.x];
}
__global__ void divergent_barrier_kernel(const float* x, float* y, int) {
  if (threadIdx.x < 32) __syncthreads();
  y[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x < 32) __syncthreads();
}
__global__ void absent_lane_kernel(const float* x, float* y, int) {
  if (threadIdx.x % WARP == 7) return;
  y[threadIdx.x] = __shfl_xor_sync(ALL_LANES, x[threadIdx.x], 1);
}
__global__ void short_warp_kernel(const float* x, float* y, int) {
  y[threadIdx.x] = __shfl_xor_sync(ALL_LANES, x[threadIdx.x], 16);
}
// Atomics on shared memory order no blocks, whichever of them came first.
__global__ void atomics_of_blocks_kernel(const float* x, float* y, int) {
  __shared__ unsigned COUNT;
  if (threadIdx.x != 0) return;
  atomicExch(&COUNT, 0u);
  if (blockIdx.x == 0) y[0] = x[0];
  __threadfence();
  atomicAdd(&COUNT, 1u);
  __threadfence();
  if (blockIdx.x == 1) y[1] = y[0];
}
__global__ void foreign_mask_kernel(const float* x, float* y, int) {
  y[threadIdx.x] = __shfl_xor_sync(0xffffu, x[threadIdx.x], 1);
}
__global__ void different_exchanges_kernel(const float* x, float* y, int) {
  if (threadIdx.x % 2)
    y[threadIdx.x] = __shfl_xor_sync(ALL_LANES, x[threadIdx.x], 1);
  else
    y[threadIdx.x] = float(__any_sync(ALL_LANES, x[threadIdx.x] > 0));
}
__global__ void too_few_for_a_named_barrier_kernel(const float* x, float* y, int) {
  named_barrier_wait(3, 96);  // of 64
  y[threadIdx.x] = x[threadIdx.x];
}
__global__ void endless_kernel(const float*, float* y, int) {
  int* flag = reinterpret_cast<int*>(y);
  if (threadIdx.x == 0) atomicExch(flag, 0);
  __syncthreads();
  while (atomicAdd(flag, 0) == 0) {
  }
}

__global__ void race_shared_kernel(const float* x, float* y, int) {
  __shared__ float values[64];
  values[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  const float a = values[63 - threadIdx.x];
  values[threadIdx.x] = a;  // before all have read
  __syncthreads();
  y[threadIdx.x] = values[threadIdx.x];
}
// A shuffle orders nothing; __syncwarp would.
__global__ void race_in_warp_kernel(const float* x, float* y, int) {
  __shared__ float values[64];
  values[threadIdx.x] = x[threadIdx.x];
  const float a = __shfl_xor_sync(ALL_LANES, x[threadIdx.x], 1);
  y[threadIdx.x] = values[threadIdx.x ^ 1] + a;
}
__global__ void race_of_blocks_kernel(const float* x, float* y, int) {
  y[threadIdx.x] = x[threadIdx.x] + float(blockIdx.x);
}
__global__ void race_of_reader_kernel(const float* x, float* y, int) {
  if (blockIdx.x == 0) y[threadIdx.x] = x[threadIdx.x];
  if (blockIdx.x == 1) y[64 + threadIdx.x] = y[threadIdx.x];
}
__global__ void race_with_atomic_kernel(const float* x, float* y, int) {
  __shared__ int count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  atomicAdd(&count, 1);
  y[threadIdx.x] = x[threadIdx.x] + float(count);
}
// The counter says who comes last, but no fence says that the others' values are there.
__global__ void no_fence_kernel(const float* x, float* y, int) {
  y[2 + blockIdx.x] = x[blockIdx.x];
  if (atomicAdd(reinterpret_cast<unsigned*>(y + 1), 1u) + 1 < gridDim.x) return;
  y[0] = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) y[0] += y[2 + b];
}
// A block that counts itself releases nothing without a fence, whoever acquires the count.
__global__ void counted_without_fence_kernel(const float* x, float* y, int) {
  unsigned* arrived = reinterpret_cast<unsigned*>(y);
  if (blockIdx.x == 0) {
    y[1] = x[0];
    atomicAdd(arrived, 1u);
  } else {
    while (load_acquire(arrived) == 0) {
    }
    y[2] = y[1];
  }
}
__global__ void copy_not_waited_for_kernel(const float* x, float* y, int) {
  __shared__ __align__(16) float values[64];
  copy_async<4>(values + threadIdx.x, x + threadIdx.x);
  commit_copies();
  y[threadIdx.x] = values[threadIdx.x];
}
__global__ void copy_without_barrier_kernel(const float* x, float* y, int) {
  __shared__ __align__(16) float values[64];
  copy_async<4>(values + threadIdx.x, x + threadIdx.x);
  commit_copies();
  wait_copies<0>();
  y[threadIdx.x] = values[threadIdx.x ^ 1];
}
__global__ void ended_block_kernel(const float* x, float* y, int) {
  __shared__ float mine[64];
  mine[threadIdx.x] = x[threadIdx.x];
  cluster_arrive();
  cluster_wait();
  if (cluster_rank() == 1) return;
  float a = 0;
  for (int i = 0; i < 3; ++i) {  // the other block has time to end
    a += shared_of(mine, 1)[threadIdx.x];
    __syncthreads();
  }
  y[threadIdx.x] = a;
}
__global__ void race_in_cluster_kernel(const float* x, float* y, int) {
  __shared__ float mine[64];
  mine[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[blockIdx.x * 64 + threadIdx.x] = shared_of(mine, cluster_rank() ^ 1)[threadIdx.x];
  cluster_arrive();
  cluster_wait();
}

const Kernels faults_kernels = {
    {"unwritten_shared", unwritten_shared_kernel},
    {"unwritten_global", unwritten_global_kernel},
    {"beyond_tensor", beyond_tensor_kernel},
    {"before_tensor", before_tensor_kernel},
    {"beyond_dynamic", beyond_dynamic_kernel},
    {"beyond_static", beyond_static_kernel},
    {"index", index_kernel},
    {"overflow", overflow_kernel},
    {"input_written", input_written_kernel},
    {"misaligned", misaligned_kernel},
    {"early_return", early_return_kernel},
    {"divergent_barrier", divergent_barrier_kernel},
    {"absent_lane", absent_lane_kernel},
    {"short_warp", short_warp_kernel},
    {"atomics_of_blocks", atomics_of_blocks_kernel},
    {"foreign_mask", foreign_mask_kernel},
    {"different_exchanges", different_exchanges_kernel},
    {"too_few_for_a_named_barrier", too_few_for_a_named_barrier_kernel},
    {"endless", endless_kernel},
    {"race_shared", race_shared_kernel},
    {"race_in_warp", race_in_warp_kernel},
    {"race_of_blocks", race_of_blocks_kernel},
    {"race_of_reader", race_of_reader_kernel},
    {"race_with_atomic", race_with_atomic_kernel},
    {"no_fence", no_fence_kernel},
    {"counted_without_fence", counted_without_fence_kernel},
    {"copy_not_waited_for", copy_not_waited_for_kernel},
    {"copy_without_barrier", copy_without_barrier_kernel},
    {"ended_block", ended_block_kernel},
    {"race_in_cluster", race_in_cluster_kernel},
};

TOYS(faults, faults_kernels)

}  // namespace segkernels::cuda
