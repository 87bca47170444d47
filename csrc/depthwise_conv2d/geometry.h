// Which input pixels a depthwise convolution reads: taps outside the map are skipped, never multiplied.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "common/simd.h"

namespace segkernels {

// Output o reads, at tap a, the input position o·s − p + a·r (if it lies in [0, in)).
struct Axis {
  int64_t in, out, k, s, p, r;
};

// A column tap of rate `rate` reads source column `source` + step·i at position i of a row, for i in [begin,
// end).
struct ColumnTap {
  int64_t rate, b, source, begin, end;
};
// The positions [begin, end) of a row, at which the same column taps are inside the map.
struct Run {
  int64_t begin, end;
  std::vector<ColumnTap> taps;
};
struct RowTap {
  int64_t rate, a, row;
};
// The row taps of every row of a map.
struct RowTaps {
  std::vector<RowTap> taps;
  std::vector<int64_t> start{0};

  void end_row() { start.push_back(taps.size()); }
  const RowTap* begin(int64_t h) const { return taps.data() + start[h]; }
  const RowTap* end(int64_t h) const { return taps.data() + start[h + 1]; }
};
// One product of a run: where it reads (elements from the run's position 0), and its weight's index ρ·k_h·k_w
// + a·k_w + b.
struct Tap {
  int64_t offset, weight;
};

struct Geometry {
  int64_t B, C, R;
  std::vector<Axis> rows, columns;  // one per rate

  int64_t kh() const { return rows[0].k; }
  int64_t kw() const { return columns[0].k; }
  int64_t taps() const { return kh() * kw(); }
  int64_t H() const { return rows[0].in; }
  int64_t W() const { return columns[0].in; }
  int64_t H_out() const { return rows[0].out; }
  int64_t W_out() const { return columns[0].out; }

  // Slabs of `slab` channels; the last one takes the rest too.
  int64_t slabs(int64_t slab) const { return std::max<int64_t>(1, C / slab); }
  int64_t slab_end(int64_t c0, int64_t slab) const { return c0 + 2 * slab > C ? C : c0 + slab; }

  // Forward, rate ρ: for each output row, the taps inside the map.
  RowTaps forward_rows(int64_t rate) const {
    const Axis& x = rows[rate];
    RowTaps table;
    for (int64_t h = 0; h < x.out; ++h, table.end_row())
      for (int64_t a = 0; a < x.k; ++a) {
        const int64_t row = h * x.s - x.p + a * x.r;
        if (row >= 0 && row < x.in) table.taps.push_back({rate, a, row});
      }
    return table;
  }
  // Backward, all rates: for each input row, the output rows that read it.
  RowTaps backward_rows() const {
    RowTaps table;
    for (int64_t h = 0; h < H(); ++h, table.end_row())
      for (int64_t rate = 0; rate < R; ++rate) {
        const Axis& x = rows[rate];
        for (int64_t a = 0; a < x.k; ++a) {
          const int64_t t = h + x.p - a * x.r;
          if (t >= 0 && t % x.s == 0 && t / x.s < x.out) table.taps.push_back({rate, a, t / x.s});
        }
      }
    return table;
  }

  // Forward, rate ρ: position i is output column i, and the source moves s columns a position.
  std::vector<ColumnTap> forward_columns(int64_t rate) const {
    const Axis& x = columns[rate];
    std::vector<ColumnTap> taps;
    for (int64_t b = 0; b < x.k; ++b) add(taps, {rate, b, b * x.r - x.p, 0, 0}, x.out, x.s, x.in);
    return taps;
  }
  // Backward, all rates, for the input columns c, c + s, c + 2s, …: position i is input column c + s·i, and
  // the source moves one output column a position.
  std::vector<ColumnTap> backward_columns(int64_t c) const {
    std::vector<ColumnTap> taps;
    for (int64_t rate = 0; rate < R; ++rate) {
      const Axis& x = columns[rate];
      for (int64_t b = 0; b < x.k; ++b) {
        const int64_t t = c + x.p - b * x.r;
        if (t % x.s == 0) add(taps, {rate, b, t / x.s, 0, 0}, ceil_div(x.in - c, x.s), 1, x.out);
      }
    }
    return taps;
  }

  // An order of n rows in which rows that share taps follow one another, so that a dilated convolution reads
  // each row of the map from memory once: first the rows of residue 0 modulo the rates' common divisor, then
  // those of 1, …
  static std::vector<int64_t> by_residue(int64_t n, int64_t step) {
    std::vector<int64_t> order;
    order.reserve(n);
    for (int64_t residue = 0; residue < step && residue < n; ++residue)
      for (int64_t h = residue; h < n; h += step) order.push_back(h);
    return order;
  }
  std::vector<int64_t> input_order() const { return by_residue(H(), common_rate()); }
  std::vector<int64_t> output_order() const {
    const int64_t r = common_rate(), s = rows[0].s;
    return by_residue(H_out(), r % s == 0 ? r / s : r);
  }
  int64_t common_rate() const {
    int64_t r = 0;
    for (const Axis& x : rows) r = std::gcd(r, x.r);
    return r;
  }

 private:
  static void add(std::vector<ColumnTap>& taps, ColumnTap tap, int64_t n, int64_t step, int64_t n_source) {
    tap.begin = std::max<int64_t>(0, ceil_div(-tap.source, step));
    tap.end = std::min(n, ceil_div(n_source - tap.source, step));
    if (tap.begin < tap.end) taps.push_back(tap);
  }
};

// The positions [0, n) as runs.
inline std::vector<Run> runs_of(const std::vector<ColumnTap>& taps, int64_t n) {
  std::vector<Run> runs;
  for (int64_t i = 0; i < n; i = runs.back().end) {
    Run run{i, n, {}};
    for (const ColumnTap& tap : taps) {
      if (i < tap.begin) run.end = std::min(run.end, tap.begin);
      if (tap.begin <= i && i < tap.end) {
        run.end = std::min(run.end, tap.end);
        run.taps.push_back(tap);
      }
    }
    runs.push_back(std::move(run));
  }
  return runs;
}

}  // namespace segkernels
