// Operands of matrix products in bfloat16 or float16, packed from float32 for AMX tiles (common/amx.h) and
// dot products (common/dots.h).
//
// A left operand [M][K] is stored by rows, K padded to 32. A right operand [K][N] is stored in tiles of 32 ×
// 16, each [16 pairs of k][16 n][2]. Rows and columns added by padding of M and N are arbitrary, padding of K
// is zero.
#pragma once

#include <immintrin.h>

#include "common/simd.h"

namespace segkernels {
namespace packing {

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")

template <bool kHalf>
inline __m256i narrow(__m512 x) {
  if constexpr (kHalf)
    return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  else
    return (__m256i)_mm512_cvtneps_pbh(x);
}

inline __mmask16 first(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }

// Two rows of 16 numbers as 16 pairs.
template <bool kHalf>
inline __m512i pairs(__m512 low, __m512 high) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(narrow<kHalf>(low)),
                         _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow<kHalf>(high)), 16));
}

// r[i][j] ↔ r[j][i]: exchange blocks of 1, 2, 4, 8 lanes.
inline void transpose(__m512i r[16]) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 4
  for (int s = 1; s < 16; s *= 2) {
    const __mmask16 upper = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(s));
    const __m512i other =
        _mm512_or_si512(_mm512_xor_si512(lane, _mm512_set1_epi32(s)), _mm512_set1_epi32(16));
    const __m512i take_low = _mm512_mask_blend_epi32(upper, lane, other);  // a[l] | b[l − s]
    const __m512i take_high =
        _mm512_mask_blend_epi32(upper, _mm512_xor_si512(other, _mm512_set1_epi32(16)),
                                _mm512_or_si512(lane, _mm512_set1_epi32(16)));  // a[l + s] | b[l]
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      if (!(i & s)) {
        const __m512i a = r[i], b = r[i + s];
        r[i] = _mm512_permutex2var_epi32(a, take_low, b);
        r[i + s] = _mm512_permutex2var_epi32(a, take_high, b);
      }
  }
}

inline int64_t left_size(int64_t m, int64_t k) { return round_up(m, 32) * round_up(k, 32); }
inline int64_t right_size(int64_t k, int64_t n) { return round_up(k, 32) * round_up(n, 32); }

// x [M][K], rows ld apart.
template <bool kHalf>
void left(int64_t m, int64_t k, const float* x, int64_t ld, uint16_t* out) {
  const int64_t kp = round_up(k, 32);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < kp; j += 16)
      _mm256_storeu_si256((__m256i*)(out + i * kp + j),
                          narrow<kHalf>(_mm512_maskz_loadu_ps(first(k - j), x + i * ld + j)));
}

// The transpose of x [K][M].
template <bool kHalf>
void left_transposed(int64_t m, int64_t k, const float* x, int64_t ld, uint16_t* out) {
  const int64_t kp = round_up(k, 32);
  for (int64_t i = 0; i < m; i += 16)
    for (int64_t j = 0; j < kp; j += 32) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int q = 0; q < 16; ++q) {
        const int64_t row = j + 2 * q;
        const __mmask16 columns = first(m - i);
        r[q] = pairs<kHalf>(_mm512_maskz_loadu_ps(row < k ? columns : 0, x + row * ld + i),
                            _mm512_maskz_loadu_ps(row + 1 < k ? columns : 0, x + (row + 1) * ld + i));
      }
      transpose(r);
#pragma GCC unroll 16
      for (int q = 0; q < 16; ++q) _mm512_storeu_si512(out + (i + q) * kp + j, r[q]);
    }
}

// x [K][N], rows ld apart.
template <bool kHalf>
void right(int64_t k, int64_t n, const float* x, int64_t ld, uint16_t* out) {
  const int64_t kp = round_up(k, 32);
  for (int64_t j = 0; j < n; j += 16, out += kp * 16)
    for (int64_t i = 0; i < kp; i += 2) {
      const __mmask16 columns = first(n - j);
      _mm512_storeu_si512(out + i * 16,
                          pairs<kHalf>(_mm512_maskz_loadu_ps(i < k ? columns : 0, x + i * ld + j),
                                       _mm512_maskz_loadu_ps(i + 1 < k ? columns : 0, x + (i + 1) * ld + j)));
    }
}

// The transpose of x [N][K].
template <bool kHalf>
void right_transposed(int64_t k, int64_t n, const float* x, int64_t ld, uint16_t* out) {
  const int64_t kp = round_up(k, 32);
  for (int64_t j = 0; j < n; j += 16, out += kp * 16)
    for (int64_t i = 0; i < kp; i += 32) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int q = 0; q < 16; ++q) {
        const float* row = x + (j + q) * ld + i;
        const int64_t left = j + q < n ? k - i : 0;
        const __m256i low = narrow<kHalf>(_mm512_maskz_loadu_ps(first(left), row));
        const __m256i high = narrow<kHalf>(_mm512_maskz_loadu_ps(first(left - 16), row + 16));
        r[q] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
      }
      transpose(r);
#pragma GCC unroll 16
      for (int q = 0; q < 16; ++q) _mm512_storeu_si512(out + i * 16 + q * 32, r[q]);
    }
}

#pragma GCC pop_options

}  // namespace packing
}  // namespace segkernels
