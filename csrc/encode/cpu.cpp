// q = softmax_k(s_k‖x − c_k‖²), e_k = Σ q (x − c_k), and their gradients, on the CPU.

#include "common/tensor.h"
#include "encode/call.h"

#define SEGKERNELS_KERNELS "encode/cpu_kernels.h"
#include "common/foreach_isa.h"

namespace segkernels {
namespace {

using namespace encoding;

// The quadratic form of the codewords, in memory of its own.
template <class A>
struct Form {
  std::vector<A> memory;
  Codewords<A> codewords;
  int64_t K, rows;

  Form(const Tensor& c, const Tensor& s)
      : memory((1 + 2 * node_rows(c.size(0))) * padded(c.size(1)) + 2 * c.size(0)),
        K(c.size(0)),
        rows(node_rows(K)) {
    const int64_t C = c.size(1), step = padded(C);
    const A *given = const_data<A>(c), *scale = const_data<A>(s);
    const auto [least, most] = std::minmax_element(scale, scale + K);
    A* at = memory.data();
    const auto take = [&](int64_t n) { return std::exchange(at, at + n); };
    const A shared = std::max(*least, A(0)) + std::min(*most, A(0));
    codewords = {C,       step,   given, scale, shared, take(step), take(rows * step), take(rows * step),
                 take(K), take(K)};
    SEGKERNELS_BY_ISA(simd::median_node(given, K, C, codewords.centre))
    parallel_for(K, 4 * C, [&](int64_t first, int64_t last) {
      SEGKERNELS_BY_ISA(for (int64_t k = first; k < last; ++k) simd::quadratic_row(codewords, k))
    });
  }
  Quadratic<A> quadratic() const { return {codewords.centre, codewords.p, codewords.r, codewords.b, true}; }
};

void check(const Tensor& x, const Tensor& c, const Tensor& s) {
  STD_TORCH_CHECK(
      c.dim() == 2 && c.size(0) > 0 && c.size(1) == map_of(x).C && s.dim() == 1 && s.size(0) == c.size(0),
      "encode: c must be [K, C] over the channels of x, s [K]");
  STD_TORCH_CHECK(c.scalar_type() == acc_type(x.scalar_type()) && s.scalar_type() == c.scalar_type(),
                  "encode: c and s must have the accumulation type of x");
}

std::tuple<Tensor, Tensor, Tensor> encode(Tensor x, Tensor c, Tensor s) {
  check(x, c, s);
  const bool channels_last = is_channels_last(map_of(x));
  x = as_pixels(x), c = dense(c), s = dense(s);
  const Map map = map_of(x);
  const int64_t K = c.size(0), C = c.size(1);
  const Tensor e = empty(x, {map.B, K, C}), q = empty_map(c, {map.B, K, map.H, map.W}, channels_last),
               m = empty(c, {map.B, K});
  if (x.numel() == 0) {
    for (Tensor t : {e, q, m}) torch::stable::zero_(t);
    return {e, q, m};
  }
  by_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    const Form<A> form(c, s);
    Assigning<T> part(x, q, form.quadratic(), K);
    parallel_for(part.parts(), part.cost(), [&](int64_t first, int64_t last) {
      SEGKERNELS_BY_ISA(simd::assign(part.call, first, last))
    });
    const ResidualSums<T> sums = {
        form.codewords,    K, form.rows, part.splits(), part.call.masses, part.call.sums, mutable_data<T>(e),
        mutable_data<A>(m)};
    parallel_for(map.B * K, C * (part.splits() + 2), [&](int64_t first, int64_t last) {
      std::vector<A> row(form.codewords.step);
      SEGKERNELS_BY_ISA(for (int64_t i = first; i < last; ++i)
                            simd::residual_row(sums, i / K, i % K, row.data()))
    });
  });
  return {e, q, m};
}

std::tuple<Tensor, Tensor, Tensor> encode_backward(Tensor de, Tensor x, Tensor c, Tensor s, Tensor q,
                                                   Tensor m, std::vector<int64_t> need) {
  check(x, c, s);
  STD_TORCH_CHECK(need.size() == 3, "encode_backward: need has 3 numbers");
  const bool channels_last = is_channels_last(map_of(x));
  de = dense(de), x = as_pixels(x), c = dense(c), s = dense(s), q = as_pixels(q), m = dense(m);
  const Map map = map_of(x);
  const int64_t K = c.size(0), C = c.size(1);
  STD_TORCH_CHECK(de.numel() == map.B * K * C && de.scalar_type() == x.scalar_type() &&
                      m.numel() == map.B * K && m.scalar_type() == c.scalar_type(),
                  "encode_backward: de must be [B, K, C] of x's type, m [B, K] of the type of c");
  const std::vector<int64_t> none{0};
  const Tensor dx = need[0] ? empty_map(x, {map.B, C, map.H, map.W}, channels_last) : empty(x, none);
  const Tensor dc = empty(c, need[1] ? std::vector<int64_t>{K, C} : none),
               ds = empty(c, need[2] ? std::vector<int64_t>{K} : none);
  if (x.numel() == 0) {
    for (Tensor t : {dx, dc, ds}) torch::stable::zero_(t);
    return {dx, dc, ds};
  }
  by_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    const Form<A> form(c, s);
    Differentiating<T> part(x, q, std::nullopt, form.quadratic(), K, dx, need[1] || need[2]);
    parallel_for(map.B * K, 2 * C, [&](int64_t first, int64_t last) {
      SEGKERNELS_BY_ISA(for (int64_t i = first; i < last; ++i) simd::cotangent_row<T>(
          form.codewords, const_data<T>(de) + i * C, i % K,
          part.h.data() + (i / K * form.rows + i % K) * form.codewords.step, part.t.data() + i))
    });
    parallel_for(part.parts(), part.cost(), [&](int64_t first, int64_t last) {
      SEGKERNELS_BY_ISA(simd::assign_backward(part.call, first, last))
    });
    if (!need[1] && !need[2]) return;
    const CodewordGradients<A> gradients = {form.codewords,
                                            map.B,
                                            K,
                                            form.rows,
                                            part.parts(),
                                            part.call.a0,
                                            part.call.a1,
                                            part.call.a2,
                                            part.h.data(),
                                            const_data<A>(m),
                                            need[1] ? mutable_data<A>(dc) : nullptr,
                                            need[2] ? mutable_data<A>(ds) : nullptr};
    parallel_for(K, C * (part.parts() + map.B), [&](int64_t first, int64_t last) {
      std::vector<A> row(form.codewords.step);
      SEGKERNELS_BY_ISA(for (int64_t k = first; k < last; ++k) simd::gradient_row(gradients, k, row.data()))
    });
  });
  return {dx, dc, ds};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(segkernels, CPU, m) {
  m.impl("encode", TORCH_BOX(&encode));
  m.impl("encode_backward", TORCH_BOX(&encode_backward));
}

}  // namespace segkernels
