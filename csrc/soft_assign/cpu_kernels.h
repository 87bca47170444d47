// What soft_assign does beside the assignment: nodes and scales to a quadratic form, sums to nodes, and back.
// Row by row of [K, C]. Compiled once per instruction set (no include guard).

#include "common/assignment_kernels.h"

namespace segkernels {
namespace {
namespace SEGKERNELS_ISA {

using namespace soft_assignment;

// centre and shared = min_k 1/s².
template <class A>
void common_rows(const Nodes<A>& n, int64_t K) {
  median_node(n.anchors, K, n.C, n.centre);
  for (int64_t c = 0; c < n.C; c += Vec<A>::lanes) {
    const Mask m = lane_range<A>(0, n.C - c);
    Vec<A> most = splat(A(0));
    for (int64_t k = 0; k < K; ++k) {
      const Vec<A> s = load<A>(n.scales + k * n.C + c, m);
      most = max(s * s, most);
    }
    store(n.shared + c, Vec<A>{splat(A(1)).v / most.v}, m);
  }
}

// w̃, g = 1/s², p, r, b of node k; centre and shared are known.
template <class A>
void quadratic_row(const Nodes<A>& n, int64_t k) {
  const A *w = n.anchors + k * n.C, *s = n.scales + k * n.C;
  A *wt = n.w + k * n.step, *g = n.g + k * n.step, *p = n.p + k * n.step, *r = n.r + k * n.step;
  for (int64_t c = 0; c < n.C; ++c) {
    wt[c] = w[c] - n.centre[c];
    g[c] = 1 / (s[c] * s[c]);
    p[c] = wt[c] * g[c];
    r[c] = (g[c] - n.shared[c]) * A(-0.5);
  }
  n.b[k] = dot(round_up(n.C, Vec<A>::lanes), wt, p) * A(-0.5);
}

// e, m and z of one node of one image, out of the parts' sums.
template <class T>
void node_row(const NodeSums<T>& n, int64_t image, int64_t k, acc_t<T>* row) {
  using A = acc_t<T>;
  const int64_t C = n.nodes.C, at = image * n.K + k;
  const int64_t step = n.nodes.step;
  const A m = n.m[at] = sum_parts(n.masses, n.splits, n.K, image, k);
  sum_parts(n.sums, n.splits, n.rows, step, image, k, row);
  const A *w = n.nodes.w + k * step, *s = n.nodes.scales + k * C;
  const A share = n.average ? 1 / (m + A(n.eps)) : A(1);
  A* e = n.e + at * C;
  for (int64_t c = 0; c < C; ++c) {
    e[c] = row[c] - m * w[c];
    row[c] = e[c] / s[c] * share;
  }
  A length = 1;
  if (n.normalise) length = std::max(std::sqrt(dot(round_up(C, Vec<A>::lanes), row, row)), A(kShortest));
  for (int64_t c = 0; c < C; c += Vec<A>::lanes)
    store(n.z + at * C + c, load(static_cast<const A*>(row + c)) * splat(1 / length),
          lane_range<A>(0, C - c));
}

// h and t of one node of one image, from dz.
template <class T>
void cotangent_row(const NodeCotangents<T>& n, int64_t image, int64_t k, acc_t<T>* row) {
  using A = acc_t<T>;
  const int64_t C = n.nodes.C, at = image * n.K + k, width = round_up(C, Vec<A>::lanes);
  const A m = n.m[at], share = n.average ? 1 / (m + A(n.eps)) : A(1);
  const A *e = n.e + at * C, *s = n.nodes.scales + k * C;
  A* h = n.h + (image * n.rows + k) * n.nodes.step;
  std::fill_n(row, n.nodes.step, A(0));
  std::fill_n(h, n.nodes.step, A(0));
  for (int64_t c = 0; c < C; c += Vec<A>::lanes)
    store(h + c, load<A>(n.dz + at * C + c, lane_range<A>(0, C - c)));
  for (int64_t c = 0; c < C; ++c) row[c] = e[c] / s[c] * share;
  if (n.normalise) {
    const A length = std::sqrt(dot(width, row, row));
    if (length >= A(kShortest)) {
      const A along = dot(width, row, h) / (length * length);
      for (int64_t c = 0; c < C; ++c) h[c] = (h[c] - row[c] * along) / length;
    } else if (length < A(kShortest)) {
      for (int64_t c = 0; c < C; ++c) h[c] /= A(kShortest);
    } else {
      for (int64_t c = 0; c < C; ++c) h[c] = length;  // NaN
    }
  }
  A t = n.average ? -dot(width, row, h) * share : A(0);
  for (int64_t c = 0; c < C; ++c) h[c] *= share / s[c];
  n.t[at] = t - dot(width, n.nodes.w + k * n.nodes.step, h);
}

// dw and ds of one node.
template <class A>
void gradient_row(const NodeGradients<A>& n, int64_t k, A* a1, A* a2) {
  const int64_t C = n.nodes.C, step = n.nodes.step;
  const A a0 = sum_parts(n.a0, n.parts, n.K, 0, k);
  sum_parts(n.a1, n.parts, n.rows, step, 0, k, a1);
  sum_parts(n.a2, n.parts, n.rows, step, 0, k, a2);
  const A *w = n.nodes.w + k * step, *g = n.nodes.g + k * step, *s = n.nodes.scales + k * C;
  for (int64_t c = 0; c < C; ++c) {
    a2[c] = (a2[c] - 2 * w[c] * a1[c] + w[c] * w[c] * a0) * g[c];
    a1[c] = (a1[c] - w[c] * a0) * g[c];
  }
  for (int64_t image = 0; image < n.B; ++image) {
    const int64_t at = image * n.K + k;
    const A *h = n.h + (image * n.rows + k) * step, *e = n.e + at * C;
    for (int64_t c = 0; c < C; ++c) {
      a1[c] -= n.m[at] * h[c];
      a2[c] -= h[c] * e[c];
    }
  }
  for (int64_t c = 0; n.dw && c < C; ++c) n.dw[k * C + c] = a1[c];
  for (int64_t c = 0; n.ds && c < C; ++c) n.ds[k * C + c] = a2[c] / s[c];
}

}  // namespace SEGKERNELS_ISA
}  // namespace
}  // namespace segkernels
