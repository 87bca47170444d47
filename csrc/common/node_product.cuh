// Matrix products over pixels, nodes and channels, whose operands are of the accumulation type: what they
// share of their tiles.
//
// Both operands lie [row][k] in shared memory, DEPTH of k a stage. A warp owns 16 rows × 8·NJ columns of the
// result in the layout of the tensor cores (mma.cuh): accumulator [j][e] of lane 4g + t is row g + 8·(e / 2),
// column 8j + 2t + e % 2. float and double are multiplied and added plainly. For maps of 16-bit types the
// operands (residuals, assignments, coefficients) are still floats: each is split into two bfloat16, and
// three products on the tensor cores keep 16 bits of mantissa, sums in float.
#pragma once

#include "common/product.cuh"

namespace segkernels::cuda {

// A pair of floats as a ≈ high + low. `all` is high with what is not finite, which takes part in one product
// alone: ∞ times the low part of the other factor would be NaN.
struct SplitPair {
  Vector<__nv_bfloat16, 2> all, high, low;

  __device__ void split(const float* pair) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      all.at[e] = narrow<__nv_bfloat16>(pair[e]);
      const float rounded = widen(all.at[e]);
      const bool finite = rounded - rounded == 0;
      high.at[e] = finite ? all.at[e] : narrow<__nv_bfloat16>(0.f);
      low.at[e] = narrow<__nv_bfloat16>(finite ? pair[e] - rounded : 0.f);
    }
  }
};

template <class T, int NJ>
struct NodeProduct {
  using A = acc_t<T>;
  static constexpr int ROWS = 16, COLUMNS = 8 * NJ;
  A acc[NJ][4] = {};

  __device__ static int row(int e) { return threadIdx.x % WARP / 4 + 8 * (e / 2); }
  __device__ static int column(int j, int e) { return 8 * j + 2 * (threadIdx.x % 4) + e % 2; }

  // += left · rightᵀ over one stage
  __device__ void multiply(const A (*left)[PITCH<A>], const A (*right)[PITCH<A>]) {
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    if constexpr (sizeof(T) == 2) {
      // Lane t takes k 4t … 4t + 3 for the tensor core's 2t, 2t + 1, 2t + 8, 2t + 9: any order of k will do.
      Vector<__nv_bfloat16, 2> a[4], a_high[4], a_low[4];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const Vector<float, 4> in = load<4>(&left[g + 8 * e][4 * t]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          SplitPair pair;
          pair.split(&in.at[2 * half]);
          a[e + 2 * half] = pair.all, a_high[e + 2 * half] = pair.high, a_low[e + 2 * half] = pair.low;
        }
      }
#pragma unroll
      for (int j = 0; j < NJ; ++j) {
        const Vector<float, 4> in = load<4>(&right[8 * j + g][4 * t]);
        Vector<__nv_bfloat16, 2> b[2], b_high[2], b_low[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          SplitPair pair;
          pair.split(&in.at[2 * half]);
          b[half] = pair.all, b_high[half] = pair.high, b_low[half] = pair.low;
        }
        mma_m16n8k16<__nv_bfloat16>(acc[j], a_low, b_high);
        mma_m16n8k16<__nv_bfloat16>(acc[j], a_high, b_low);
        mma_m16n8k16<__nv_bfloat16>(acc[j], a, b);
      }
    } else {
      constexpr int V = 16 / int(sizeof(A));
#pragma unroll
      for (int k = 0; k < DEPTH<A>; k += V) {
        Vector<A, V> a[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) a[i] = load<V>(&left[g + 8 * i][k]);
#pragma unroll
        for (int j = 0; j < NJ; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const Vector<A, V> b = load<V>(&right[8 * j + 2 * t + e][k]);
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
              for (int v = 0; v < V; ++v) acc[j][2 * i + e] += a[i].at[v] * b.at[v];
          }
      }
    }
  }
};

// One stage of an operand on its way from global memory: fetched while the stage before is multiplied, then
// put into shared memory. by_row: neighbouring threads take neighbouring rows, else neighbouring k.
template <class A, int ROWS, int THREADS>
struct Operand {
  static constexpr int SIZE = ROWS * DEPTH<A>, EACH = (SIZE + THREADS - 1) / THREADS;
  A held[EACH];

  // f(held value, row, k) over those of this thread
  template <class F>
  __device__ void each(bool by_row, F f) {
#pragma unroll
    for (int n = 0; n < EACH; ++n) {
      const int e = threadIdx.x + n * THREADS;
      if (SIZE % THREADS && e >= SIZE) return;
      f(held[n], by_row ? e % ROWS : e / DEPTH<A>, by_row ? e / ROWS : e % DEPTH<A>);
    }
  }
  // value(row, k); zero where nothing is
  template <class F>
  __device__ void fetch(bool by_row, F value) {
    each(by_row, [&](A& a, int row, int k) { a = value(row, k); });
  }
  __device__ void put(A (*tile)[PITCH<A>], bool by_row) {
    each(by_row, [&](A a, int row, int k) { tile[row][k] = a; });
  }
  __device__ void put_squares(A (*tile)[PITCH<A>], bool by_row) {
    each(by_row, [&](A a, int row, int k) { tile[row][k] = a * a; });
  }
};

// f(row, column) over [0, rows) × [0, columns), rows ≤ ROWS, by the whole block; by_row as above.
template <int ROWS, int THREADS, class F>
__device__ inline void for_each(bool by_row, int rows, int columns, F f) {
  if (by_row) {
    for (int e = threadIdx.x; e < ROWS * columns; e += THREADS)
      if (e % ROWS < rows) f(e % ROWS, e / ROWS);
  } else {
    for (int row = threadIdx.x / WARP; row < rows; row += THREADS / WARP)
      for (int column = threadIdx.x % WARP; column < columns; column += WARP) f(row, column);
  }
}

// A map [B, channels, H, W]; at null: there is none.
template <class T>
struct PixelMap {
  T* at;
  Strides strides;

  __device__ int64_t offset(int64_t image, int pixel, int columns) const {
    return image * strides.b + pixel / columns * strides.h + pixel % columns * strides.w;
  }
  __device__ bool channels_are_dense() const { return strides.c == 1; }
};

// The sizes of a call: `pixels` = H·W of an image of `columns` = W.
struct NodeShape {
  int pixels, columns, channels, nodes;
};

}  // namespace segkernels::cuda
