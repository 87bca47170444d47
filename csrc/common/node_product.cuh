// Matrix products over pixels, nodes and channels, whose operands are of the accumulation type: what they
// share of their tiles.
//
// Both operands lie [row][k] in shared memory, DEPTH of k a stage. A warp owns 16 rows × 8·NJ columns of the
// result in the layout of the tensor cores (mma.cuh): accumulator [j][e] of lane 4g + t is row g + 8·(e / 2),
// column 8j + 2t + e % 2. float and double are multiplied and added plainly. For maps of 16-bit types the
// operands (residuals, assignments, coefficients) are still floats: each is split into two bfloat16, and
// three products on the tensor cores keep 16 bits of mantissa, sums in float. A bfloat16 of the map itself
// is one half already; three products are then enough for three halves of the other factor, all 24 bits.
#pragma once

#include <type_traits>

#include "common/product.cuh"

namespace segkernels::cuda {

template <class T>
constexpr int HALVES = sizeof(T) == 2 ? 2 : 0;  // of an operand; 0: it is not split
template <class T>
constexpr bool ONE_HALF = std::is_same_v<T, __nv_bfloat16>;
template <class T>
constexpr int HALVES_OF_MAP = ONE_HALF<T> ? 1 : HALVES<T>;  // of values of the map, as they are
template <class T>
constexpr int HALVES_BESIDE_MAP = ONE_HALF<T> ? 3 : HALVES<T>;  // of their factors

// A row of an operand in shared memory, one stage of k. Neither kind of load in NodeProduct meets a bank
// conflict.
template <class T, int SPLIT = HALVES<T>>
struct OperandRow;
template <class T>
struct OperandRow<T, 0> {
  using A = acc_t<T>;
  A at[PITCH<A>];

  template <int V>
  __device__ void put(int k, const Vector<A, V>& a) {
    store<V>(&at[k], a);
  }
  __device__ A get(int k) const { return at[k]; }
};
// The sum of the halves, the highest first. What is not finite is the last half alone, which takes part in
// one product: ∞ times a low half of the other factor would be NaN.
template <class T, int SPLIT>
struct OperandRow {
  using Half = __nv_bfloat16;
  Half at[3][DEPTH<float>];  // of one or two halves as well: so far apart, rows meet no bank conflict

  template <int V>
  __device__ void put(int k, const Vector<float, V>& a) {
    Vector<Half, V> half[SPLIT];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float most = widen(narrow<Half>(a.at[v]));
      const bool finite = most - most == 0;
      float rest = a.at[v];
#pragma unroll
      for (int i = 0; i < SPLIT; ++i) {
        half[i].at[v] = narrow<Half>(finite || i == SPLIT - 1 ? rest : 0.f);
        rest -= widen(half[i].at[v]);
      }
    }
#pragma unroll
    for (int i = 0; i < SPLIT; ++i) store<V>(&at[i][k], half[i]);
  }
  __device__ float get(int k) const {
    float sum = widen(at[SPLIT - 1][k]);
#pragma unroll
    for (int i = SPLIT - 2; i >= 0; --i) sum += widen(at[i][k]);
    return sum;
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
  template <int LEFT, int RIGHT>
  __device__ void multiply(const OperandRow<T, LEFT>* left, const OperandRow<T, RIGHT>* right) {
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    if constexpr (sizeof(T) == 2) {
      // Lane t takes k 4t … 4t + 3 for the tensor core's 2t, 2t + 1, 2t + 8, 2t + 9: any order of k will do.
      using Half = __nv_bfloat16;
      using Pair = Vector<Half, 2>;
      const auto pair = [](const Vector<Half, 4>& a, int i) { return Pair{{a.at[2 * i], a.at[2 * i + 1]}}; };
      Pair a[LEFT][4];
#pragma unroll
      for (int i = 0; i < LEFT; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) a[i][e] = pair(load<4>(&left[g + 8 * (e % 2)].at[i][4 * t]), e / 2);
#pragma unroll
      for (int j = 0; j < NJ; ++j) {
        Pair b[RIGHT][2];
#pragma unroll
        for (int i = 0; i < RIGHT; ++i)
#pragma unroll
          for (int e = 0; e < 2; ++e) b[i][e] = pair(load<4>(&right[8 * j + g].at[i][4 * t]), e);
        // the lowest products first, and none below the lowest half
#pragma unroll
        for (int order = (LEFT > RIGHT ? LEFT : RIGHT) - 1; order >= 0; --order)
#pragma unroll
          for (int i = LEFT - 1; i >= 0; --i)
            if (i <= order && order - i < RIGHT) mma_m16n8k16<Half>(acc[j], a[i], b[order - i]);
      }
    } else {
      constexpr int V = 16 / int(sizeof(A));
#pragma unroll 1
      for (int k = 0; k < DEPTH<A>; k += V) {
        Vector<A, V> a[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) a[i] = load<V>(&left[g + 8 * i].at[k]);
#pragma unroll
        for (int j = 0; j < NJ; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const Vector<A, V> b = load<V>(&right[8 * j + 2 * t + e].at[k]);
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
              for (int v = 0; v < V; ++v) acc[j][2 * i + e] += a[i].at[v] * b.at[v];
          }
      }
    }
  }
};

// A map [B, channels, H, W]; at null: there is none. vectors: 16 bytes of channels can be moved at once.
template <class T>
struct PixelMap {
  T* at;
  Strides strides;
  bool vectors;

