// A call of em_attention as its CPU kernels see it: sizes, how the work is cut, and where things lie.
//
// A block of pixels is a small matrix in the L2 cache, its rows [channels] or [bases] of a pixel whatever the
// layout of the map. A table of bases has `columns` rows an image, zero beyond K and beyond the channels.
// Blocks make up the parts of an image, whose sums are added in order: how they are cut depends on the sizes
// alone, so results depend neither on the number of threads nor on the batch.
#pragma once

#include "common/assignment.h"
#include "common/engine.h"

namespace segkernels {
namespace em {

constexpr int64_t kBlock = 96;     // pixels
constexpr double kEpsilon = 1e-6;  // of the additive norm
constexpr double kLeast = 1e-12;   // of the clamped one

struct Sizes {
  int64_t B, N, C, D, K, splits;  // D: channels of the bases, C but for a folded convolution

  int64_t columns() const { return round_up(K, 16); }   // of a row of responsibilities, zero beyond K
  int64_t step() const { return row_step(K); }          // from row to row
  int64_t sum_rows() const { return round_up(K, 32); }  // of sums, which products write in whole tiles
  int64_t sum_size() const { return sum_rows() * row_step(C); }
  int64_t blocks() const { return ceil_div(N, kBlock); }
  int64_t parts() const { return B * splits; }
  int64_t first_block(int64_t part) const { return part % splits * blocks() / splits; }
  int64_t last_block(int64_t part) const { return (part % splits + 1) * blocks() / splits; }
  int64_t pixels(int64_t block) const { return std::min(kBlock, N - block * kBlock); }
};

// A map and where its pixels lie; data null: there is none.
template <class T>
struct PixelMap {
  T* data = nullptr;
  Pixels at{};
  T* block(int64_t image, int64_t block) const {
    return data + image * at.sample + block * kBlock * at.pixel;
  }
};

// Bases as the right operand of products, prepared once for all blocks, over their channels (summed) or over
// themselves (made: channels). Several tables may be packed out of the same rows, one after the other.
template <class A>
struct Table {
  A* rows = nullptr;       // [B][columns][step]
  char* packed = nullptr;  // [tables][bytes]
  int64_t bytes = 0;
  char* operator[](int64_t i) const { return packed + i * bytes; }
};

// What the M-step divides by, d(r, s), and its derivatives.
template <class A>
struct Divisor {
  A d, by_r, by_s;

  Divisor(A r, A s, bool clamp) {
    if (clamp) {
      const A floor = A(kLeast) * std::max(s, A(kLeast));
      const bool above = !(r < floor);  // a NaN stays one
      d = above ? r : floor;
      by_r = above;
      by_s = !above && s > A(kLeast) ? A(kLeast) : A(0);
    } else {
      d = r + A(kEpsilon) * (A(kEpsilon) + s);
      by_r = 1;
      by_s = A(kEpsilon);
    }
  }
};

template <class T>
struct Forward {
  using A = acc_t<T>;
  Sizes sizes;
  PixelMap<const T> x;
  PixelMap<T> y;
  PixelMap<A> z;   // the assignment, where asked for
  const A *w, *b;  // [D, C], [D], or null
  A lam;
  bool clamp;
  bool sums_wanted, last;   // of this E-step
  Table<A> scores;          // λμ over C, summed
  Table<A> mixture;         // μ over D, made
  A* bias;                  // [B][columns] of the scores; −∞ beyond K
  A* heated;                // λμ [B][columns][step of D]
  A* a;                     // Σ z x [B][columns][step of C]
  A* folded;                // the same of the convolved pixels, [B][columns][step of D]
  A *mass, *masses, *sums;  // [B][columns] and by parts: [parts][columns], [parts][sum_size]
  A* responsibilities;      // [B][N][columns], of the last E-step, a step apart
  A* m;                     // [B, K, D]
  A *s, *r;                 // [B, depth, K], from this iteration on; null: not kept
  int64_t depth;
};

// What a sweep of the backward leaves to later ones, for each pixel: dl of every step but the first (at
// first, of the last one, dz), and z of those between. z of the last step lies where that of the one before
// it comes later, and is then made again: one product for a quarter of the memory.
struct Stash {
  int64_t steps;
  int64_t dl(int64_t step) const { return std::max<int64_t>(0, step - 1); }
  int64_t z(int64_t step) const {
    return std::max<int64_t>(1, steps - 1) + std::max<int64_t>(0, std::min(step, steps - 2) - 1);
  }
  bool loses_last() const { return steps > 2; }
  int64_t size() const { return z(steps - 1) + 1; }
};

// The bases before every differentiated step: those `given` to the first, if they are, and h.
template <class A>
struct Beginnings {
  const A *mu, *h;  // [B, K, C] and [B, steps − given, K, C]
  int64_t steps, given, size;
  const A* operator()(int64_t image, int64_t step) const {
    return step < given ? mu + image * size : h + (image * (steps - given) + step - given) * size;
  }
};

template <class T>
struct Backward {
  using A = acc_t<T>;
  Sizes sizes;
  PixelMap<const T> x, dy;
  PixelMap<const A> dz;
  PixelMap<T> dx;
  Beginnings<A> before;
  const A *m, *s, *r, *dm;  // dm may be null
  A lam;
  bool clamp, want_bases, want_u;  // want_u: the sums u of the first step, for bases or λ
  int64_t depth, steps;            // steps: E-steps that are differentiated, max(1, depth)
  Table<A> given;                  // [B]: of a sweep, μ^T or da; summed
  Table<A> scores;                 // [B][steps]: λμ, summed
  Table<A> through_z;              // [B][steps]: da, made; what z and dl put into dx
  Table<A> through_dl;             // [B][steps]: λμ, made
  A *bias, *shift;                 // [columns]: −∞ beyond K; [B][columns]: ds
  A* stash;                        // [B][N][kept.size()][columns]
  A *fitted, *u;  // of parts, Σ z dy and Σ dl x: [parts][sum_size]; one memory where depth > 0
  A* dmu;         // [B, K, C]
  double* dlam;   // [B, K]

  Stash kept() const { return {steps}; }
  bool wants_u(int64_t step) const { return step > 0 || want_u; }
  int64_t at(int64_t image, int64_t step) const { return image * steps + step; }
};

}  // namespace em
}  // namespace segkernels
