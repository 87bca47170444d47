// Blocks of pixels softly assigned to nodes, forward and backward (common/assignment.h). Compiled once per
// instruction set (no include guard).

#include "common/exponential.h"
#include "common/node_products.h"

namespace segkernels {
namespace {
namespace SEGKERNELS_ISA {

// -- blocks of maps -----------------------------------------------------------------------------------

// out[t][c] = map − centre (null: 0), zero beyond the channels, for `pixels` pixels; rows up to kPixels may
// be written.
template <class A, class T>
void load_block(const T* map, const Pixels& at, int64_t pixels, const A* centre, Rows<A> out) {
  constexpr int64_t lanes = Vec<A>::lanes;
  const Vec<A> zero = splat(A(0));
  if (at.channel == 1) {
    for (int64_t t = 0; t < pixels; ++t)
      for (int64_t c = 0; c < at.C; c += lanes) {
        const Mask m = lane_range<A>(0, at.C - c);
        const T* from = map + t * at.pixel + c;
        const Vec<A> x = m == all_lanes<A> ? load<A>(from) : load<A>(from, m);
        store(out[t] + c, centre ? x - load(centre + c) : x);
      }
    return;
  }
  for (int64_t c = 0; c < at.C; c += lanes)
    for (int64_t t = 0; t < pixels; t += lanes) {
      const Mask m = lane_range<A>(0, pixels - t);
      Vec<A> r[lanes];
#pragma GCC unroll 16
      for (int64_t l = 0; l < lanes; ++l) {
        r[l] = zero;
        if (c + l < at.C) {
          const T* from = map + (c + l) * at.channel + t;
          r[l] = m == all_lanes<A> ? load<A>(from) : load<A>(from, m);
          if (centre) r[l] = r[l] - splat(centre[c + l]);
        }
      }
      transpose(r);
#pragma GCC unroll 16
      for (int64_t l = 0; l < lanes; ++l) store(out[t + l] + c, r[l]);
    }
}

// Up to `most` pixels from `first` on of an image of a map, as memory that is needed next.
template <class T>
Ahead ahead_of(const T* image, const Pixels& at, int64_t first, int64_t most = kPixels) {
  const int64_t pixels = std::min(most, at.N - first), size = sizeof(T);
  const char* p = reinterpret_cast<const char*>(image + first * at.pixel);
  if (pixels <= 0) return {};
  if (at.channel == 1) return {p, pixels, at.pixel * size, at.C * size};
  return {p, at.C, at.channel * size, pixels * size};
}

// map = block[t][c]
template <class A, class T>
void store_block(Rows<const A> block, int64_t pixels, T* map, const Pixels& at) {
  constexpr int64_t lanes = Vec<A>::lanes;
  if (at.channel == 1) {
    for (int64_t t = 0; t < pixels; ++t)
      for (int64_t c = 0; c < at.C; c += lanes) {
        const Mask m = lane_range<A>(0, at.C - c);
        T* to = map + t * at.pixel + c;
        m == all_lanes<A> ? store(to, load(block[t] + c)) : store(to, load(block[t] + c), m);
      }
    return;
  }
  for (int64_t c = 0; c < at.C; c += lanes)
    for (int64_t t = 0; t < pixels; t += lanes) {
      const Mask m = lane_range<A>(0, pixels - t);
      Vec<A> r[lanes];
#pragma GCC unroll 16
      for (int64_t l = 0; l < lanes; ++l) r[l] = load(block[t + l] + c);
      transpose(r);
#pragma GCC unroll 16
      for (int64_t l = 0; l < lanes; ++l)
        if (c + l < at.C) {
          T* to = map + (c + l) * at.channel + t;
          m == all_lanes<A> ? store(to, r[l]) : store(to, r[l], m);
        }
    }
}

// The same with the nodes of a block along its rows, block[k][t]: a map's layouts change places.
inline Pixels turned(const Pixels& at) { return {at.B, at.N, at.C, at.sample, at.pixel, at.channel}; }

template <class A>
void load_nodes(const A* map, const Pixels& at, int64_t pixels, Rows<A> out) {
  Pixels nodes = turned(at);
  nodes.C = pixels;
  load_block(map, nodes, at.C, static_cast<const A*>(nullptr), out);
}
template <class A>
void store_nodes(Rows<const A> block, int64_t pixels, A* map, const Pixels& at) {
  Pixels nodes = turned(at);
  nodes.C = pixels;
  store_block(block, at.C, map, nodes);
}

// -- softmax ------------------------------------------------------------------------------------------

// Lanes of pixels beyond the block's become zero.
template <class A>
SEGKERNELS_INLINE Vec<A> within(Vec<A> a, int64_t pixels) {
  if (pixels >= Vec<A>::lanes) return a;
  A part[Vec<A>::lanes] = {};
  store(part, a, lane_range<A>(0, pixels));
  return load(static_cast<const A*>(part));
}

// In place: q[k][t] = softmax over k of q + b_k (+ r_k n_t, where n is given); zero for t ≥ pixels.
template <class A>
void softmax(int64_t pixels, int64_t nodes, Rows<A> q, const A* b, const A* r, const A* n) {
  constexpr int64_t lanes = Vec<A>::lanes;
  for (int64_t t = 0; t < pixels; t += lanes) {
    const Vec<A> norm = n ? load(n + t) : splat(A(0));
    Vec<A> most = splat(-std::numeric_limits<A>::infinity());
    for (int64_t k = 0; k < nodes; ++k) {
      Vec<A> s = load(q[k] + t) + splat(b[k]);
      if (n) s = fma(splat(r[k]), norm, s);
      store(q[k] + t, s);
      most = max(s, most);
    }
    Vec<A> total = splat(A(0));
    for (int64_t k = 0; k < nodes; ++k) {
      const Vec<A> e = exp_of_negative(load(q[k] + t) - most);
      store(q[k] + t, e);
      total = total + e;
    }
    const Vec<A> scale = {splat(A(1)).v / total.v};
    for (int64_t k = 0; k < nodes; ++k) store(q[k] + t, within(load(q[k] + t) * scale, pixels - t));
  }
}

// In place: g[k][t] = q (g + t_k − Σ_k q (g + t_k)); zero for t ≥ pixels.
template <class A>
void softmax_backward(int64_t pixels, int64_t nodes, Rows<const A> q, const A* shift, Rows<A> g) {
  constexpr int64_t lanes = Vec<A>::lanes;
  for (int64_t t = 0; t < pixels; t += lanes) {
    Vec<A> mean = splat(A(0));
    for (int64_t k = 0; k < nodes; ++k) {
      const Vec<A> gk = load(g[k] + t) + splat(shift[k]);
      store(g[k] + t, gk);
      mean = fma(load(q[k] + t), gk, mean);
    }
    for (int64_t k = 0; k < nodes; ++k)
      store(g[k] + t, within(load(q[k] + t) * (load(g[k] + t) - mean), pixels - t));
  }
}

// total[k] += Σ_t q[k][t]
template <class A>
void add_pixels(int64_t pixels, int64_t nodes, Rows<const A> q, A* total) {
  for (int64_t k = 0; k < nodes; ++k) {
    Vec<A> s = splat(A(0));
    for (int64_t t = 0; t < pixels; t += Vec<A>::lanes) s = s + load(q[k] + t);
    total[k] += sum(s);
  }
}

// -- assignment ---------------------------------------------------------------------------------------

template <class A>
void square_norms(int64_t pixels, int64_t channels, Rows<const A> x, A* n) {
  for (int64_t t = 0; t < pixels; ++t) n[t] = dot(channels, x[t], x[t]);
}

// centre[c]: the (lower) median of at most kSample of the nodes [K, C]. It stays among most of them wherever
// a few others are.
template <class A>
void median_node(const A* nodes, int64_t K, int64_t C, A* centre) {
  const int64_t step = ceil_div(K, kSample), taken = ceil_div(K, step);
  for (int64_t c = 0; c < C; c += Vec<A>::lanes) {
    const Mask m = lane_range<A>(0, C - c);
    Vec<A> sorted[kSample];
    for (int64_t i = 0; i < taken; ++i) sorted[i] = load<A>(nodes + i * step * C + c, m);
    for (int64_t pass = 0; pass < taken; ++pass)
      for (int64_t i = pass % 2; i + 1 < taken; i += 2) {
        const Vec<A> least = min(sorted[i], sorted[i + 1]);
        sorted[i + 1] = max(sorted[i], sorted[i + 1]);
        sorted[i] = least;
      }
    store(centre + c, sorted[(taken - 1) / 2], m);
  }
}

// A thread's blocks of x and of two assignments.
template <class A>
struct Workspace {
  int64_t width;  // channels in whole vectors
  std::vector<A> memory;
  Rows<A> x, y, q, g, dq;
  A norms[kPixels], u[kPixels];

