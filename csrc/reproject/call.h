// One call of reproject as its CPU kernels see it.
#pragma once

#include "common/assignment.h"

namespace segkernels {
namespace reprojection {

template <class T>
struct Reprojection {
  using A = acc_t<T>;
  Pixels y, q, r, dq;       // y: of y or dy
  int64_t K, rows, step, splits;
  const T* z_data;          // [B, K, D]
  A* z;                     // [B][rows][step]: the same, wide
  const A* q_data;
  const T *r_data, *dy_data;  // r_data null: no residual
  T* y_data;
  A *dq_data, *sums;        // null: not needed; sums: [B·splits][rows][step]
};

}  // namespace reprojection
}  // namespace segkernels
