// Memory that is needed next, asked for little by little while products are computed: the hardware foresees
// less, and a burst would stall it.
#pragma once

#include <algorithm>
#include <cstdint>

namespace segkernels {

// `rows` pieces of `bytes` bytes, `step` bytes apart.
struct Ahead {
  const char* p = nullptr;
  int64_t rows = 0, step = 0, bytes = 0;
  int64_t asked = 0, within = 0;  // whole rows, and bytes of the next one

  // The next cache line.
  void fetch() {
    if (asked == rows) return;
    __builtin_prefetch(p + asked * step + within, 0, 2);
    if ((within += kLine) < bytes) return;
    within = 0, ++asked;
  }
  // All rows up to a share done / all of them.
  void fetch(int64_t done, int64_t all) {
    for (const int64_t until = std::min(rows, done * rows / all); asked < until; ++asked)
      for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(p + asked * step + at, 0, 2);
  }

 private:
  static constexpr int64_t kLine = 64;
};

}  // namespace segkernels