  Workspace(int64_t channels, int64_t nodes, bool output)
      : width(round_up(channels, Vec<A>::lanes)),
        memory(kPixels * (padded(channels) * (1 + output) + 3 * round_up(nodes, 16))) {
    A* p = memory.data();
    for (Rows<A>* nodes_rows : {&q, &g, &dq}) {
      *nodes_rows = {p, kPixels};
      p += kPixels * round_up(nodes, 16);
    }
    x = {p, padded(channels)};
    y = {p + kPixels * x.step, x.step};
  }
  // Where to write a block of a map: into the map itself where it has room for all that is written.
  template <class T>
  Rows<A> output(T* map, const Pixels& at, int64_t pixels) const {
    if constexpr (std::is_same_v<A, T>)
      if (at.channel == 1 && at.C == width && pixels == kPixels) return {map, at.pixel};
    return y;
  }
  static Rows<const A> read(Rows<A> r) { return {r.p, r.step}; }
};

template <class T>
struct Blocks {
  using A = acc_t<T>;
  const Assignment<T>& call;
  Workspace<A> w;

  explicit Blocks(const Assignment<T>& of) : call(of), w(of.x.C, of.K, of.dx_data) {}

  int64_t load_x(int64_t image, int64_t first) {
    const int64_t pixels = std::min(kPixels, call.x.N - first);
    load_block(call.x_data + image * call.x.sample + first * call.x.pixel, call.x, pixels, call.form.centre,
               w.x);
    if (call.form.norms) square_norms(pixels, w.width, w.read(w.x), w.norms);
    return pixels;
  }
  Rows<const A> nodes(const A* p) const { return {p, call.step}; }

