// y_i = r_i + Σ_k q_ik z_k, and its gradients, on the CPU.

#include "common/tensor.h"
#include "reproject/call.h"

#define SEGKERNELS_KERNELS "reproject/cpu_kernels.h"
#include "common/foreach_isa.h"

namespace segkernels {
namespace {

using namespace reprojection;
using Optional = std::optional<Tensor>;

void check(const Tensor& z, const Tensor& q) {
  const Map map = map_of(q);
  STD_TORCH_CHECK(z.dim() == 3 && z.size(0) == map.B && z.size(1) == map.C && map.C > 0 &&
                      q.scalar_type() == acc_type(z.scalar_type()),
                  "reproject: z must be [B, K, D], q [B, K, H, W] of the accumulation type");
}

// The call with z in the accumulation type.
template <class T>
struct Prepared {
  using A = acc_t<T>;
  Reprojection<T> call{};
  std::vector<A> z;

  Prepared(const Tensor& given_z, const Tensor& q, const Pixels& y) {
    call.y = y;
    call.q = pixels_of(q);
    call.K = call.q.C;
    call.rows = node_rows(call.K);
    call.step = padded(y.C);
    call.z_data = const_data<T>(given_z);
    call.q_data = const_data<A>(q);
    z.resize(y.B * call.rows * call.step);
    call.z = z.data();
    parallel_for(y.B * call.K, y.C, [&](int64_t first, int64_t last) {
      SEGKERNELS_BY_ISA(for (int64_t i = first; i < last; ++i) simd::widen_nodes<A>(
          call, i, call.z + (i / call.K * call.rows + i % call.K) * call.step))
    });
  }
};

Tensor reproject(Tensor z, Tensor q, Optional r) {
  check(z, q);
  const bool channels_last = is_channels_last(map_of(r ? *r : q));
  z = dense(z), q = as_pixels(q);
  const Map map = map_of(q);
  const Tensor y = empty_map(z, {map.B, z.size(2), map.H, map.W}, channels_last);
  if (r) {
    r = as_pixels(*r);
    const Map given = map_of(*r);
    STD_TORCH_CHECK(given.B == map.B && given.C == z.size(2) && given.H == map.H && given.W == map.W &&
                        r->scalar_type() == z.scalar_type(),
                    "reproject: r must be as y");
  }
  if (y.numel() == 0) return y;
  by_type(z.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Prepared<T> p(z, q, pixels_of(y));
    p.call.y_data = mutable_data<T>(y);
    if (r) p.call.r = pixels_of(*r), p.call.r_data = const_data<T>(*r);
    parallel_for(map.B * p.call.y.blocks(), kPixels * p.call.y.C * p.call.K,
                 [&](int64_t first, int64_t last) { SEGKERNELS_BY_ISA(simd::mix(p.call, first, last)) });
  });
  return y;
}

std::tuple<Tensor, Tensor> reproject_backward(Tensor dy, Tensor z, Tensor q, std::vector<int64_t> need) {
  check(z, q);
  STD_TORCH_CHECK(need.size() == 2, "reproject_backward: need has 2 numbers");
  const bool channels_last = is_channels_last(map_of(q));
  dy = as_pixels(dy), z = dense(z), q = as_pixels(q);
  const Map map = map_of(q);
  const Pixels pixels = pixels_of(dy);
  STD_TORCH_CHECK(pixels.B == map.B && pixels.C == z.size(2) && pixels.N == map.H * map.W &&
                      dy.scalar_type() == z.scalar_type(),
                  "reproject_backward: dy must be as y");
  const std::vector<int64_t> none{0};
  const Tensor dz = need[0] ? empty(z, {map.B, map.C, z.size(2)}) : empty(z, none);
  const Tensor dq = need[1] ? empty_map(q, {map.B, map.C, map.H, map.W}, channels_last) : empty(q, none);
  if (dy.numel() == 0) {
    for (Tensor t : {dz, dq}) torch::stable::zero_(t);
    return {dz, dq};
  }
  by_type(z.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    Prepared<T> p(z, q, pixels);
    Reprojection<T>& call = p.call;
    call.dy_data = const_data<T>(dy);
    call.splits = parts_of(pixels.blocks(), pixels.N, call.K);
    const int64_t parts = map.B * call.splits;
    const Tensor sums = empty(q, {need[0] ? parts * call.rows * call.step : 0});
    if (need[0]) call.sums = mutable_data<A>(sums);
    if (need[1]) call.dq = pixels_of(dq), call.dq_data = mutable_data<A>(dq);
    parallel_for(parts, 2 * pixels.N * pixels.C * call.K / call.splits, [&](int64_t first, int64_t last) {
      SEGKERNELS_BY_ISA(simd::mix_backward(call, first, last))
    });
    if (need[0])
      parallel_for(map.B * call.K, call.splits * pixels.C, [&](int64_t first, int64_t last) {
        std::vector<A> row(call.step);
        SEGKERNELS_BY_ISA(for (int64_t i = first; i < last; ++i)
                              simd::finish_row(call, i / call.K, i % call.K, row.data(), mutable_data<T>(dz)))
      });
  });
  return {dz, dq};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(segkernels, CPU, m) {
  m.impl("reproject", TORCH_BOX(&reproject));
  m.impl("reproject_backward", TORCH_BOX(&reproject_backward));
}

}  // namespace segkernels
