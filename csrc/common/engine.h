// What multiplies matrices of 16-bit numbers on this machine (common/gemm.h).
#pragma once

#include "common/ahead.h"
#include "common/simd.h"
#if SEGKERNELS_X86
#include "common/amx.h"
#include "common/dots.h"
#endif

namespace segkernels {

// Vectors; dot products of pairs of bfloat16 (AVX-512 BF16); AMX tiles.
enum class Engine { fma, dots, tiles };

// The engine for products of numbers of type T. A lowered instruction set (SEGKERNELS_ISA) does without
// tiles; "avx512_bf16" keeps the dot products.
template <class T>
Engine engine_of() {
#if SEGKERNELS_X86
  if constexpr (sizeof(T) == 2) {
    constexpr bool half = std::is_same_v<T, float16>;
    const char* wish = std::getenv("SEGKERNELS_ISA");
    if (isa() != Isa::avx512) return Engine::fma;
    if (!wish && amx::cpu_has(half)) return Engine::tiles;
    if (!half && (!wish || !std::strcmp(wish, "avx512_bf16")) && dots::cpu_has()) return Engine::dots;
  }
#endif
  return Engine::fma;
}

// Rows of n numbers with room for what products write beyond them, an odd number of cache lines apart, so
// that they do not fall into the same sets of the L1 cache.
inline int64_t row_step(int64_t n) { return round_up(n, 32) + 16; }

}  // namespace segkernels
