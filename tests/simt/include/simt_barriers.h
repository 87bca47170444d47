// Named barriers and clusters on the executor.
#pragma once

#include "simt.h"

namespace segkernels::cuda {

inline void named_barrier_wait(int name, int threads) { simt::named_barrier(name, unsigned(threads), true); }
inline void named_barrier_arrive(int name, int threads) {
  simt::named_barrier(name, unsigned(threads), false);
}

inline unsigned load_acquire(const unsigned* p) { return simt::load_acquire(p); }

inline unsigned cluster_rank() { return simt::cluster_rank(); }
inline unsigned cluster_blocks() { return simt::cluster_blocks(); }
inline void cluster_arrive() { simt::cluster_arrive(); }
inline void cluster_wait() { simt::cluster_wait(); }
template <class T>
inline T* shared_of(T* p, unsigned rank) {
  return static_cast<T*>(simt::shared_of(p, rank));
}

}  // namespace segkernels::cuda
