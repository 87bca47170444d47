// __half on the executor: the bits, and conversions to nearest even.
#pragma once

#include "simt.h"

struct __half {
  uint16_t bits;
};
inline float __half2float(__half a) {
  _Float16 h;
  std::memcpy(&h, &a, sizeof h);
  return float(h);
}
inline __half __float2half_rn(float a) {
  const _Float16 h = _Float16(a);
  __half out;
  std::memcpy(&out, &h, sizeof h);
  return out;
}
