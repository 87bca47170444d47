// mma.sync m16n8k16 on the executor, with the fragment layout that common/mma.cuh states.
#pragma once

#include "common/device.cuh"

namespace segkernels::cuda {

template <class T>
inline void mma_m16n8k16(float (&c)[4], const Vector<T, 2> (&a)[4], const Vector<T, 2> (&b)[2]) {
  struct Fragments {
    T a[8], b[4];
  } mine;
  std::memcpy(mine.a, a, sizeof mine.a);
  std::memcpy(mine.b, b, sizeof mine.b);
  Fragments lanes[simt::LANES];
  simt::exchange("mma.sync", ALL_LANES, &mine, sizeof mine, lanes);
  const int lane = simt::lane();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    for (int k = 0; k < 16; ++k) {
      const Fragments &left = lanes[row % 8 * 4 + k % 8 / 2], &right = lanes[column * 4 + k % 8 / 2];
      c[i] += widen(left.a[2 * (row / 8 + 2 * (k / 8)) + k % 2]) * widen(right.b[2 * (k / 8) + k % 2]);
    }
  }
}

}  // namespace segkernels::cuda