  // q, masses and sums of one part.
  void forward(int64_t part) {
    const int64_t splits = call.splits, image = part / splits, split = part % splits;
    A* mass = call.masses + part * call.K;
    const Rows<A> sums = {call.sums + part * call.rows * call.step, call.step};
    std::fill_n(mass, call.K, A(0));
    std::fill_n(sums.p, call.rows * call.step, A(0));
    const Quadratic<A>& f = call.form;
    for (int64_t block = split * call.x.blocks() / splits; block < (split + 1) * call.x.blocks() / splits;
         ++block) {
      const int64_t first = block * kPixels, pixels = load_x(image, first);
      const Ahead ahead = ahead_of(call.x_data + image * call.x.sample, call.x, first + kPixels);
      if (f.norms)
        scores<false>(pixels, w.width, call.K, w.read(w.x), nodes(f.p), {}, w.q, ahead);
      else
        scores<true>(pixels, w.width, call.K, w.read(w.x), nodes(f.p), nodes(f.r), w.q, ahead);
      softmax(pixels, call.K, w.q, f.b, f.r, f.norms ? w.norms : nullptr);
      add_pixels(pixels, call.K, w.read(w.q), mass);
      store_nodes(w.read(w.q), pixels, call.q_data + image * call.q.sample + first * call.q.pixel, call.q);
      gather<false>(pixels, w.width, call.K, w.read(w.q), w.read(w.x), sums, sums);
    }
  }

