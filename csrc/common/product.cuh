// Matrix products of a block of warps out of shared memory: one tile shape for all types.
//
// A warp owns 32 rows × 64 columns of the result, kept in 64 accumulators per lane. With g = lane / 4 and t =
// lane % 4 accumulator [i][j][e] is row 16i + g + 8·(e / 2), column 8j + 2t + e % 2: the layout of the tensor
// cores (mma.cuh), which the plain multiply-adds of float and double (exact, no TF32) share. Both operands
// lie [row][k] in shared memory, 64 bytes of k per row; rows are 80 bytes apart, so that neither kind of load
// meets a bank conflict.
#pragma once

#include "common/mma.cuh"

namespace segkernels::cuda {

constexpr int WARP_ROWS = 32, WARP_COLUMNS = 64;
template <class T>
constexpr int DEPTH = 64 / int(sizeof(T));  // k per stage
template <class T>
constexpr int PITCH = 80 / int(sizeof(T));

template <class T>
struct WarpProduct {
  acc_t<T> acc[2][8][4] = {};

  __device__ static int row(int i, int e) { return 16 * i + threadIdx.x % WARP / 4 + 8 * (e / 2); }
  __device__ static int column(int j, int e) { return 8 * j + 2 * (threadIdx.x % 4) + e % 2; }

  // += left · rightᵀ over one stage; left: [32][PITCH], right: [64][PITCH]
  __device__ void multiply(const T* left, const T* right) {
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int k = 0; k < DEPTH<T>; k += 16) {
        Vector<T, 2> a[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            a[i][e] = load<2>(left + (16 * i + g + 8 * (e % 2)) * PITCH<T> + k + 2 * t + 8 * (e / 2));
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          Vector<T, 2> b[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) b[e] = load<2>(right + (8 * j + g) * PITCH<T> + k + 2 * t + 8 * e);
#pragma unroll
          for (int i = 0; i < 2; ++i) mma_m16n8k16<T>(acc[i][j], a[i], b);
        }
      }
    } else {
      constexpr int V = 16 / int(sizeof(T));
#pragma unroll 1
      for (int k = 0; k < DEPTH<T>; k += V) {
        Vector<T, V> a[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = load<V>(left + (g + 8 * i) * PITCH<T> + k);
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const Vector<T, V> b = load<V>(right + (8 * j + 2 * t + e) * PITCH<T> + k);
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
              for (int v = 0; v < V; ++v) acc[i / 2][j][i % 2 * 2 + e] += a[i].at[v] * b.at[v];
          }
      }
    }
  }
};

}  // namespace segkernels::cuda
