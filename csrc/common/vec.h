// Vectors of one instruction set; included once per set by common/foreach_isa.h (no include guard).
//
//   Vec<A>                     `lanes` numbers of the accumulation type A (float or double), with + - * and
//   fma, max, min load<A>(p), store(p, v)    from and to any storage type T: converted on the way, rounded to
//   nearest even, NaN kept load<A>(p, m), store(p, v, m), fma(a, b, c, m)    only the lanes whose bit is set
//   in m; memory of the others is not
//                              touched, load gives 0 there and fma gives c
//   Pair<T>, load2, store2     2·lanes consecutive numbers of T in an order private to T (bfloat16: even,
//   then odd
//                              positions, which costs one instruction a vector). Numbers that meet must come
//                              by load2<T>.
//   sum(v), sums(r), maxima(r)  of all lanes, in a fixed order; of each of `lanes` vectors
//   transpose(r)               of `lanes` vectors
//   shuffle(a, b, of)          lane l is lane of(l) of a and b beside each other

namespace segkernels {
namespace {
namespace SEGKERNELS_ISA {

using Mask = uint32_t;  // bit i: lane i

template <class A>
struct Vec {
  typedef A Native __attribute__((vector_size(SEGKERNELS_VECTOR_BYTES)));
  static constexpr int64_t lanes = SEGKERNELS_VECTOR_BYTES / sizeof(A);
  Native v;
};
constexpr int64_t kVectors = SEGKERNELS_VECTOR_BYTES == 64 ? 4 : 2;  // of a tile of results, in registers
using Vf = Vec<float>;
using Vd = Vec<double>;

// Integers as wide as a float vector, and half as wide.
typedef uint32_t U32 __attribute__((vector_size(SEGKERNELS_VECTOR_BYTES)));
typedef int32_t I32 __attribute__((vector_size(SEGKERNELS_VECTOR_BYTES)));
typedef uint16_t U16 __attribute__((vector_size(SEGKERNELS_VECTOR_BYTES / 2)));

template <class A>
SEGKERNELS_INLINE Vec<A> splat(A a) {
  return {a - typename Vec<A>::Native{}};
}
template <class A>
SEGKERNELS_INLINE Vec<A> operator+(Vec<A> a, Vec<A> b) {
  return {a.v + b.v};
}
template <class A>
SEGKERNELS_INLINE Vec<A> operator-(Vec<A> a, Vec<A> b) {
  return {a.v - b.v};
}
template <class A>
SEGKERNELS_INLINE Vec<A> operator*(Vec<A> a, Vec<A> b) {
  return {a.v * b.v};
}
// NaN in a is kept: max(NaN, 0) = NaN, as torch's relu.
template <class A>
SEGKERNELS_INLINE Vec<A> max(Vec<A> a, Vec<A> b) {
  return {a.v < b.v ? b.v : a.v};
}
template <class A>
SEGKERNELS_INLINE Vec<A> min(Vec<A> a, Vec<A> b) {
  return {a.v > b.v ? b.v : a.v};
}
template <class A>
SEGKERNELS_INLINE A sum(Vec<A> a) {
  A s = 0;
  for (int i = 0; i < Vec<A>::lanes; ++i) s += a.v[i];
  return s;
}

// The lanes [first, last), clipped.
template <class A>
SEGKERNELS_INLINE Mask lane_range(int64_t first, int64_t last) {
  constexpr int64_t n = Vec<A>::lanes;
  first = first < 0 ? 0 : first > n ? n : first;
  last = last < first ? first : last > n ? n : last;
  return Mask((uint64_t(1) << last) - (uint64_t(1) << first));
}
template <class A>
constexpr Mask all_lanes = Mask((uint64_t(1) << Vec<A>::lanes) - 1);

// For every lane l, the lane of(l) of two vectors beside each other. Indices made at run time would cost more
// than what they are for.
template <class A, class F, int64_t... l>
SEGKERNELS_INLINE Vec<A> shuffle(Vec<A> a, Vec<A> b, F of, std::integer_sequence<int64_t, l...>) {
  typedef std::conditional_t<sizeof(A) == 4, int32_t, int64_t> I;
  typedef I Index __attribute__((vector_size(SEGKERNELS_VECTOR_BYTES)));
  constexpr Index lanes = {I(of(l))...};
  return {__builtin_shuffle(a.v, b.v, lanes)};
}
template <class A, class F>
SEGKERNELS_INLINE Vec<A> shuffle(Vec<A> a, Vec<A> b, F of) {
  return shuffle(a, b, of, std::make_integer_sequence<int64_t, Vec<A>::lanes>());
}

// r[i][j] ↔ r[j][i] by exchanging blocks of s = 1, 2, 4, … lanes.
template <int64_t s = 1, class A>
SEGKERNELS_INLINE void transpose(Vec<A> r[Vec<A>::lanes]) {
  constexpr int64_t n = Vec<A>::lanes;
#pragma GCC unroll 16
  for (int64_t i = 0; i < n; ++i)
    if (!(i & s)) {
      const Vec<A> a = r[i], b = r[i + s];
      r[i] = shuffle(a, b, [](int64_t l) { return l & s ? n + l - s : l; });
      r[i + s] = shuffle(a, b, [](int64_t l) { return l & s ? n + l : l + s; });
    }
  if constexpr (2 * s < n) transpose<2 * s>(r);
}

struct Sum {
  template <class A>
  SEGKERNELS_INLINE Vec<A> of(Vec<A> a, Vec<A> b) {
    return a + b;
  }
};
struct Maximum {
  template <class A>
  SEGKERNELS_INLINE Vec<A> of(Vec<A> a, Vec<A> b) {
    return max(a, b);
  }
};

// Each of as many vectors as there are lanes reduced to one number, in a fixed order: lane i of the result is
// that of r[i].
template <class Reduction, int64_t s, class A>
SEGKERNELS_INLINE Vec<A> reduced(Vec<A> r[2 * s]) {
  constexpr int64_t n = Vec<A>::lanes;
#pragma GCC unroll 8
  for (int64_t i = 0; i < s; ++i)
    r[i] = Reduction::of(shuffle(r[i], r[i + s], [](int64_t l) { return l & s ? n + l : l; }),
                         shuffle(r[i], r[i + s], [](int64_t l) { return l & s ? n + l - s : l + s; }));
  if constexpr (s > 1) return reduced<Reduction, s / 2>(r);
  return r[0];
}
template <class A>
SEGKERNELS_INLINE Vec<A> sums(Vec<A> r[Vec<A>::lanes]) {
  return reduced<Sum, Vec<A>::lanes / 2>(r);
}
template <class A>
SEGKERNELS_INLINE Vec<A> maxima(Vec<A> r[Vec<A>::lanes]) {
  return reduced<Maximum, Vec<A>::lanes / 2>(r);
}

// -- fma ------------------------------------------------------------------------------------------

#if SEGKERNELS_VECTOR_BYTES == 64
SEGKERNELS_INLINE Vf fma(Vf a, Vf b, Vf c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
SEGKERNELS_INLINE Vd fma(Vd a, Vd b, Vd c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
SEGKERNELS_INLINE Vf fma(Vf a, Vf b, Vf c, Mask m) {
  return {_mm512_mask3_fmadd_ps(a.v, b.v, c.v, __mmask16(m))};
}
SEGKERNELS_INLINE Vd fma(Vd a, Vd b, Vd c, Mask m) {
  return {_mm512_mask3_fmadd_pd(a.v, b.v, c.v, __mmask8(m))};
}
#else
#if SEGKERNELS_VECTOR_BYTES == 32
SEGKERNELS_INLINE Vf fma(Vf a, Vf b, Vf c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
SEGKERNELS_INLINE Vd fma(Vd a, Vd b, Vd c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
#else
template <class A>
SEGKERNELS_INLINE Vec<A> fma(Vec<A> a, Vec<A> b, Vec<A> c) {
  return {a.v * b.v + c.v};
}
#endif

// All bits of the lanes in m.
SEGKERNELS_INLINE I32 select_lanes(Mask m, float) {
  U32 bit;
  for (int i = 0; i < Vf::lanes; ++i) bit[i] = 1u << i;
  return ((U32{} + m) & bit) != 0;
}
SEGKERNELS_INLINE auto select_lanes(Mask m, double) {
  typedef uint64_t U64 __attribute__((vector_size(SEGKERNELS_VECTOR_BYTES)));
  U64 bit;
  for (int i = 0; i < Vd::lanes; ++i) bit[i] = uint64_t(1) << i;
  return ((U64{} + m) & bit) != 0;
}
template <class A>
SEGKERNELS_INLINE Vec<A> fma(Vec<A> a, Vec<A> b, Vec<A> c, Mask m) {
  return {select_lanes(m, A()) ? fma(a, b, c).v : c.v};
}
#endif

// -- conversion of one vector ---------------------------------------------------------------------

SEGKERNELS_INLINE Vf widen(U16 h, bfloat16) { return {(Vf::Native)(__builtin_convertvector(h, U32) << 16)}; }

// The bits of a rounded to bfloat16 (nearest even, NaN made quiet), in the upper half of each lane.
SEGKERNELS_INLINE U32 round_to_bfloat16(Vf a) {
  U32 u = (U32)a.v;
  U32 rounded = u + (0x7fff + ((u >> 16) & 1));
  return (a.v != a.v) ? (u | 0x400000) : rounded;
}
SEGKERNELS_INLINE U16 narrow(Vf a, bfloat16) {
  return __builtin_convertvector(round_to_bfloat16(a) >> 16, U16);
}

#if SEGKERNELS_VECTOR_BYTES == 64
SEGKERNELS_INLINE Vf widen(U16 h, float16) { return {_mm512_cvtph_ps((__m256i)h)}; }
SEGKERNELS_INLINE U16 narrow(Vf a, float16) { return (U16)_mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT); }
#elif SEGKERNELS_VECTOR_BYTES == 32
SEGKERNELS_INLINE Vf widen(U16 h, float16) { return {_mm256_cvtph_ps((__m128i)h)}; }
SEGKERNELS_INLINE U16 narrow(Vf a, float16) { return (U16)_mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT); }
#else
// By exponent shift: the product with 2^112 (2^-112) moves between the two biases and handles subnormals
// exactly.
SEGKERNELS_INLINE Vf widen(U16 h, float16) {
  U32 u = __builtin_convertvector(h, U32);
  Vf::Native magnitude = (Vf::Native)((u & 0x7fff) << 13) * 0x1p112f;
  U32 bits = (U32)magnitude;
  bits = ((u & 0x7c00) == 0x7c00) ? (((u & 0x7fff) << 13) | 0x7f800000) : bits;
  return {(Vf::Native)(bits | ((u & 0x8000) << 16))};
}
SEGKERNELS_INLINE U16 narrow(Vf a, float16) {
  U32 u = (U32)a.v, sign = (u >> 16) & 0x8000, m = u & 0x7fffffff;
  U32 normal = (m - 0x38000000 + 0xfff + ((m >> 13) & 1)) >> 13;
  U32 subnormal = (U32)((Vf::Native)m + 0.5f) - 0x3f000000;  // 0.5 has the ulp 2^-24 of float16's subnormals
  U32 h = (m < 0x38800000) ? subnormal : normal;
  h = (m >= 0x477ff000) ? (U32{} + 0x7c00) : h;
  h = (m > 0x7f800000) ? (0x7e00 | ((m >> 13) & 0x3ff)) : h;
  return __builtin_convertvector(h | sign, U16);
}
#endif

// -- load, store ----------------------------------------------------------------------------------

template <class A>
SEGKERNELS_INLINE Vec<A> load(const A* p) {
  Vec<A> a;
  __builtin_memcpy(&a.v, p, sizeof a.v);
  return a;
}
template <class A>
SEGKERNELS_INLINE void store(A* p, Vec<A> a) {
  __builtin_memcpy(p, &a.v, sizeof a.v);
}
template <class A, class T, class = std::enable_if_t<!std::is_same_v<A, T>>>
SEGKERNELS_INLINE Vec<A> load(const T* p) {
  U16 h;
  __builtin_memcpy(&h, p, sizeof h);
  return widen(h, T());
}
template <class T, class = std::enable_if_t<sizeof(T) == 2>>
SEGKERNELS_INLINE void store(T* p, Vf a) {
  U16 h = narrow(a, T());
  __builtin_memcpy(p, &h, sizeof h);
}

#if SEGKERNELS_VECTOR_BYTES == 64
template <class A>
SEGKERNELS_INLINE Vec<A> load(const float* p, Mask m) {
  return {_mm512_maskz_loadu_ps(__mmask16(m), p)};
}
template <class A>
SEGKERNELS_INLINE Vec<A> load(const double* p, Mask m) {
  return {_mm512_maskz_loadu_pd(__mmask8(m), p)};
}
template <class A, class T>
SEGKERNELS_INLINE Vec<A> load(const T* p, Mask m) {
  return widen((U16)_mm256_maskz_loadu_epi16(__mmask16(m), p), T());
}
SEGKERNELS_INLINE void store(float* p, Vf a, Mask m) { _mm512_mask_storeu_ps(p, __mmask16(m), a.v); }
SEGKERNELS_INLINE void store(double* p, Vd a, Mask m) { _mm512_mask_storeu_pd(p, __mmask8(m), a.v); }
template <class T, class = std::enable_if_t<sizeof(T) == 2>>
SEGKERNELS_INLINE void store(T* p, Vf a, Mask m) {
  _mm256_mask_storeu_epi16(p, __mmask16(m), (__m256i)narrow(a, T()));
}
#else
template <class A, class T>
SEGKERNELS_INLINE Vec<A> load(const T* p, Mask m) {
  if (m == all_lanes<A>) return load<A>(p);
  T part[Vec<A>::lanes] = {};
  for (int i = 0; i < Vec<A>::lanes; ++i)
    if (m >> i & 1) part[i] = p[i];
  return load<A>(part);
}
template <class T, class A>
SEGKERNELS_INLINE void store(T* p, Vec<A> a, Mask m) {
  if (m == all_lanes<A>) return store(p, a);
  T part[Vec<A>::lanes];
  store(part, a);
  for (int i = 0; i < Vec<A>::lanes; ++i)
    if (m >> i & 1) p[i] = part[i];
}
#endif

// -- pairs ----------------------------------------------------------------------------------------

template <class T>
struct Pair {
  using A = acc_t<T>;
  static constexpr int64_t lanes = 2 * Vec<A>::lanes;
  Vec<A> lo, hi;
};

template <class T>
SEGKERNELS_INLINE Pair<T> load2(const T* p) {
  constexpr int64_t n = Pair<T>::lanes / 2;
  if constexpr (std::is_same_v<T, bfloat16>) {
    U32 both;
    __builtin_memcpy(&both, p, sizeof both);
    return {{(Vf::Native)(both << 16)}, {(Vf::Native)(both & 0xffff0000)}};
  } else {
    return {load<acc_t<T>>(p), load<acc_t<T>>(p + n)};
  }
}
template <class T>
SEGKERNELS_INLINE void store2(T* p, Pair<T> a) {
  constexpr int64_t n = Pair<T>::lanes / 2;
  if constexpr (std::is_same_v<T, bfloat16>) {
    U32 both = (round_to_bfloat16(a.lo) >> 16) | (round_to_bfloat16(a.hi) & 0xffff0000);
    __builtin_memcpy(p, &both, sizeof both);
  } else {
    store(p, a.lo);
    store(p + n, a.hi);
  }
}

// The first `count` < Pair<T>::lanes numbers; the rest of a loaded pair is 0.
template <class T>
SEGKERNELS_INLINE Pair<T> load2(const T* p, int64_t count) {
  constexpr int64_t n = Pair<T>::lanes / 2;
  if constexpr (std::is_same_v<T, bfloat16>) {
    bfloat16 part[2 * n] = {};
    __builtin_memcpy(part, p, count * sizeof(T));
    return load2(part);
  } else {
    return {load<acc_t<T>>(p, lane_range<acc_t<T>>(0, count)),
            load<acc_t<T>>(p + n, lane_range<acc_t<T>>(0, count - n))};
  }
}
template <class T>
SEGKERNELS_INLINE void store2(T* p, Pair<T> a, int64_t count) {
  constexpr int64_t n = Pair<T>::lanes / 2;
  if constexpr (std::is_same_v<T, bfloat16>) {
    bfloat16 part[2 * n];
    store2(part, a);
    __builtin_memcpy(p, part, count * sizeof(T));
  } else {
    store(p, a.lo, lane_range<acc_t<T>>(0, count));
    store(p + n, a.hi, lane_range<acc_t<T>>(0, count - n));
  }
}

}  // namespace SEGKERNELS_ISA
}  // namespace
}  // namespace segkernels