  // dx and the sums a0, a1, a2 of one part.
  void backward(int64_t part) {
    const int64_t blocks = call.x.B * call.x.blocks(), size = call.rows * call.step,
                  squares = call.form.norms ? call.K : size;
    A *a0 = call.a0 + part * call.K, *a2 = call.a2 + part * squares;
    const Rows<A> a1 = {call.a1 + part * size, call.step};
    std::fill_n(a0, call.K, A(0));
    if (call.a1) {
      std::fill_n(a1.p, size, A(0));
      std::fill_n(a2, squares, A(0));
    }
    for (int64_t block = part * blocks / call.parts; block < (part + 1) * blocks / call.parts; ++block) {
      const int64_t image = block / call.x.blocks(), first = block % call.x.blocks() * kPixels;
      const int64_t pixels = load_x(image, first);
      load_nodes<A>(call.q_data + image * call.q.sample + first * call.q.pixel, call.q, pixels, w.q);
      const Rows<const A> h = nodes(call.h + image * call.rows * call.step);
      const Ahead ahead = ahead_of(call.x_data + image * call.x.sample, call.x, first + kPixels);
      scores<false>(pixels, w.width, call.K, w.read(w.x), h, {}, w.g, ahead);
      if (call.dq_data) add_dq(image, first, pixels);
      softmax_backward(pixels, call.K, w.read(w.q), call.t + image * call.K, w.g);
      add_pixels(pixels, call.K, w.read(w.g), a0);
      if (call.a1) add_sums(pixels, a1, a2);
      if (call.dx_data) write_dx(image, first, pixels, h);
    }
  }

 private:
  void add_dq(int64_t image, int64_t first, int64_t pixels) {
    load_nodes<A>(call.dq_data + image * call.dq.sample + first * call.dq.pixel, call.dq, pixels, w.dq);
    for (int64_t k = 0; k < call.K; ++k)
      for (int64_t t = 0; t < pixels; t += Vec<A>::lanes)
        store(w.g[k] + t, load(w.g[k] + t) + load(w.dq[k] + t));
  }

  void add_sums(int64_t pixels, Rows<A> a1, A* a2) {
    const auto dl = w.read(w.g);
    if (!call.form.norms)
      return gather<true>(pixels, w.width, call.K, dl, w.read(w.x), a1, Rows<A>{a2, call.step});
    gather<false>(pixels, w.width, call.K, dl, w.read(w.x), a1, a1);
    for (int64_t k = 0; k < call.K; ++k) {
      A s = 0;
      for (int64_t t = 0; t < pixels; ++t) s += dl[k][t] * w.norms[t];
      a2[k] += s;
    }
  }

  void write_dx(int64_t image, int64_t first, int64_t pixels, Rows<const A> h) {
    const Quadratic<A>& f = call.form;
    T* dx = call.dx_data + image * call.dx.sample + first * call.dx.pixel;
    const Rows<A> y = w.output(dx, call.dx, pixels);
    const Mixture<A> m = {w.read(w.q), h, w.read(w.g), nodes(f.p), nodes(f.r), w.read(w.x), w.u};
    if (f.norms) {
      for (int64_t t = 0; t < pixels; ++t) {
        A u = 0;
        for (int64_t k = 0; k < call.K; ++k) u += w.g[k][t] * f.r[k];
        w.u[t] = 2 * u;
      }
      spread<Spread::gradient_of_norms>(pixels, w.width, call.K, m, y);
    } else {
      spread<Spread::gradient>(pixels, w.width, call.K, m, y);
    }
    if (y.p == w.y.p) store_block(w.read(y), pixels, dx, call.dx);
  }
};

// row[c] = Σ over the parts of an image of sums [image·parts][rows][step], for row k
template <class A>
void sum_parts(const A* sums, int64_t parts, int64_t rows, int64_t step, int64_t image, int64_t k, A* row) {
  std::fill_n(row, step, A(0));
  for (int64_t part = image * parts; part < (image + 1) * parts; ++part) {
    const A* from = sums + (part * rows + k) * step;
    for (int64_t c = 0; c < step; ++c) row[c] += from[c];
  }
}
// The same of totals [image·parts][K], one number a row.
template <class A>
A sum_parts(const A* totals, int64_t parts, int64_t K, int64_t image, int64_t k) {
  A total;
  sum_parts(totals, parts, K, 1, image, k, &total);
  return total;
}

template <class T>
void assign(const Assignment<T>& call, int64_t first, int64_t last) {
  Blocks<T> blocks(call);
  for (int64_t part = first; part < last; ++part) blocks.forward(part);
}
template <class T>
void assign_backward(const Assignment<T>& call, int64_t first, int64_t last) {
  Blocks<T> blocks(call);
  for (int64_t part = first; part < last; ++part) blocks.backward(part);
}

}  // namespace SEGKERNELS_ISA
}  // namespace
}  // namespace segkernels
