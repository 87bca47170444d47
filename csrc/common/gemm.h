// Matrix products of tiles that lie in the L2 cache: C (+)= A·B. Compiled once per instruction set (no
// include guard).
//
//   Fma<A>               on vectors, operands in the accumulation type A, taken where they lie
//   Narrow<half, tiles>  on AMX tiles (common/amx.h) or by dot products (common/dots.h), operands narrowed to
//                        bfloat16 or float16 on the way
//
// Both have the same face: left(view, M, K, scratch) and right(view, K, N, scratch) prepare an operand
// (packed() always copies it; left_at() and right_at() find what was prepared before), multiply() takes two
// of them, while a Session lives. An element of C is one sum over k in increasing order: it depends on
// neither M nor N nor the instruction set's blocks. Operands and C may be read, and C written, up to kTile
// rows and columns (rounded up) beyond M and N.

namespace segkernels {
namespace {
namespace SEGKERNELS_ISA {

constexpr int64_t kTile = 32;

template <class A>
struct View {  // element (i, j) at p[i * row + j * column]; one of the strides is 1
  const A* p;
  int64_t row, column;
};

template <class A>
struct Fma {
  using Acc = A;
  // A tile of C stays in registers, up to kVectors wide. An element of A is a load as a vector of B is: wide
  // and low tiles need fewest.
  static constexpr int64_t lanes = Vec<A>::lanes, kWidth = kVectors * lanes;
  // Rows of a tile: a row of B and an element of A are in registers beside it.
  static constexpr int64_t most_rows(int64_t vectors) {
    constexpr int64_t registers = SEGKERNELS_VECTOR_BYTES == 64 ? 32 : 16;
    return std::min<int64_t>(14, (registers - vectors - 1) / vectors);
  }
  static constexpr int64_t kPanelBytes = 32 * 1024;  // of B, in the L1 cache

  using Left = View<A>;
  struct Right {  // element (k, n) at p[n / kWidth * panel + k * row + n % kWidth]
    const A* p;
    int64_t panel, row;
  };

  static int64_t left_bytes(int64_t, int64_t) { return 0; }
  static int64_t right_bytes(int64_t k, int64_t n) { return round_up(n, kWidth) * (k + kTile) * sizeof(A); }

  static Left left(View<A> x, int64_t, int64_t, void*) { return x; }

  // Rows of B are taken as they lie; columns are transposed into panels.
  static Right right(View<A> x, int64_t k, int64_t n, void* scratch) {
    return x.column == 1 ? Right{x.p, kWidth, x.row} : packed(x, k, n, scratch);
  }
  static Right packed(View<A> x, int64_t k, int64_t n, void* scratch) {
    A* out = static_cast<A*>(scratch);
    for (int64_t j = 0; j < n; j += kWidth) {
      A* panel = out + j * k;
      const int64_t width = std::min(n - j, kWidth);
      if (x.column == 1)
        for (int64_t i = 0; i < k; ++i)
          std::memcpy(panel + i * kWidth, x.p + i * x.row + j, width * sizeof(A));
      else
        transpose_panel(x.p + j * x.column, x.column, k, width, panel);
    }
    return right_at(scratch, k);
  }
  static Right right_at(const void* packed, int64_t k) {
    return {static_cast<const A*>(packed), k * kWidth, kWidth};
  }
  static Left left_at(View<A> x, const void*) { return x; }
  struct Session {};

  // panel[i][j] = x[j][i], rows of x `step` apart.
  static void transpose_panel(const A* x, int64_t step, int64_t k, int64_t width, A* panel) {
    int64_t j = 0;
    for (; j + lanes <= width; j += lanes) {
      int64_t i = 0;
      for (; i + lanes <= k; i += lanes) {
        Vec<A> r[lanes];
#pragma GCC unroll 16
        for (int64_t l = 0; l < lanes; ++l) r[l] = load<A>(x + (j + l) * step + i);
        transpose(r);
#pragma GCC unroll 16
        for (int64_t l = 0; l < lanes; ++l) store(panel + (i + l) * kWidth + j, r[l]);
      }
      for (; i < k; ++i)
        for (int64_t l = 0; l < lanes; ++l) panel[i * kWidth + j + l] = x[(j + l) * step + i];
    }
    for (; j < width; ++j)
      for (int64_t i = 0; i < k; ++i) panel[i * kWidth + j] = x[j * step + i];
  }

  static void multiply(int64_t m, int64_t n, int64_t k, Left a, Right b, A* c, int64_t ldc, bool add,
                       Ahead ahead = {}) {
    for (int64_t j = 0; j < n; j += kWidth)
      by_vectors<kVectors>(ceil_div(std::min(n - j, kWidth), lanes), m, k, a,
                           Right{b.p + j / kWidth * b.panel, 0, b.row}, c + j, ldc, add, ahead);
  }

  template <int64_t kV>
  SEGKERNELS_INLINE void by_vectors(int64_t vectors, int64_t m, int64_t k, Left a, Right b, A* c, int64_t ldc,
                                    bool add, Ahead& ahead) {
    if (vectors == kV) return panel<kV>(m, k, a, b, c, ldc, add, ahead);
    if constexpr (kV > 1) by_vectors<kV - 1>(vectors, m, k, a, b, c, ldc, add, ahead);
  }

