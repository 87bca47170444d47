// What encode does beside the assignment: codewords to a quadratic form, sums to residuals, and back. Row by
// row of [K, C]. Compiled once per instruction set (no include guard).

#include "common/assignment_kernels.h"

namespace segkernels {
namespace {
namespace SEGKERNELS_ISA {

using namespace encoding;

// c̃, p, r, b of codeword k; the centre is known.
template <class A>
void quadratic_row(const Codewords<A>& n, int64_t k) {
  const A* given = n.codewords + k * n.C;
  A *c = n.c + k * n.step, *p = n.p + k * n.step;
  for (int64_t i = 0; i < n.C; ++i) {
    c[i] = given[i] - n.centre[i];
    p[i] = -2 * n.s[k] * c[i];
  }
  n.r[k] = n.s[k] - n.shared;
  n.b[k] = n.s[k] * dot(round_up(n.C, Vec<A>::lanes), c, c);
}

// e and m of one codeword of one image, out of the parts' sums.
template <class T>
void residual_row(const ResidualSums<T>& n, int64_t image, int64_t k, acc_t<T>* row) {
  using A = acc_t<T>;
  const int64_t C = n.codewords.C, step = n.codewords.step, at = image * n.K + k;
  const A m = n.m[at] = sum_parts(n.masses, n.splits, n.K, image, k);
  sum_parts(n.sums, n.splits, n.rows, step, image, k, row);
  const A* c = n.codewords.c + k * step;
  for (int64_t i = 0; i < C; i += Vec<A>::lanes)
    store(n.e + at * C + i, fma(splat(-m), load(c + i), load(static_cast<const A*>(row + i))),
          lane_range<A>(0, C - i));
}

// h = de and t of one codeword of one image.
template <class T>
void cotangent_row(const Codewords<acc_t<T>>& n, const T* de, int64_t k, acc_t<T>* h, acc_t<T>* t) {
  using A = acc_t<T>;
  for (int64_t i = 0; i < n.C; i += Vec<A>::lanes) store(h + i, load<A>(de + i, lane_range<A>(0, n.C - i)));
  *t = -dot(round_up(n.C, Vec<A>::lanes), n.c + k * n.step, static_cast<const A*>(h));
}

// dc and ds of one codeword.
template <class A>
void gradient_row(const CodewordGradients<A>& n, int64_t k, A* a1) {
  const int64_t C = n.codewords.C, step = n.codewords.step, width = round_up(C, Vec<A>::lanes);
  const A a0 = sum_parts(n.a0, n.parts, n.K, 0, k), a2 = sum_parts(n.a2, n.parts, n.K, 0, k);
  sum_parts(n.a1, n.parts, n.rows, step, 0, k, a1);
  const A *c = n.codewords.c + k * step, s = n.codewords.s[k];
  if (n.ds) n.ds[k] = a2 - 2 * dot(width, c, static_cast<const A*>(a1)) + dot(width, c, c) * a0;
  if (!n.dc) return;
  for (int64_t i = 0; i < C; ++i) a1[i] = -2 * s * (a1[i] - c[i] * a0);
  for (int64_t image = 0; image < n.B; ++image) {
    const A *h = n.h + (image * n.rows + k) * step, m = n.m[image * n.K + k];
    for (int64_t i = 0; i < C; ++i) a1[i] -= m * h[i];
  }
  std::copy_n(a1, C, n.dc + k * C);
}

}  // namespace SEGKERNELS_ISA
}  // namespace
}  // namespace segkernels
