// The sweeps of the backward: through the reconstruction, then through one iteration after the other.
// Included by em_attention/cpu_kernels.h.

namespace segkernels {
namespace {
namespace SEGKERNELS_ISA {

// A thread's block on its way through a sweep.
template <class E, class T>
struct Sweep {
  using A = acc_t<T>;
  const Backward<T>& call;
  const Sizes& s;
  Scratch memory;
  Block<E, T> b;
  const int64_t columns, width;  // of a slot, of a row of the stash

  explicit Sweep(const Backward<T>& of)
      : call(of),
        s(of.sizes),
        memory(Block<E, T>::bytes(s, of.slots() * s.columns())),
        b(s, of.slots() * s.columns(), memory),
        columns(s.columns()),
        width(of.slots() * columns) {
    std::fill_n(b.z.p, kBlock * columns, A(0));  // what is loaded there ends at K
  }

  // z or dl of a block, of one step.
  Rows<A> slot(int64_t image, int64_t block, int64_t step, int64_t kind) const {
    return {call.stash + (image * s.N + block * kBlock) * width + call.slot(step, kind) * columns, width};
  }
  // The E-step of a block whose pixels are loaded.
  void expect(int64_t image, int64_t block, int64_t step) const {
    const int64_t pixels = s.pixels(block);
    b.multiply(pixels, columns, s.C, b.x, call.scores[image * call.steps + step], b.scores);
    responsibilities(pixels, columns, b.read(b.scores), call.bias, slot(image, block, step, 0));
  }
  // u += Σ dl x and, after the first step, dx of a block.
  void finish(int64_t image, int64_t block, int64_t part, int64_t step) const {
    const int64_t size = columns * row_step(s.C);
    if (step > 0 || call.want_u)
      b.sum(s.pixels(block), slot(image, block, step, 1), b.x, s.C, call.u + part * size);
    if (step > 0 || !call.dx.data) return;
    const int64_t skipped = call.depth == 0;  // no part of dx comes through z where bases are constants
    const int64_t slots = call.slots() - skipped;
    b.mix(image, block, slots * columns, slot(image, block, 0, skipped), call.coefficients[image], call.dx);
  }

  // z of the last E-step; dz of it from y and z, into the slot of dl, or dl; Σ z dy.
  void reconstruction(int64_t part) const {
    const int64_t image = part / s.splits, size = columns * row_step(s.C), step = call.steps - 1;
    std::fill_n(call.fitted + part * size, size, A(0));
    std::fill_n(call.u + part * size, size, A(0));
    for (int64_t block = s.first_block(part); block < s.last_block(part); ++block) {
      const int64_t pixels = b.load_map(call.x, image, block, b.x);
      expect(image, block, step);
      const Rows<A> z = slot(image, block, step, 0), dl = slot(image, block, step, 1);
      if (call.dz.data)
        b.load_map(call.dz, image, block, b.z);
      if (call.dy.data) {
        b.load_map(call.dy, image, block, b.out);
        b.multiply(pixels, columns, s.C, b.out, call.mixture[image], b.scores);
        if (call.depth > 0 || call.want_bases) b.sum(pixels, z, b.out, s.C, call.fitted + part * size);
      }
      for (int64_t t = 0; t < pixels; ++t)
        for (int64_t k = 0; k < columns; k += Vec<A>::lanes) {
          Vec<A> g = splat(A(0));
          if (call.dy.data) g = load(static_cast<const A*>(b.scores[t]) + k);
          if (call.dz.data) g = g + load(static_cast<const A*>(b.z[t]) + k);
          store((call.depth > 0 ? dl[t] : b.scores[t]) + k, g);
        }
      if (call.depth > 0) continue;
      slopes<false>(pixels, columns, b.read(z), b.scores, call.shift + image * columns, dl);
      finish(image, block, part, step);
    }
  }

