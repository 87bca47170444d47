// Matrix products by dot products of pairs (AVX-512 BF16): C (+)= A·B with A, B in bfloat16, packed as
// common/packing.h says, and C in float32.
#pragma once

#include <cpuid.h>

#include <cstring>

#include "common/packing.h"

namespace segkernels {
namespace dots {

inline bool cpu_has() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 5 & 1;
}

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")

// kM rows of C, 32 columns: they stay in registers.
template <int64_t kM>
void block(int64_t k, const uint16_t* a, const uint16_t* b, float* c, int64_t ldc, bool add) {
  __m512 c0[kM], c1[kM];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kM; ++i) {
    c0[i] = add ? _mm512_loadu_ps(c + i * ldc) : _mm512_setzero_ps();
    c1[i] = add ? _mm512_loadu_ps(c + i * ldc + 16) : _mm512_setzero_ps();
  }
  for (int64_t l = 0; l < k; l += 2) {
    const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b + l * 16),
                   b1 = (__m512bh)_mm512_loadu_si512(b + (k + l) * 16);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kM; ++i) {
      int32_t pair;
      std::memcpy(&pair, a + i * k + l, sizeof pair);
      const __m512bh ai = (__m512bh)_mm512_set1_epi32(pair);
      c0[i] = _mm512_dpbf16_ps(c0[i], ai, b0);
      c1[i] = _mm512_dpbf16_ps(c1[i], ai, b1);
    }
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < kM; ++i) {
    _mm512_storeu_ps(c + i * ldc, c0[i]);
    _mm512_storeu_ps(c + i * ldc + 16, c1[i]);
  }
}

template <int64_t kMost>
void by_rows(int64_t rows, int64_t k, const uint16_t* a, const uint16_t* b, float* c, int64_t ldc, bool add) {
  if (rows == kMost) return block<kMost>(k, a, b, c, ldc, add);
  if constexpr (kMost > 1) by_rows<kMost - 1>(rows, k, a, b, c, ldc, add);
}

// C has room for rows of round_up(N, 32) columns.
inline void multiply(int64_t m, int64_t n, int64_t k, const uint16_t* a, const uint16_t* b, float* c,
                     int64_t ldc, bool add) {
  constexpr int64_t kRows = 14;
  const int64_t kp = round_up(k, 32), parts = ceil_div(m, kRows);
  for (int64_t j = 0; j < n; j += 32)
    for (int64_t part = 0; part < parts; ++part) {  // row blocks of nearly equal height
      const int64_t i = part * m / parts, rows = (part + 1) * m / parts - i;
      by_rows<kRows>(rows, kp, a + i * kp, b + j * kp, c + i * ldc + j, ldc, add);
    }
}

#pragma GCC pop_options

}  // namespace dots
}  // namespace segkernels
