// The codewords of one call of encode, as its CPU kernels see them. Rows are `step` apart and zero beyond C.
#pragma once

#include "common/assignment.h"

namespace segkernels {
namespace encoding {

template <class A>
struct Codewords {
  int64_t C, step;
  const A *codewords, *s;  // [K, C], [K]
  A shared;                // the scale that all have in common
  A* centre;               // [C], the median codeword
  A *c, *p, *r, *b;        // codewords about the centre, the quadratic form
};

template <class T>
struct ResidualSums {
  using A = acc_t<T>;
  Codewords<A> codewords;
  int64_t K, rows, splits;
  const A *masses, *sums;  // [B·splits][K], [B·splits][rows][step]
  T* e;
  A* m;
};

template <class A>
struct CodewordGradients {
  Codewords<A> codewords;
  int64_t B, K, rows, parts;
  const A *a0, *a1, *a2, *h, *m;
  A *dc, *ds;  // null: not needed
};

}  // namespace encoding
}  // namespace segkernels
