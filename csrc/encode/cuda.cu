// encode on CUDA: allocate, launch, register.
#include "encode/kernels.cuh"

#include <tuple>

#include "soft_assign/launch.h"

namespace segkernels::cuda {
namespace {

void check(const Tensor& x, const Tensor& c, const Tensor& s) {
  STD_TORCH_CHECK(
      x.dim() == 4 && c.dim() == 2 && c.size(1) == x.size(1) && s.dim() == 1 && s.size(0) == c.size(0),
      "segkernels: x [B, C, H, W], c [K, C] and s [K] do not fit");
  for (const Tensor* t : {&c, &s})
    STD_TORCH_CHECK(t->scalar_type() == acc_type(x.scalar_type()),
                    "segkernels: c and s must be of the accumulation type");
}

template <class A>
ScoreCoefficients coefficients(const Queue& queue, const Tensor& c, const Tensor& s) {
  const int64_t K = c.size(0), C = c.size(1);
  const ScoreCoefficients made(c, K, C);
  queue.launch(&encode_coefficients_kernel<A>, made.parts(C), COEFFICIENT_THREADS, 0, const_data<A>(c),
               const_data<A>(s), int(K), int(C), made.on_device<A>());
  return made;
}

using Three = std::tuple<Tensor, Tensor, Tensor>;

Three encode(Tensor x, Tensor c, Tensor s) {
  const Queue queue(x);
  check(x, c, s);
  c = dense(c), s = dense(s);
  const int64_t B = x.size(0), K = c.size(0), C = c.size(1);
  const Tensor e = empty(x, {B, K, C}), m = empty(c, {B, K});
  Tensor q;
  by_storage(x, [&](auto storage) {
    using T = decltype(storage);
    using A = acc_t<T>;
    const ScoreCoefficients nodes = coefficients<A>(queue, c, s);
    q = assign(queue, x, nodes);
    const Gathered gathered = gather_images(queue, q, x, nodes.centre);
    queue.launch(&encode_residuals_kernel<T>, B * K, BLOCK, 0, const_data<A>(gathered.sums),
                 const_data<A>(gathered.masses), gathered.splits(), const_data<A>(c),
                 const_data<A>(nodes.centre), int(K), int(C), mutable_data<T>(e), mutable_data<A>(m));
  });
  return {e, q, m};
}

Three encode_backward(Tensor de, Tensor x, Tensor c, Tensor s, Tensor q, Tensor m, Ints need) {
  const Queue queue(x);
  check(x, c, s);
  STD_TORCH_CHECK(need.size() == 3, "segkernels: need must have 3 elements");
  de = dense(de), c = dense(c), s = dense(s), m = dense(m);
  const int64_t B = x.size(0), K = c.size(0), C = c.size(1);
  Tensor dx = empty(x, {0});
  const Tensor dc = need[1] ? empty(c, {K, C}) : empty(c, {0});
  const Tensor ds = need[2] ? empty(c, {K}) : empty(c, {0});
  by_storage(x, [&](auto storage) {
    using T = decltype(storage);
    using A = acc_t<T>;
    const ScoreCoefficients nodes = coefficients<A>(queue, c, s);
    const Tensor h = empty(c, {B, K, C}), t = empty(c, {B, K});
    queue.launch(&encode_cotangents_kernel<T>, B * K, BLOCK, 0, const_data<T>(de), const_data<A>(c),
                 const_data<A>(nodes.centre), int(K), int(C), mutable_data<A>(h), mutable_data<A>(t));
    const Tensor dl = map_like(q, K, q.scalar_type());
    assignment_gradient(queue, x, nodes.centre, h, t, q, std::nullopt, dl);
    if (need[0]) dx = features_gradient(queue, x, nodes, h, q, dl);
    if (!need[1] && !need[2]) return;
    const Gathered a = gather_squares(queue, dl, x, nodes.centre);
    queue.launch(&encode_finish_kernel<A>, K, BLOCK, 0, const_data<A>(a.sums), const_data<A>(a.masses),
                 a.splits(), const_data<A>(c), const_data<A>(s), const_data<A>(nodes.centre),
                 const_data<A>(h), const_data<A>(m), B, int(K), int(C),
                 need[1] ? mutable_data<A>(dc) : nullptr, need[2] ? mutable_data<A>(ds) : nullptr);
  });
  return {dx, dc, ds};
}

STABLE_TORCH_LIBRARY_IMPL(segkernels, CUDA, m) {
  m.impl("encode", TORCH_BOX(&encode));
  m.impl("encode_backward", TORCH_BOX(&encode_backward));
}

}  // namespace
}  // namespace segkernels::cuda
