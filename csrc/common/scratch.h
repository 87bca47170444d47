// Memory of a thread for tiles that it works on.
#pragma once

#include <cstdint>
#include <vector>

#include "common/simd.h"

namespace segkernels {

// The thread keeps the memory for its next stage: it is small, and fresh pages cost as much as the work on
// them. Zeroed when new: the padding that matrix products read should hold no denormal numbers. One lives at a
// time.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    thread_local std::vector<char> memory;
    if (int64_t(memory.size()) < bytes + 64) std::vector<char>(bytes + 64).swap(memory);
    next_ = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* take(int64_t n) {
    T* p = reinterpret_cast<T*>(next_);
    next_ += round_up(n * sizeof(T), 64);
    return p;
  }

 private:
  char* next_;
};

}  // namespace segkernels
