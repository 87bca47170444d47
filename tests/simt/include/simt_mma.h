// mma.sync on the executor, with the fragment layouts that common/mma.cuh states.
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

inline float to_tf32(float a) {
  if (a != a) return NAN;
  uint32_t bits;
  std::memcpy(&bits, &a, sizeof bits);
  if ((bits >> 23 & 0xff) != 0xff) bits += 0x1000;  // half of what goes, away from zero
  bits &= ~0x1fffu;
  std::memcpy(&a, &bits, sizeof bits);
  return a;
}

inline void mma_m16n8k8(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  struct Fragments {
    float a[4], b[2];
  } mine, lanes[simt::LANES];
  const auto read = [](float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    bits &= ~0x1fffu;
    std::memcpy(&x, &bits, sizeof bits);
    return x;
  };
  for (int i = 0; i < 4; ++i) mine.a[i] = read(a[i]);
  for (int i = 0; i < 2; ++i) mine.b[i] = read(b[i]);
  simt::exchange("mma.sync", ALL_LANES, &mine, sizeof mine, lanes);
  const int lane = simt::lane();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    for (int k = 0; k < 8; ++k)
      c[i] += lanes[row % 8 * 4 + k % 4].a[row / 8 + 2 * (k / 4)] * lanes[column * 4 + k % 4].b[k / 4];
  }
}

}  // namespace segkernels::cuda
