// The nodes of one call of soft_assign, as its CPU kernels see them. Rows are `step` apart and zero beyond C.
#pragma once

#include "common/assignment.h"

namespace segkernels {
namespace soft_assignment {

constexpr double kShortest = 1e-12;  // length below which a node is not normalised further

template <class A>
struct Nodes {
  int64_t C, step;
  const A *anchors, *scales;  // [K, C]
  A *centre, *shared;         // [C]: median of the anchors, least 1/s²
  A *w, *g, *p, *r, *b;       // anchors about the centre, 1/s², the quadratic form
};

template <class T>
struct NodeSums {
  using A = acc_t<T>;
  Nodes<A> nodes;
  int64_t K, rows, splits;
  const A *masses, *sums;  // [B·splits][K], [B·splits][rows][step]
  bool average, normalise;
  double eps;
  T* z;
  A *e, *m;
};

template <class T>
struct NodeCotangents {
  using A = acc_t<T>;
  Nodes<A> nodes;
  int64_t K, rows;
  bool average, normalise;
  double eps;
  const T* dz;
  const A *e, *m;
  A *h, *t;  // [B][rows][step], [B][K]
};

template <class A>
struct NodeGradients {
  Nodes<A> nodes;
  int64_t B, K, rows, parts;
  const A *a0, *a1, *a2, *h, *e, *m;
  A *dw, *ds;  // null: not needed
};

}  // namespace soft_assignment
}  // namespace segkernels