  __device__ int64_t offset(int64_t image, int pixel, int columns) const {
    return image * strides.b + pixel / columns * strides.h + pixel % columns * strides.w;
  }
  __device__ bool channels_are_dense() const { return strides.c == 1; }
};

// What an operand is read from: channels of the pixels of a map, or of nodes [K, C].
template <class S>
struct Source {
  const S* at;
  int64_t stride;  // from channel to channel
  int channels;
  bool vectors;
};
template <class S>
__device__ inline Source<S> source_of(const PixelMap<const S>& map, int channels) {
  return {map.at, map.strides.c, channels, map.vectors};
}

// One stage of an operand of the product for maps of T on its way from global memory: fetched while the stage
// before is multiplied, then put into shared memory. One of [row][k] is channels, the other pixels or nodes.
template <class T, class S, bool CHANNELS_ARE_ROWS, int ROWS, int THREADS>
struct Operand {
  using A = acc_t<T>;
  static constexpr int WIDTH = sizeof(S) < sizeof(A) ? 8 : 16 / int(sizeof(A));
  static constexpr int SIZE = ROWS * DEPTH<A>,
                       EACH = (SIZE + WIDTH * THREADS - 1) / (WIDTH * THREADS) * WIDTH;
  A held[EACH];

  // offset(i): of pixel or node i, −1 where there is none; from channel c0 on; adjust(value, channel) → value
  template <class O, class F>
  __device__ void fetch(const Source<S>& from, O offset, int c0, F adjust) {
    each(from, [&](auto width, A* out, int row, int k) {
      constexpr int V = decltype(width)::value;
      const int c = c0 + (CHANNELS_ARE_ROWS ? row : k);
      const int64_t at = offset(CHANNELS_ARE_ROWS ? k : row);
      Vector<S, V> in = {};
      const bool there = c < from.channels && at >= 0;
      if (there) in = load<V>(from.at + at + c * from.stride);
#pragma unroll
      for (int v = 0; v < V; ++v) out[v] = there ? adjust(widen(in.at[v]), c + v) : A(0);
    });
  }
  // f(value) of each
  template <int SPLIT, class F>
  __device__ void put(const Source<S>& from, OperandRow<T, SPLIT>* tile, F f) {
    each(from, [&](auto width, const A* in, int row, int k) {
      constexpr int V = decltype(width)::value;
      Vector<A, V> out;
#pragma unroll
      for (int v = 0; v < V; ++v) out.at[v] = f(in[v]);
      if constexpr (!CHANNELS_ARE_ROWS) {
        tile[row].put(k, out);
      } else {
#pragma unroll
        for (int v = 0; v < V; ++v) tile[row + v].put(k, Vector<A, 1>{{out.at[v]}});
      }
    });
  }
  template <int SPLIT>
  __device__ void put(const Source<S>& from, OperandRow<T, SPLIT>* tile) {
    put(from, tile, [](A a) { return a; });
  }

 private:
  // f(width, its held values, row, k) over this thread's vectors of channels: neighbouring threads take
  // neighbours in memory
  template <class F>
  __device__ void each(const Source<S>& from, F f) {
    if (from.vectors)
      walk(std::integral_constant<int, WIDTH>(), CHANNELS_ARE_ROWS, f);
    else
      walk(std::integral_constant<int, 1>(), CHANNELS_ARE_ROWS == (from.stride == 1), f);
  }
  template <int V, class F>
  __device__ void walk(std::integral_constant<int, V> width, bool by_row, F f) {
    constexpr int VECTORS = SIZE / V, R = CHANNELS_ARE_ROWS ? V : 1, D = CHANNELS_ARE_ROWS ? 1 : V;
#pragma unroll
    for (int n = 0; n < (VECTORS + THREADS - 1) / THREADS; ++n) {
      const int e = threadIdx.x + n * THREADS;
      if (VECTORS % THREADS && e >= VECTORS) return;
      const int row = by_row ? e % (ROWS / R) : e / (DEPTH<A> / D);
      const int k = by_row ? e / (ROWS / R) : e % (DEPTH<A> / D);
      f(width, held + n * V, row * R, k * D);
    }
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

// The sizes of a call: `pixels` = H·W of an image of `columns` = W.
struct NodeShape {
  int pixels, columns, channels, nodes;
};

}  // namespace segkernels::cuda
