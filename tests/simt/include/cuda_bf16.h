// __nv_bfloat16 on the executor: the bits, and conversions to nearest even.
#pragma once

#include "simt.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 a) {
  const uint32_t bits = uint32_t(a.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}
inline __nv_bfloat16 __float2bfloat16_rn(float a) {
  uint32_t bits;
  std::memcpy(&bits, &a, sizeof bits);
  if (a != a) return {uint16_t(bits >> 16 | 0x40)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
