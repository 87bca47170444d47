// Matrix products on AMX tiles: C (+)= A·B with A, B in bfloat16 or float16 and C in float32.
//
// A left operand [M][K] is stored by rows, K padded to 32. A right operand [K][N] is stored in tiles of 32 × 16, each
// [16 pairs of k][16 n][2]. Operands are packed from float32; rows and columns added by padding of M and N are arbitrary,
// padding of K is zero.
#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <cpuid.h>
#include <cstdint>
#include <cstring>

namespace amx {

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The kernel grants tile registers to a process that asks (Linux: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
inline bool tiles_granted() {
  static const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return granted;
}

inline bool cpu_has(bool half) {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tile = d >> 24 & 1, bf16 = d >> 22 & 1;
  __get_cpuid_count(7, 1, &a, &b, &c, &d);
  const bool avx512_bf16 = a >> 5 & 1, fp16 = a >> 21 & 1;
  return tile && (half ? fp16 : bf16 && avx512_bf16) && tiles_granted();
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tile registers are configured while one of these lives, and released after it.
struct Tiles {
  Tiles() {
    static const TileConfig config;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Tiles() { asm volatile("tilerelease" ::: "memory"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// Inline assembly, because the intrinsics of older compilers do not tell that tiles read and write memory, and none before
// gcc 13 knows the float16 product (given here by its bytes for assemblers that do not either).
#define TILE_ZERO(t) asm volatile("tilezero %%tmm" #t ::)
#define TILE_LOAD(t, p, stride) asm volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"(p), "r"(int64_t(stride)) : "memory")
#define TILE_STORE(t, p, stride) asm volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(p), "r"(int64_t(stride)) : "memory")
#define TILE_DOT_BF16(c, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::)

template <bool kHalf>
inline void multiply_accumulate() {  // tmm0..3 += (tmm4, tmm5) · (tmm6, tmm7)
  if constexpr (kHalf) {
    asm volatile(
        ".byte 0xc4, 0xe2, 0x4b, 0x5c, 0xc4\n\t"  // tdpfp16ps tmm0, tmm4, tmm6
        ".byte 0xc4, 0xe2, 0x43, 0x5c, 0xcc\n\t"  // tdpfp16ps tmm1, tmm4, tmm7
        ".byte 0xc4, 0xe2, 0x4b, 0x5c, 0xd5\n\t"  // tdpfp16ps tmm2, tmm5, tmm6
        ".byte 0xc4, 0xe2, 0x43, 0x5c, 0xdd" ::); // tdpfp16ps tmm3, tmm5, tmm7
  } else {
    TILE_DOT_BF16(0, 4, 6);
    TILE_DOT_BF16(1, 4, 7);
    TILE_DOT_BF16(2, 5, 6);
    TILE_DOT_BF16(3, 5, 7);
  }
}

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
    const __m512i other = _mm512_or_si512(_mm512_xor_si512(lane, _mm512_set1_epi32(s)), _mm512_set1_epi32(16));
    const __m512i take_low = _mm512_mask_blend_epi32(upper, lane, other);           // a[l] | b[l − s]
    const __m512i take_high = _mm512_mask_blend_epi32(upper, _mm512_xor_si512(other, _mm512_set1_epi32(16)),
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
void pack_left(int64_t m, int64_t k, const float* x, int64_t ld, uint16_t* out) {
  const int64_t kp = round_up(k, 32);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < kp; j += 16)
      _mm256_storeu_si256((__m256i*)(out + i * kp + j), narrow<kHalf>(_mm512_maskz_loadu_ps(first(k - j), x + i * ld + j)));
}

// The transpose of x [K][M].
template <bool kHalf>
void pack_left_transposed(int64_t m, int64_t k, const float* x, int64_t ld, uint16_t* out) {
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
void pack_right(int64_t k, int64_t n, const float* x, int64_t ld, uint16_t* out) {
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
void pack_right_transposed(int64_t k, int64_t n, const float* x, int64_t ld, uint16_t* out) {
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

// C has room for round_up(M, 32) rows of at least round_up(N, 32) columns.
template <bool kHalf>
__attribute__((noinline)) void multiply(int64_t m, int64_t n, int64_t k, const uint16_t* a, const uint16_t* b, float* c,
                                        int64_t ldc, bool add) {
  const int64_t kp = round_up(k, 32), a_stride = kp * 2, c_stride = ldc * 4;
  for (int64_t j = 0; j < n; j += 32)
    for (int64_t i = 0; i < m; i += 32) {
      float* c0 = c + i * ldc + j;
      float* c2 = c0 + 16 * ldc;
      if (add) {
        TILE_LOAD(0, c0, c_stride);
        TILE_LOAD(1, c0 + 16, c_stride);
        TILE_LOAD(2, c2, c_stride);
        TILE_LOAD(3, c2 + 16, c_stride);
      } else {
        TILE_ZERO(0);
        TILE_ZERO(1);
        TILE_ZERO(2);
        TILE_ZERO(3);
      }
      const uint16_t* a0 = a + i * kp;
      const uint16_t* b0 = b + j * kp;
      for (int64_t l = 0; l < kp; l += 32) {
        TILE_LOAD(4, a0 + l, a_stride);
        TILE_LOAD(5, a0 + 16 * kp + l, a_stride);
        TILE_LOAD(6, b0 + l * 16, 64);
        TILE_LOAD(7, b0 + (kp + l) * 16, 64);
        multiply_accumulate<kHalf>();
      }
      TILE_STORE(0, c0, c_stride);
      TILE_STORE(1, c0 + 16, c_stride);
      TILE_STORE(2, c2, c_stride);
      TILE_STORE(3, c2 + 16, c_stride);
    }
}

#undef TILE_ZERO
#undef TILE_LOAD
#undef TILE_STORE
#undef TILE_DOT_BF16

}  // namespace amx
