// The sweeps of the backward: through the reconstruction, then through one iteration after the other.
// Included by em_attention/cpu_kernels.h.

namespace segkernels {
namespace {
namespace SEGKERNELS_ISA {

// A thread's block on its way through a sweep.
template <class T>
struct Sweep {
  using A = acc_t<T>;
  const Backward<T>& call;
  const Sizes& s;
  const int64_t columns, size;  // of a z, of the sums of a part
  Scratch memory;
  Block<T> b;
  Rows<A> dl;

  explicit Sweep(const Backward<T>& of)
      : call(of),
        s(of.sizes),
        columns(s.columns()),
        size(s.sum_size()),
        memory(Block<T>::bytes(s) + kBlock * s.step() * int64_t(sizeof(A)) + 64),
        b(s, memory),
        dl{memory.take<A>(kBlock * s.step()), s.step()} {}

  Rows<A> stash(int64_t image, int64_t block, int64_t place) const {
    const int64_t step = call.kept().size() * columns;
    return {call.stash + (image * s.N + block * kBlock) * step + place * columns, step};
  }
  void copy(int64_t pixels, Rows<A> from, Rows<A> to) const {
    for (int64_t t = 0; t < pixels; ++t) std::copy_n(from[t], columns, to[t]);
  }

  // The E-step of a block whose pixels are loaded.
  void expect(int64_t image, int64_t block, int64_t step, Ahead ahead = {}) const {
    const int64_t pixels = s.pixels(block);
    b.multiply(pixels, columns, s.C, b.x, call.scores[call.at(image, step)], b.scores, false, ahead);
    responsibilities(pixels, columns, b.read(b.scores), call.bias, b.z);
  }
  // dx of a block: Σ of z da + dl λμ over the steps. Those of the first are at hand.
  void write_dx(int64_t image, int64_t block) const {
    const int64_t pixels = s.pixels(block), last = call.steps - 1;
    const Rows<A> dx = b.target(call.dx, image, block);
    b.multiply(pixels, s.C, columns, dl, call.through_dl[call.at(image, 0)], dx, false,
               b.ahead(call.dx, image, block + 1));
    if (call.depth > 0) b.multiply(pixels, s.C, columns, b.z, call.through_z[call.at(image, 0)], dx, true);
    for (int64_t step = 1; step <= last; ++step) {
      Rows<A> z = stash(image, block, call.kept().z(step));
      if (step == last && call.kept().loses_last()) expect(image, block, step), z = b.z;
      b.multiply(pixels, s.C, columns, stash(image, block, call.kept().dl(step)),
                 call.through_dl[call.at(image, step)], dx, true);
      b.multiply(pixels, s.C, columns, z, call.through_z[call.at(image, step)], dx, true);
    }
    b.deliver(dx, call.dx, image, block);
  }
  // What follows dl of a block and a step: u += Σ dl x, and what later sweeps need, or dx.
  void finish(int64_t image, int64_t block, int64_t part, int64_t step) const {
    const int64_t pixels = s.pixels(block), last = call.steps - 1;
    if (call.wants_u(step)) b.sum(pixels, dl, b.x, s.C, call.u + part * size, block > s.first_block(part));
    if (step == 0) {
      if (call.dx.data) write_dx(image, block);
      return;
    }
    copy(pixels, dl, stash(image, block, call.kept().dl(step)));
    if (step < last) copy(pixels, b.z, stash(image, block, call.kept().z(step)));
  }

  // dl = dz of the last step, from y and z; zero where neither has a cotangent. y's is in `out`.
  void cotangent(int64_t image, int64_t block) const {
    const int64_t pixels = s.pixels(block);
    if (call.dy.data)
      b.multiply(pixels, columns, s.C, b.out, call.given[image], b.scores, false,
                 b.ahead(call.dy, image, block + 1));
    if (call.dz.data) b.load_map(call.dz, image, block, dl);
    for (int64_t t = 0; t < pixels; ++t)
      for (int64_t k = 0; k < columns; k += Vec<A>::lanes) {
        const Mask m = lane_range<A>(0, s.K - k);
        Vec<A> g = splat(A(0));
        if (call.dy.data) g = load(static_cast<const A*>(b.scores[t]) + k);
        if (call.dz.data) g = g + load<A>(dl[t] + k, m);
        store(dl[t] + k, g);
      }
  }

