// cp.async on the executor: the copy happens when its group is waited for.
#pragma once

#include "simt.h"

namespace segkernels::cuda {

template <int BYTES>
inline void copy_async(void* target, const void* source, int bytes = BYTES) {
  simt::copy_begin(target, source, size_t(bytes), size_t(BYTES));
}
inline void commit_copies() { simt::copy_commit(); }
template <int LEFT>
inline void wait_copies() {
  simt::copy_wait(LEFT);
}

}  // namespace segkernels::cuda