  template <int64_t kV>
  static void panel(int64_t m, int64_t k, Left a, Right b, A* c, int64_t ldc, bool add, Ahead& ahead) {
    constexpr int64_t kMost = most_rows(kV), kDepth = kPanelBytes / (kV * SEGKERNELS_VECTOR_BYTES);
    const int64_t parts = ceil_div(m, kMost);  // row blocks of nearly equal height
    for (int64_t l = 0; l == 0 || l < k; l += kDepth)
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t i = part * m / parts, rows = (part + 1) * m / parts - i;
        by_rows<kV, kMost>(rows, std::min(kDepth, k - l),
                           Left{a.p + i * a.row + l * a.column, a.row, a.column}, b.p + l * b.row, b.row,
                           c + i * ldc, ldc, add || l > 0, ahead);
      }
  }

  template <int64_t kV, int64_t kMost>
  SEGKERNELS_INLINE void by_rows(int64_t rows, int64_t k, Left a, const A* b, int64_t ldb, A* c, int64_t ldc,
                                 bool add, Ahead& ahead) {
    if (rows == kMost) return tile<kV, kMost>(k, a, b, ldb, c, ldc, add, ahead);
    if constexpr (kMost > 1) by_rows<kV, kMost - 1>(rows, k, a, b, ldb, c, ldc, add, ahead);
  }

  template <int64_t kV, int64_t kM>
  static void tile(int64_t k, Left a, const A* b, int64_t ldb, A* c, int64_t ldc, bool add, Ahead& ahead) {
    Vec<A> sum[kM][kV];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kM; ++i)
#pragma GCC unroll 4
      for (int64_t v = 0; v < kV; ++v) sum[i][v] = add ? load(c + i * ldc + v * lanes) : splat(A(0));
    for (int64_t l = 0; l < k; ++l, b += ldb, a.p += a.column) {
      if (l % 2) ahead.fetch();
      Vec<A> bl[kV];
#pragma GCC unroll 4
      for (int64_t v = 0; v < kV; ++v) bl[v] = load(b + v * lanes);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kM; ++i) {
        const Vec<A> ai = splat(a.p[i * a.row]);
#pragma GCC unroll 4
        for (int64_t v = 0; v < kV; ++v) sum[i][v] = fma(ai, bl[v], sum[i][v]);
      }
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < kM; ++i)
#pragma GCC unroll 4
      for (int64_t v = 0; v < kV; ++v) store(c + i * ldc + v * lanes, sum[i][v]);
  }
};

#if SEGKERNELS_VECTOR_BYTES == 64
template <bool kHalf, bool kTiles>
struct Narrow {
  static_assert(kTiles || !kHalf, "dot products are of bfloat16 alone");
  using Acc = float;
  using Left = const uint16_t*;
  using Right = const uint16_t*;

  static int64_t left_bytes(int64_t m, int64_t k) { return 2 * packing::left_size(m, k); }
  static int64_t right_bytes(int64_t k, int64_t n) { return 2 * packing::right_size(k, n); }

  static Left left(View<float> x, int64_t m, int64_t k, void* scratch) {
    uint16_t* out = static_cast<uint16_t*>(scratch);
    if (x.column == 1)
      packing::left<kHalf>(m, k, x.p, x.row, out);
    else
      packing::left_transposed<kHalf>(m, k, x.p, x.column, out);
    return out;
  }
  static Right right(View<float> x, int64_t k, int64_t n, void* scratch) {
    uint16_t* out = static_cast<uint16_t*>(scratch);
    if (x.column == 1)
      packing::right<kHalf>(k, n, x.p, x.row, out);
    else
      packing::right_transposed<kHalf>(k, n, x.p, x.column, out);
    return out;
  }
  static Right packed(View<float> x, int64_t k, int64_t n, void* scratch) { return right(x, k, n, scratch); }
  static Right right_at(const void* packed, int64_t) { return static_cast<Right>(packed); }
  static Left left_at(View<float>, const void* packed) { return static_cast<Left>(packed); }
  struct NoTiles {};
  using Session = std::conditional_t<kTiles, amx::Tiles, NoTiles>;

  static void multiply(int64_t m, int64_t n, int64_t k, Left a, Right b, float* c, int64_t ldc, bool add) {
    if constexpr (kTiles)
      amx::multiply<kHalf>(m, n, k, a, b, c, ldc, add);
    else
      dots::multiply(m, n, k, a, b, c, ldc, add);
  }
};
#endif

// Calls f with what multiplies numbers of type T on an engine, as a type.
template <class T, class F>
auto by_engine(Engine engine, const F& f) {
#if SEGKERNELS_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 2)
    if (engine == Engine::tiles) return f(Narrow<std::is_same_v<T, float16>, true>());
  if constexpr (std::is_same_v<T, bfloat16>)
    if (engine == Engine::dots) return f(Narrow<false, false>());
#endif
  return f(Fma<acc_t<T>>());
}

}  // namespace SEGKERNELS_ISA
}  // namespace
}  // namespace segkernels
