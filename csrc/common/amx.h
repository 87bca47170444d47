// Matrix products on AMX tiles: C (+)= A·B with A, B in bfloat16 or float16, packed as common/packing.h says,
// and C in float32.
#pragma once

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "common/packing.h"

namespace segkernels {
namespace amx {

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

// Inline assembly, because the intrinsics of older compilers do not tell that tiles read and write memory,
// and none before gcc 13 knows the float16 product (given here by its bytes for assemblers that do not
// either).
#define TILE_ZERO(t) asm volatile("tilezero %%tmm" #t::)
#define TILE_LOAD(t, p, stride) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #t::"r"(p), "r"(int64_t(stride)) : "memory")
#define TILE_STORE(t, p, stride) \
  asm volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(p), "r"(int64_t(stride)) : "memory")
#define TILE_DOT_BF16(c, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c::)

template <bool kHalf>
inline void multiply_accumulate() {  // tmm0..3 += (tmm4, tmm5) · (tmm6, tmm7)
  if constexpr (kHalf) {
    asm volatile(
        ".byte 0xc4, 0xe2, 0x4b, 0x5c, 0xc4\n\t"   // tdpfp16ps tmm0, tmm4, tmm6
        ".byte 0xc4, 0xe2, 0x43, 0x5c, 0xcc\n\t"   // tdpfp16ps tmm1, tmm4, tmm7
        ".byte 0xc4, 0xe2, 0x4b, 0x5c, 0xd5\n\t"   // tdpfp16ps tmm2, tmm5, tmm6
        ".byte 0xc4, 0xe2, 0x43, 0x5c, 0xdd" ::);  // tdpfp16ps tmm3, tmm5, tmm7
  } else {
    TILE_DOT_BF16(0, 4, 6);
    TILE_DOT_BF16(1, 4, 7);
    TILE_DOT_BF16(2, 5, 6);
    TILE_DOT_BF16(3, 5, 7);
  }
}

// C has room for round_up(M, 32) rows of at least round_up(N, 32) columns.
template <bool kHalf>
__attribute__((noinline)) void multiply(int64_t m, int64_t n, int64_t k, const uint16_t* a, const uint16_t* b,
                                        float* c, int64_t ldc, bool add) {
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
}  // namespace segkernels
