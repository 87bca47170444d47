// Products of a block of pixels with nodes, out of the L2 cache. Compiled once per instruction set (no
// include guard). With pixels t, nodes k, channels c:
//
//   scores   s[k][t]  = Σ_c x[t][c]·(p[k][c] + x[t][c]·r[k][c])       gather   g[k][c] += Σ_t q[k][t]·x[t][c]
//   spread   y[t][c] = Σ_k q[k][t]·h[k][c] + …
//
// Channels lie along vectors: rows of x, p, … are padded with zeros to whole vectors, so that every sum over
// channels has as many partial sums as a vector has lanes. x has rows for kPixels pixels; node arrays have
// rows for a multiple of four nodes. A result is one sum in one order, whatever the block.

namespace segkernels {
namespace {
namespace SEGKERNELS_ISA {

template <class A>
struct Rows {
  A* p;
  int64_t step;
  A* operator[](int64_t i) const { return p + i * step; }
};

// Σ_c a[c]·b[c]; channels is a multiple of the lanes.
template <class A>
SEGKERNELS_INLINE A dot(int64_t channels, const A* a, const A* b) {
  Vec<A> s = splat(A(0));
  for (int64_t c = 0; c < channels; c += Vec<A>::lanes) s = fma(load(a + c), load(b + c), s);
  return sum(s);
}

// -- scores -----------------------------------------------------------------------------------------

// lanes / kK pixels with kK nodes: a vector of results.
template <bool kSquare, int64_t kK, class A>
SEGKERNELS_INLINE void score_block(int64_t channels, const A* x, int64_t x_step, const A* p, const A* r,
                                   int64_t p_step, A* out, int64_t out_step) {
  constexpr int64_t lanes = Vec<A>::lanes, kT = lanes / kK;
  Vec<A> acc[lanes];
#pragma GCC unroll 16
  for (int64_t i = 0; i < lanes; ++i) acc[i] = splat(A(0));
  for (int64_t c = 0; c < channels; c += lanes) {
    Vec<A> xt[kT];
#pragma GCC unroll 16
    for (int64_t t = 0; t < kT; ++t) xt[t] = load(x + t * x_step + c);
#pragma GCC unroll 4
    for (int64_t k = 0; k < kK; ++k) {
      const Vec<A> pk = load(p + k * p_step + c);
      if constexpr (kSquare) {
        const Vec<A> rk = load(r + k * p_step + c);
#pragma GCC unroll 16
        for (int64_t t = 0; t < kT; ++t) acc[k * kT + t] = fma(xt[t], fma(xt[t], rk, pk), acc[k * kT + t]);
      } else {
#pragma GCC unroll 16
        for (int64_t t = 0; t < kT; ++t) acc[k * kT + t] = fma(xt[t], pk, acc[k * kT + t]);
      }
    }
  }
  const Vec<A> total = sums(acc);
#pragma GCC unroll 4
  for (int64_t k = 0; k < kK; ++k)
    __builtin_memcpy(out + k * out_step, reinterpret_cast<const A*>(&total.v) + k * kT, kT * sizeof(A));
}

template <bool kSquare, int64_t kK, class A>
void score_nodes(int64_t pixels, int64_t channels, Rows<const A> x, const A* p, const A* r, int64_t p_step,
                 Rows<A> out, Ahead& ahead, int64_t done, int64_t all) {
  constexpr int64_t kT = Vec<A>::lanes / kK;
  for (int64_t t = 0; t < pixels; t += kT) {
    ahead.fetch(done * pixels + kK * t, all * pixels);
    score_block<kSquare, kK>(channels, x[t], x.step, p, r, p_step, out.p + t, out.step);
  }
}

// r is not read unless kSquare; channels is a multiple of the lanes.
template <bool kSquare, class A>
void scores(int64_t pixels, int64_t channels, int64_t nodes, Rows<const A> x, Rows<const A> p,
            Rows<const A> r, Rows<A> out, Ahead ahead) {
  constexpr int64_t kMost = std::min<int64_t>(4, Vec<A>::lanes);
  for (int64_t k = 0; k < nodes;) {
    const int64_t left = nodes - k, taken = left >= 3 ? kMost : std::min<int64_t>(left, 2);
    const A *pk = p[k], *rk = kSquare ? r[k] : nullptr;
    const Rows<A> s = {out[k], out.step};
    if (taken == 4)
      score_nodes<kSquare, kMost>(pixels, channels, x, pk, rk, p.step, s, ahead, k, nodes);
    else if (taken == 2)
      score_nodes<kSquare, 2>(pixels, channels, x, pk, rk, p.step, s, ahead, k, nodes);
    else
      score_nodes<kSquare, 1>(pixels, channels, x, pk, rk, p.step, s, ahead, k, nodes);
    k += taken;
  }
}

// -- gather -----------------------------------------------------------------------------------------

// g2, where kSquare: the same of x².
template <bool kSquare, int64_t kK, int64_t kV, class A>
SEGKERNELS_INLINE void gather_block(int64_t pixels, const A* q, int64_t q_step, const A* x, int64_t x_step,
                                    A* g, A* g2, int64_t g_step) {
  constexpr int64_t lanes = Vec<A>::lanes;
  Vec<A> sum[kK][kV], square[kK][kV];
#pragma GCC unroll 8
  for (int64_t k = 0; k < kK; ++k)
#pragma GCC unroll 8
    for (int64_t v = 0; v < kV; ++v) {
      sum[k][v] = load(g + k * g_step + v * lanes);
      if constexpr (kSquare) square[k][v] = load(g2 + k * g_step + v * lanes);
    }
  for (int64_t t = 0; t < pixels; ++t) {
#pragma GCC unroll 8
    for (int64_t v = 0; v < kV; ++v) {
      const Vec<A> xt = load(x + t * x_step + v * lanes), xx = xt * xt;
#pragma GCC unroll 8
      for (int64_t k = 0; k < kK; ++k) {
        sum[k][v] = fma(splat(q[k * q_step + t]), xt, sum[k][v]);
        if constexpr (kSquare) square[k][v] = fma(splat(q[k * q_step + t]), xx, square[k][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int64_t k = 0; k < kK; ++k)
#pragma GCC unroll 8
    for (int64_t v = 0; v < kV; ++v) {
      store(g + k * g_step + v * lanes, sum[k][v]);
      if constexpr (kSquare) store(g2 + k * g_step + v * lanes, square[k][v]);
    }
}

template <bool kSquare, int64_t kK, int64_t kV, class A>
void gather_nodes(int64_t pixels, int64_t channels, const A* q, int64_t q_step, Rows<const A> x, A* g, A* g2,
                  int64_t g_step) {
  constexpr int64_t lanes = Vec<A>::lanes;
  int64_t c = 0;
  for (; c + kV * lanes <= channels; c += kV * lanes)
    gather_block<kSquare, kK, kV>(pixels, q, q_step, x.p + c, x.step, g + c, g2 + c, g_step);
  for (; c < channels; c += lanes)
    gather_block<kSquare, kK, 1>(pixels, q, q_step, x.p + c, x.step, g + c, g2 + c, g_step);
}

// g2 is not touched unless kSquare, where a square is shared by twice as many nodes; channels is a multiple
// of the lanes.
template <bool kSquare, class A>
void gather(int64_t pixels, int64_t channels, int64_t nodes, Rows<const A> q, Rows<const A> x, Rows<A> g,
            Rows<A> g2) {
  constexpr int64_t kMany = kVectors == 4 && kSquare ? 8 : 4, kV = kSquare ? 1 : kVectors;
  int64_t k = 0;
  for (; k + kMany <= nodes; k += kMany)
    gather_nodes<kSquare, kMany, kV>(pixels, channels, q[k], q.step, x, g[k], g2[k], g.step);
  for (; k < nodes; ++k)
    gather_nodes<kSquare, 1, kVectors>(pixels, channels, q[k], q.step, x, g[k], g2[k], g.step);
}

// -- spread -----------------------------------------------------------------------------------------

// What a pixel gets from the nodes: Σ_k q·h (+ x), or, as the gradient of an assignment, Σ_k q·h + dl·p, and
// for its square 2x·Σ_k dl·r, or u·x where r has one number per node.
template <class A>
struct Mixture {
  Rows<const A> q, h, dl, p, r;
  Rows<const A> x;
  const A* u;
};

enum class Spread { nodes, nodes_and_residual, gradient, gradient_of_norms };

template <Spread kKind>
constexpr bool is_gradient = kKind == Spread::gradient || kKind == Spread::gradient_of_norms;

template <Spread kKind, int64_t kT, int64_t kV, class A>
SEGKERNELS_INLINE void spread_block(int64_t nodes, const Mixture<A>& m, int64_t t0, int64_t c, A* y,
                                    int64_t y_step) {
  constexpr int64_t lanes = Vec<A>::lanes;
  Vec<A> sum[kT][kV], square[kT][kV];
#pragma GCC unroll 4
  for (int64_t t = 0; t < kT; ++t)
#pragma GCC unroll 4
    for (int64_t v = 0; v < kV; ++v) sum[t][v] = square[t][v] = splat(A(0));
  for (int64_t k = 0; k < nodes; ++k) {
    const A *q = m.q[k] + t0, *dl = nullptr;
    if constexpr (is_gradient<kKind>) dl = m.dl[k] + t0;
#pragma GCC unroll 4
    for (int64_t v = 0; v < kV; ++v) {
      const int64_t at = c + v * lanes;
      const Vec<A> h = load(m.h[k] + at);
      Vec<A> p, r;
      if constexpr (is_gradient<kKind>) p = load(m.p[k] + at);
      if constexpr (kKind == Spread::gradient) r = load(m.r[k] + at);
#pragma GCC unroll 4
      for (int64_t t = 0; t < kT; ++t) {
        sum[t][v] = fma(splat(q[t]), h, sum[t][v]);
        if constexpr (is_gradient<kKind>) sum[t][v] = fma(splat(dl[t]), p, sum[t][v]);
        if constexpr (kKind == Spread::gradient) square[t][v] = fma(splat(dl[t]), r, square[t][v]);
      }
    }
  }
#pragma GCC unroll 4
  for (int64_t t = 0; t < kT; ++t)
#pragma GCC unroll 4
    for (int64_t v = 0; v < kV; ++v) {
      const int64_t at = c + v * lanes;
      Vec<A> s = sum[t][v];
      if constexpr (kKind == Spread::nodes_and_residual) s = s + load(m.x[t0 + t] + at);
      if constexpr (kKind == Spread::gradient) s = fma(load(m.x[t0 + t] + at) * splat(A(2)), square[t][v], s);
      if constexpr (kKind == Spread::gradient_of_norms)
        s = fma(load(m.x[t0 + t] + at), splat(m.u[t0 + t]), s);
      store(y + t * y_step + at, s);
    }
}

// y[t][c] for the first `pixels` pixels, rounded up to four; channels is a multiple of the lanes.
template <Spread kKind, class A>
void spread(int64_t pixels, int64_t channels, int64_t nodes, const Mixture<A>& m, Rows<A> y) {
  constexpr int64_t lanes = Vec<A>::lanes, kT = 4, kV = kKind == Spread::gradient ? kVectors / 2 : kVectors;
  int64_t c = 0;
  for (; c + kV * lanes <= channels; c += kV * lanes)
    for (int64_t t = 0; t < pixels; t += kT) spread_block<kKind, kT, kV>(nodes, m, t, c, y[t], y.step);
  for (; c < channels; c += lanes)
    for (int64_t t = 0; t < pixels; t += kT) spread_block<kKind, kT, 1>(nodes, m, t, c, y[t], y.step);
}

}  // namespace SEGKERNELS_ISA
}  // namespace
}  // namespace segkernels
