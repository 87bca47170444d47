// e^a of vectors for a ≤ 0, as a softmax needs it: within two units in the last place, 0 where the result would
// not be a normal number, NaN kept. Compiled once per instruction set (no include guard).

namespace segkernels {
namespace {
namespace SEGKERNELS_ISA {

template <class A>
struct Exponent;
template <>
struct Exponent<float> {
  using Bits = int32_t;
  static constexpr float least = -87.3f;  // ln of the smallest normal number, rounded up
  static constexpr float to_integer = 0x1.8p23f, ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
  static constexpr int mantissa = 23, terms = 7;
};
template <>
struct Exponent<double> {
  using Bits = int64_t;
  static constexpr double least = -708.3;
  static constexpr double to_integer = 0x1.8p52, ln2_high = 0x1.62e42fefa38p-1, ln2_low = 0x1.ef35793c7673p-45;
  static constexpr int mantissa = 52, terms = 13;
};

// e^a = 2^n e^r, n the integer nearest to a / ln 2, |r| ≤ ln 2 / 2: the series of e^r.
template <class A>
SEGKERNELS_INLINE Vec<A> exp_of_negative(Vec<A> a) {
  using E = Exponent<A>;
  typedef typename E::Bits Bits __attribute__((vector_size(SEGKERNELS_VECTOR_BYTES)));
  const Vec<A> x = max(a, splat(E::least));
  const Vec<A> shifted = fma(x, splat(A(1.442695040888963407)), splat(E::to_integer));
  const Vec<A> n = shifted - splat(E::to_integer);
  const Vec<A> r = fma(n, splat(-E::ln2_low), fma(n, splat(-E::ln2_high), x));
  Vec<A> series = splat(A(1));
#pragma GCC unroll 16
  for (int i = E::terms; i > 0; --i) series = fma(series, r * splat(A(1) / A(i)), splat(A(1)));
  const Bits power = (Bits)shifted.v << E::mantissa;
  const Vec<A> result = {(typename Vec<A>::Native)((Bits)series.v + power)};
  // a NaN's bits are spoilt by the power; series keeps it
  return {series.v != series.v ? series.v : a.v < splat(E::least).v ? splat(A(0)).v : result.v};
}

}  // namespace SEGKERNELS_ISA
}  // namespace
}  // namespace segkernels