  // dl and u of an iteration, whose da and ds are known.
  void iteration(int64_t part, int64_t step) const {
    const int64_t image = part / s.splits, size = columns * row_step(s.C);
    const bool last = step == call.steps - 1;
    std::fill_n(call.u + part * size, size, A(0));
    for (int64_t block = s.first_block(part); block < s.last_block(part); ++block) {
      const int64_t pixels = b.load_map(call.x, image, block, b.x);
      if (!last) expect(image, block, step);
      const Rows<A> z = slot(image, block, step, 0), dl = slot(image, block, step, 1);
      b.multiply(pixels, columns, s.C, b.x, call.slopes[image], b.scores);
      const A* shift = call.shift + image * columns;
      last ? slopes<true>(pixels, columns, b.read(z), b.scores, shift, dl)
           : slopes<false>(pixels, columns, b.read(z), b.scores, shift, dl);
      finish(image, block, part, step);
    }
  }
};

template <class E, class T>
void sweep_reconstruction(const Backward<T>& call, int64_t first, int64_t last) {
  const Sweep<E, T> sweep(call);
  for (int64_t part = first; part < last; ++part) sweep.reconstruction(part);
}
template <class E, class T>
void sweep_iteration(const Backward<T>& call, int64_t step, int64_t first, int64_t last) {
  const Sweep<E, T> sweep(call);
  for (int64_t part = first; part < last; ++part) sweep.iteration(part, step);
}

// -- bases, row by row of [B][K] -----------------------------------------------------------------------

// Σ_c a[c] b[c] of rows without padding.
template <class A>
A inner(int64_t channels, const A* a, const A* b) {
  Vec<A> s = splat(A(0));
  for (int64_t c = 0; c < channels; c += Vec<A>::lanes) {
    const Mask m = lane_range<A>(0, channels - c);
    s = fma(load<A>(a + c, m), load<A>(b + c, m), s);
  }
  return sum(s);
}

template <class T>
acc_t<T>* coefficients_row(const Backward<T>& call, int64_t image, int64_t step, int64_t kind, int64_t k) {
  const Sizes& s = call.sizes;
  const int64_t slot = image * call.slots() + call.slot(step, kind);
  return call.coefficients.rows + (slot * s.columns() + k) * row_step(s.C);
}

// λμ of the bases before an E-step.
template <class T>
void heat_row(const Backward<T>& call, int64_t image, int64_t step, int64_t k) {
  const Sizes& s = call.sizes;
  const acc_t<T>* mu = call.h + ((image * call.steps + step) * s.K + k) * s.C;
  acc_t<T>* out = coefficients_row(call, image, step, 1, k);
  for (int64_t c = 0; c < s.C; ++c) out[c] = call.lam * mu[c];
}
// μ^T, padded.
template <class T>
void mixture_row(const Backward<T>& call, int64_t image, int64_t k) {
  const Sizes& s = call.sizes;
  std::copy_n(call.m + (image * s.K + k) * s.C, s.C,
              call.mixture.rows + (image * s.columns() + k) * row_step(s.C));
}

// dμ^T = Σ z dy + dm (+ dmu, where T = 0 left its scores' part there).
template <class T>
void fitted_row(const Backward<T>& call, int64_t image, int64_t k) {
  using A = acc_t<T>;
  const Sizes& s = call.sizes;
  const int64_t step = row_step(s.C), at = (image * s.K + k) * s.C;
  std::vector<A> row(step);
  sum_parts(static_cast<const A*>(call.fitted), s.splits, s.columns(), step, image, k, row.data());
  for (int64_t c = 0; c < s.C; ++c) call.dmu[at + c] = row[c] + (call.dm ? call.dm[at + c] : A(0));
}

// dμ^{t−1} = λ u and its share of dλ; `add` to what is there.
template <class T>
void scored_row(const Backward<T>& call, int64_t image, int64_t step, int64_t k, bool add) {
  using A = acc_t<T>;
  const Sizes& s = call.sizes;
  const int64_t width = row_step(s.C), at = (image * s.K + k) * s.C;
  std::vector<A> row(width);
  sum_parts(static_cast<const A*>(call.u), s.splits, s.columns(), width, image, k, row.data());
  const A* mu = call.h + ((image * call.steps + step) * s.K + k) * s.C;
  double share = 0;
  for (int64_t c = 0; c < s.C; ++c) {
    share += double(mu[c]) * row[c];
    call.dmu[at + c] = call.lam * row[c] + (add ? call.dmu[at + c] : A(0));
  }
  call.dlam[image * s.K + k] += share;
}

// da and ds of the M-step after E-step `step`, from dμ.
template <class T>
void divide_row(const Backward<T>& call, int64_t image, int64_t step, int64_t k) {
  using A = acc_t<T>;
  const Sizes& s = call.sizes;
  const int64_t at = (image * s.K + k) * s.C, moment = (image * call.depth + step) * s.K + k;
  const A* dmu = call.dmu + at;
  const A* mu = step == call.steps - 1 ? call.m + at : call.h + ((image * call.steps + step + 1) * s.K + k) * s.C;
  const A r = call.r[moment];
  const Divisor<A> divisor(r, call.s[moment], call.clamp);
  const A along = inner(s.C, mu, dmu);
  const A turn = r == A(0) ? A(0) : along * divisor.by_r * (divisor.d / r);
  A* da = coefficients_row(call, image, step, 0, k);
  A* out = call.slopes.rows + (image * s.columns() + k) * row_step(s.C);
  for (int64_t c = 0; c < s.C; ++c) out[c] = da[c] = (dmu[c] - mu[c] * turn) / divisor.d;
  call.shift[image * s.columns() + k] = -along / divisor.d * divisor.by_s;
}

}  // namespace SEGKERNELS_ISA
}  // namespace
}  // namespace segkernels
