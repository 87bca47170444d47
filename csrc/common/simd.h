// Storage types, their accumulation types, and the choice of instruction set at run time.
//
// A CPU kernel file is compiled once per instruction set inside one translation unit:
//
//     #include "common/simd.h"
//     #define SEGKERNELS_KERNELS "<op>/cpu_kernels.h"
//     #include "common/foreach_isa.h"
//
// <op>/cpu_kernels.h has no include guard and includes no library header (so that no inline function of one
// is compiled for a wider instruction set and then kept by the linker for all); its code stands in
//
//     namespace segkernels { namespace { namespace SEGKERNELS_ISA { ... } } }
//
// and uses the vectors of common/vec.h. No lambdas there: they do not inherit the instruction set. A call is
// then
//
//     SEGKERNELS_BY_ISA(simd::forward<T>(args))
//
// where `simd` names the best instruction set this machine has
// (SEGKERNELS_ISA=avx512_bf16|avx512|avx2|baseline lowers it).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#define SEGKERNELS_X86 1
#else
#define SEGKERNELS_X86 0
#endif

#define SEGKERNELS_INLINE static inline __attribute__((always_inline))

namespace segkernels {

inline int64_t ceil_div(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }
inline int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// Sums are kept in float, those of double in double.
template <class T>
struct accumulation {
  using type = float;
};
template <>
struct accumulation<double> {
  using type = double;
};
template <class T>
using acc_t = typename accumulation<T>::type;

enum class Isa { baseline, avx2, avx512 };

inline Isa detect_isa() {
#if SEGKERNELS_X86
  Isa best = Isa::baseline;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    best = Isa::avx2;
  if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    best = Isa::avx512;
  const char* wish = std::getenv("SEGKERNELS_ISA");
  if (wish && !std::strcmp(wish, "baseline")) return Isa::baseline;
  if (wish && !std::strcmp(wish, "avx2")) return std::min(best, Isa::avx2);
  return best;
#else
  return Isa::baseline;
#endif
}

inline Isa isa() {
  static const Isa chosen = detect_isa();
  return chosen;
}

}  // namespace segkernels

#if SEGKERNELS_X86
#define SEGKERNELS_BY_ISA(...)                 \
  switch (::segkernels::isa()) {               \
    case ::segkernels::Isa::avx512: {          \
      namespace simd = ::segkernels::avx512;   \
      __VA_ARGS__;                             \
      break;                                   \
    }                                          \
    case ::segkernels::Isa::avx2: {            \
      namespace simd = ::segkernels::avx2;     \
      __VA_ARGS__;                             \
      break;                                   \
    }                                          \
    case ::segkernels::Isa::baseline: {        \
      namespace simd = ::segkernels::baseline; \
      __VA_ARGS__;                             \
      break;                                   \
    }                                          \
  }
#else
#define SEGKERNELS_BY_ISA(...)               \
  {                                          \
    namespace simd = ::segkernels::baseline; \
    __VA_ARGS__;                             \
  }
#endif
