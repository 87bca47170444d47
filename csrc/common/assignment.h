// Soft assignment of pixels to nodes by a quadratic score, and its sums, as the CPU kernels see one call.
//
// With x̃ = x − centre: score[k][i] = ⟨p_k, x̃_i⟩ + ⟨r_k, x̃_i²⟩ + b_k (r per channel, or one number per node
// times ‖x̃_i‖²), q = softmax over k, E_k = Σ_i q_ik x̃_i, m_k = Σ_i q_ik. Work is cut into parts by the sizes
// alone; their sums are added in order, so results depend neither on the number of threads nor (forward) on
// the batch.
#pragma once

#include <algorithm>
#include <utility>

#include "common/ahead.h"
#include "common/pixels.h"

namespace segkernels {

// Node arrays have rows for whole groups of nodes.
inline int64_t node_rows(int64_t K) { return round_up(K, 4); }

constexpr int64_t kSample = 16;  // nodes whose median is the centre

// How many parts have sums of their own, of so many rows of nodes: together they are at most a quarter of the
// pixels, where those are many.
inline int64_t parts_of(int64_t blocks, int64_t pixels, int64_t rows) {
  return std::min(blocks, std::clamp<int64_t>(pixels / (4 * rows), 4, 16));
}

// The quadratic form. Rows of p and r are padded(C) apart, zero beyond the channels, node_rows(K) of them.
template <class A>
struct Quadratic {
  const A *centre, *p, *r, *b;
  bool norms;  // r has one number per node
};

// Sums over pixels: [parts][K] and [parts][rows][step]. Arrays of nodes of an image: [B][rows][step], [B][K].
template <class T>
struct Assignment {
  using A = acc_t<T>;
  Quadratic<A> form;
  Pixels x, q, dq, dx;
  int64_t K, rows, step,
      splits;  // splits: parts of an image, 0 in the backward, whose parts are of all images
  const T* x_data;
  A *q_data, *masses, *sums;  // forward
  const A *dq_data, *h, *t;   // backward; dq_data may be null
  T* dx_data;                 // null: not needed
  A *a0, *a1, *a2;            // a1 and a2 null: not needed; a2 is as r
  int64_t parts;
};

template <class T>
Assignment<T> assignment_of(const Tensor& x, const Tensor& q, const Quadratic<acc_t<T>>& form, int64_t K) {
  Assignment<T> call{};
  call.form = form;
  call.x = pixels_of(x);
  call.q = pixels_of(q);
  STD_TORCH_CHECK(call.q.B == call.x.B && call.q.C == K && call.q.N == call.x.N &&
                      q.scalar_type() == acc_type(x.scalar_type()),
                  "segkernels: the assignment must be [B, K, H, W] of the accumulation type");
  call.K = K;
  call.rows = node_rows(K);
  call.step = padded(call.x.C);
  call.x_data = const_data<T>(x);
  call.q_data = const_cast<acc_t<T>*>(const_data<acc_t<T>>(q));
  return call;
}

// A call of the forward with the memory of its sums.
template <class T>
struct Assigning {
  using A = acc_t<T>;
  Assignment<T> call;
  Tensor sums;

  Assigning(const Tensor& x, const Tensor& q, const Quadratic<A>& form, int64_t K)
      : call(assignment_of<T>(x, q, form, K)), sums(q) {
    call.splits = parts_of(call.x.blocks(), call.x.N, K);
    call.parts = call.x.B * call.splits;
    sums = empty(q, {call.parts * (call.rows * call.step + K)});
    call.sums = mutable_data<A>(sums);
    call.masses = call.sums + call.parts * call.rows * call.step;
  }
  int64_t parts() const { return call.parts; }
  int64_t splits() const { return call.splits; }
  int64_t cost() const { return call.x.N * call.x.C * call.K * 3 / call.splits; }
};

// A call of the backward with the memory of its sums and of what comes from the nodes, which is zero at
// first.
template <class T>
struct Differentiating {
  using A = acc_t<T>;
  Assignment<T> call;
  Tensor sums, dq;
  std::vector<A> h, t;

  Differentiating(const Tensor& x, const Tensor& q, const std::optional<Tensor>& given_dq,
                  const Quadratic<A>& form, int64_t K, const Tensor& dx, bool want_nodes)
      : call(assignment_of<T>(x, q, form, K)), sums(q), dq(given_dq ? as_pixels(*given_dq) : q) {
    call.parts = parts_of(call.x.B * call.x.blocks(), call.x.B * call.x.N, 2 * K);
    h.resize(call.x.B * call.rows * call.step);
    t.resize(call.x.B * K);
    call.h = h.data();
    call.t = t.data();
    if (given_dq) {
      call.dq = pixels_of(dq);
      STD_TORCH_CHECK(call.dq.B == call.q.B && call.dq.C == K && call.dq.N == call.q.N &&
                          dq.scalar_type() == q.scalar_type(),
                      "segkernels: dq must be as q");
      call.dq_data = const_data<A>(dq);
    }
    if (dx.numel()) {
      call.dx = pixels_of(dx);
      call.dx_data = mutable_data<T>(dx);
    }
    const int64_t first = call.rows * call.step, second = form.norms ? K : first;
    sums = empty(q, {call.parts * (K + want_nodes * (first + second))});
    call.a0 = mutable_data<A>(sums);
    if (want_nodes) {
      call.a1 = call.a0 + call.parts * K;
      call.a2 = call.a1 + call.parts * first;
    }
  }
  int64_t parts() const { return call.parts; }
  int64_t cost() const { return call.x.B * call.x.N * call.x.C * call.K * 6 / call.parts; }
};

}  // namespace segkernels
