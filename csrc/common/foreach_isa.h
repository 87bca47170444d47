// Compiles the file named by SEGKERNELS_KERNELS once per instruction set (see common/simd.h).
// No include guard: a translation unit may compile several kernel files.

#if SEGKERNELS_X86

#define SEGKERNELS_ISA avx512
#define SEGKERNELS_VECTOR_BYTES 64
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#endif
#include "common/vec.h"
#include SEGKERNELS_KERNELS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef SEGKERNELS_ISA
#undef SEGKERNELS_VECTOR_BYTES

#define SEGKERNELS_ISA avx2
#define SEGKERNELS_VECTOR_BYTES 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include "common/vec.h"
#include SEGKERNELS_KERNELS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef SEGKERNELS_ISA
#undef SEGKERNELS_VECTOR_BYTES

#endif  // SEGKERNELS_X86

#define SEGKERNELS_ISA baseline
#define SEGKERNELS_VECTOR_BYTES 16
#include "common/vec.h"
#include SEGKERNELS_KERNELS
#undef SEGKERNELS_ISA
#undef SEGKERNELS_VECTOR_BYTES
#undef SEGKERNELS_KERNELS
