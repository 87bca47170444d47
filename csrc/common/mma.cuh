// Tensor-core products behind a portable meaning.
#pragma once

#include "common/device.cuh"

#ifdef __CUDACC__

namespace segkernels::cuda {

// C += A·B for one warp; A is 16×16, B 16×8, C 16×8. With g = lane / 4 and t = lane % 4 (PTX ISA,
// mma.m16n8k16), a lane holds as pairs of neighbouring elements (the lower index in the lower half)
//     a[i]: row g + 8·(i % 2), columns 2t + 8·(i / 2), +1       b[i]: column g, rows 2t + 8·i, +1
//     c[i]: row g + 8·(i / 2), column 2t + i % 2
template <class T>
__device__ inline void mma_m16n8k16(float (&c)[4], const Vector<T, 2> (&a)[4], const Vector<T, 2> (&b)[2]);

#define SEGKERNELS_MMA(T, name)                                                    \
  template <>                                                                      \
  __device__ inline void mma_m16n8k16<T>(float (&c)[4], const Vector<T, 2>(&a)[4], \
                                         const Vector<T, 2>(&b)[2]) {              \
    const unsigned* p = reinterpret_cast<const unsigned*>(a);                      \
    const unsigned* q = reinterpret_cast<const unsigned*>(b);                      \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                     \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"     \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                           \
        : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "r"(q[0]), "r"(q[1]));       \
  }
SEGKERNELS_MMA(__half, "f16")
SEGKERNELS_MMA(__nv_bfloat16, "bf16")
#undef SEGKERNELS_MMA

// A float with the 10 bits of mantissa that the next product reads: to nearest, ties away from zero.
__device__ inline float to_tf32(float a) {
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(a));
  return __uint_as_float(bits);
}

// The same for A 16×8 and B 8×8 in TF32; of other floats the lowest 13 bits are not read.
//     a[i]: row g + 8·(i % 2), column t + 4·(i / 2)       b[i]: column g, row t + 4·i
__device__ inline void mma_m16n8k8(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
        "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}

}  // namespace segkernels::cuda

#else
#include "simt_mma.h"  // the host executor's definition, tests/simt/include
#endif
