// q = softmax_k(−½‖(x − w_k)/s_k‖²), e_k = Σ q (x − w_k), z from e and the masses, and their gradients, on
// the CPU.

#include "common/tensor.h"
#include "soft_assign/call.h"

#define SEGKERNELS_KERNELS "soft_assign/cpu_kernels.h"
#include "common/foreach_isa.h"

namespace segkernels {
namespace {

using namespace soft_assignment;
using Optional = std::optional<Tensor>;

// The quadratic form of the nodes, in memory of its own.
template <class A>
struct Form {
  std::vector<A> memory;
  Nodes<A> nodes;
  int64_t K, rows;

  Form(const Tensor& w, const Tensor& s)
      : memory((2 + 4 * node_rows(w.size(0))) * padded(w.size(1)) + w.size(0)),
        K(w.size(0)),
        rows(node_rows(K)) {
    const int64_t C = w.size(1), step = padded(C);
    A* at = memory.data();
    const auto take = [&](int64_t n) { return std::exchange(at, at + n); };
    nodes = {C,
             step,
             const_data<A>(w),
             const_data<A>(s),
             take(step),
             take(step),
             take(rows * step),
             take(rows * step),
             take(rows * step),
             take(rows * step),
             take(K)};
    SEGKERNELS_BY_ISA(simd::common_rows(nodes, K))
    parallel_for(K, 8 * C, [&](int64_t first, int64_t last) {
      SEGKERNELS_BY_ISA(for (int64_t k = first; k < last; ++k) simd::quadratic_row(nodes, k))
    });
  }
  Quadratic<A> quadratic() const { return {nodes.centre, nodes.p, nodes.r, nodes.b, false}; }
};

void check(const Tensor& x, const Tensor& w, const Tensor& s) {
  STD_TORCH_CHECK(w.dim() == 2 && w.size(0) > 0 && w.size(1) == map_of(x).C && s.dim() == 2 &&
                      s.size(0) == w.size(0) && s.size(1) == w.size(1),
                  "soft_assign: w and s must be [K, C] over the channels of x");
  STD_TORCH_CHECK(w.scalar_type() == acc_type(x.scalar_type()) && s.scalar_type() == w.scalar_type(),
                  "soft_assign: w and s must have the accumulation type of x");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> soft_assign(Tensor x, Tensor w, Tensor s, bool average,
                                                       bool normalise, double eps) {
  check(x, w, s);
  const bool channels_last = is_channels_last(map_of(x));
  x = as_pixels(x), w = dense(w), s = dense(s);
  const Map map = map_of(x);
  const int64_t K = w.size(0), C = w.size(1);
  const Tensor z = empty(x, {map.B, K, C}), q = empty_map(w, {map.B, K, map.H, map.W}, channels_last),
               e = empty(w, {map.B, K, C}), m = empty(w, {map.B, K});
  if (x.numel() == 0) {
    for (Tensor t : {z, q, e, m}) torch::stable::zero_(t);
    return {z, q, e, m};
  }
  by_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    const Form<A> form(w, s);
    Assigning<T> part(x, q, form.quadratic(), K);
    parallel_for(part.parts(), part.cost(), [&](int64_t first, int64_t last) {
      SEGKERNELS_BY_ISA(simd::assign(part.call, first, last))
    });
    const NodeSums<T> sums = {
        form.nodes, K,         form.rows, part.splits(),      part.call.masses,   part.call.sums,
        average,    normalise, eps,       mutable_data<T>(z), mutable_data<A>(e), mutable_data<A>(m)};
    parallel_for(map.B * K, C * (part.splits() + 8), [&](int64_t first, int64_t last) {
      std::vector<A> row(form.nodes.step);
      SEGKERNELS_BY_ISA(for (int64_t i = first; i < last; ++i) simd::node_row(sums, i / K, i % K, row.data()))
    });
  });
  return {z, q, e, m};
}

std::tuple<Tensor, Tensor, Tensor> soft_assign_backward(Optional dz, Optional dq, Tensor x, Tensor w,
                                                        Tensor s, Tensor q, Tensor e, Tensor m, bool average,
                                                        bool normalise, double eps,
                                                        std::vector<int64_t> need) {
  check(x, w, s);
  STD_TORCH_CHECK(need.size() == 3, "soft_assign_backward: need has 3 numbers");
  const bool channels_last = is_channels_last(map_of(x));
  x = as_pixels(x), w = dense(w), s = dense(s), q = as_pixels(q), e = dense(e), m = dense(m);
  const Map map = map_of(x);
  const int64_t K = w.size(0), C = w.size(1);
  const std::vector<int64_t> none{0};
  STD_TORCH_CHECK(e.numel() == map.B * K * C && e.scalar_type() == w.scalar_type() &&
                      m.numel() == map.B * K && m.scalar_type() == w.scalar_type(),
                  "soft_assign_backward: e must be [B, K, C] and m [B, K], of the type of w");
  if (dz) {
    dz = dense(*dz);
    STD_TORCH_CHECK(dz->numel() == map.B * K * C && dz->scalar_type() == x.scalar_type(),
                    "soft_assign_backward: dz must be [B, K, C] of x's type");
  }
  const Tensor dx = need[0] ? empty_map(x, {map.B, C, map.H, map.W}, channels_last) : empty(x, none);
  const Tensor dw = empty(w, need[1] ? std::vector<int64_t>{K, C} : none),
               ds = empty(w, need[2] ? std::vector<int64_t>{K, C} : none);
  if (x.numel() == 0) {
    for (Tensor t : {dx, dw, ds}) torch::stable::zero_(t);
    return {dx, dw, ds};
  }
  by_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    const Form<A> form(w, s);
    Differentiating<T> part(x, q, dq, form.quadratic(), K, dx, need[1] || need[2]);
    if (dz) {
      const NodeCotangents<T> given = {form.nodes,         K,
                                       form.rows,          average,
                                       normalise,          eps,
                                       const_data<T>(*dz), const_data<A>(e),
                                       const_data<A>(m),   part.h.data(),
                                       part.t.data()};
      parallel_for(map.B * K, 12 * C, [&](int64_t first, int64_t last) {
        std::vector<A> row(form.nodes.step);
        SEGKERNELS_BY_ISA(for (int64_t i = first; i < last; ++i)
                              simd::cotangent_row(given, i / K, i % K, row.data()))
      });
    }
    parallel_for(part.parts(), part.cost(), [&](int64_t first, int64_t last) {
      SEGKERNELS_BY_ISA(simd::assign_backward(part.call, first, last))
    });
    if (!need[1] && !need[2]) return;
    const NodeGradients<A> gradients = {form.nodes,
                                        map.B,
                                        K,
                                        form.rows,
                                        part.parts(),
                                        part.call.a0,
                                        part.call.a1,
                                        part.call.a2,
                                        part.h.data(),
                                        const_data<A>(e),
                                        const_data<A>(m),
                                        need[1] ? mutable_data<A>(dw) : nullptr,
                                        need[2] ? mutable_data<A>(ds) : nullptr};
    parallel_for(K, 2 * C * (part.parts() + map.B), [&](int64_t first, int64_t last) {
      std::vector<A> rows(2 * form.nodes.step);
      SEGKERNELS_BY_ISA(for (int64_t k = first; k < last; ++k)
                            simd::gradient_row(gradients, k, rows.data(), rows.data() + form.nodes.step))
    });
  });
  return {dx, dw, ds};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(segkernels, CPU, m) {
  m.impl("soft_assign", TORCH_BOX(&soft_assign));
  m.impl("soft_assign_backward", TORCH_BOX(&soft_assign_backward));
}

}  // namespace segkernels