  // Through the reconstruction: z and dz of the last step, Σ z dy; all there is to do where bases are
  // constants.
  void reconstruction(int64_t part) const {
    const int64_t image = part / s.splits, step = call.steps - 1;
    const bool fitted = call.depth > 0 || call.want_bases;
    if (fitted && !call.dy.data) std::fill_n(call.fitted + part * size, size, A(0));
    for (int64_t block = s.first_block(part); block < s.last_block(part); ++block) {
      const int64_t pixels = b.load_map(call.x, image, block, b.x);
      expect(image, block, step, b.ahead(call.x, image, block + 1));
      if (call.dy.data) {
        b.load_map(call.dy, image, block, b.out);
        if (fitted) b.sum(pixels, b.z, b.out, s.C, call.fitted + part * size, block > s.first_block(part));
      }
      cotangent(image, block);
      if (call.depth > 0) {
        copy(pixels, b.z, stash(image, block, call.kept().z(step)));
        copy(pixels, dl, stash(image, block, call.kept().dl(step)));
      } else {
        slopes(pixels, columns, b.read(b.z), dl);
        finish(image, block, part, step);
      }
    }
  }

  // Through an iteration, whose da and ds are known.
  void iteration(int64_t part, int64_t step) const {
    const int64_t image = part / s.splits;
    const A* shift = call.shift + image * columns;
    for (int64_t block = s.first_block(part); block < s.last_block(part); ++block) {
      const int64_t pixels = b.load_map(call.x, image, block, b.x);
      b.multiply(pixels, columns, s.C, b.x, call.given[image], b.scores, false,
                 b.ahead(call.x, image, block + 1));
      if (step == call.steps - 1) {
        copy(pixels, stash(image, block, call.kept().z(step)), b.z);
        add_scores<true>(pixels, columns, b.read(b.scores), shift, stash(image, block, call.kept().dl(step)),
                         dl);
      } else {
        add_scores<false>(pixels, columns, b.read(b.scores), shift, Rows<A>{}, dl);
        expect(image, block, step);
      }
      slopes(pixels, columns, b.read(b.z), dl);
      finish(image, block, part, step);
    }
  }
};

template <class T>
void sweep_reconstruction(const Backward<T>& call, int64_t first, int64_t last) {
  const Sweep<T> sweep(call);
  for (int64_t part = first; part < last; ++part) sweep.reconstruction(part);
}
template <class T>
void sweep_iteration(const Backward<T>& call, int64_t step, int64_t first, int64_t last) {
  const Sweep<T> sweep(call);
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

// A row of the tables' rows.
template <class T>
acc_t<T>* table_row(const Backward<T>& call, int64_t image, int64_t k) {
  const Sizes& s = call.sizes;
  return call.given.rows + (image * s.columns() + k) * row_step(s.C);
}
// λμ of the bases before a step.
template <class T>
void heat_row(const Backward<T>& call, int64_t image, int64_t step, int64_t k) {
  const Sizes& s = call.sizes;
  const acc_t<T>* mu = call.before(image, step) + k * s.C;
  acc_t<T>* out = table_row(call, image, k);
  for (int64_t c = 0; c < s.C; ++c) out[c] = call.lam * mu[c];
}
template <class T>
void last_row(const Backward<T>& call, int64_t image, int64_t k) {
  const Sizes& s = call.sizes;
  std::copy_n(call.m + (image * s.K + k) * s.C, s.C, table_row(call, image, k));
}

// dμ^T = Σ z dy + dm.
template <class T>
void fitted_row(const Backward<T>& call, int64_t image, int64_t k) {
  using A = acc_t<T>;
  const Sizes& s = call.sizes;
  const int64_t step = row_step(s.C), at = (image * s.K + k) * s.C;
  std::vector<A> row(step);
  sum_parts(static_cast<const A*>(call.fitted), s.splits, s.sum_rows(), step, image, k, row.data());
  for (int64_t c = 0; c < s.C; ++c) call.dmu[at + c] = row[c] + (call.dm ? call.dm[at + c] : A(0));
}

// dμ^{t−1} = λ u and its share of dλ; `add` to what is there.
template <class T>
void scored_row(const Backward<T>& call, int64_t image, int64_t step, int64_t k, bool add) {
  using A = acc_t<T>;
  const Sizes& s = call.sizes;
  const int64_t width = row_step(s.C), at = (image * s.K + k) * s.C;
  std::vector<A> row(width);
  sum_parts(static_cast<const A*>(call.u), s.splits, s.sum_rows(), width, image, k, row.data());
  const A* mu = call.before(image, step) + k * s.C;
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
  const A* mu = step == call.steps - 1 ? call.m + at : call.before(image, step + 1) + k * s.C;
  const A r = call.r[moment];
  const Divisor<A> divisor(r, call.s[moment], call.clamp);
  const A along = inner(s.C, mu, dmu);
  const A turn = r == A(0) ? A(0) : along * divisor.by_r * (divisor.d / r);
  A* da = table_row(call, image, k);
  for (int64_t c = 0; c < s.C; ++c) da[c] = (dmu[c] - mu[c] * turn) / divisor.d;
  call.shift[image * s.columns() + k] = -along / divisor.d * divisor.by_s;
}

}  // namespace SEGKERNELS_ISA
}  // namespace
}  // namespace segkernels
