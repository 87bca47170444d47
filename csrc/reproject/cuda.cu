// reproject on CUDA: allocate, launch, register.
#include <tuple>

#include "soft_assign/launch.h"

namespace segkernels::cuda {
namespace {

void check(const Tensor& z, const Tensor& q, const MaybeTensor& map) {
  STD_TORCH_CHECK(z.dim() == 3 && q.dim() == 4 && q.size(0) == z.size(0) && q.size(1) == z.size(1) &&
                      q.scalar_type() == acc_type(z.scalar_type()),
                  "segkernels: z [B, K, D] and q [B, K, H, W] of the accumulation type do not fit");
  STD_TORCH_CHECK(!map || (map->dim() == 4 && map->size(0) == z.size(0) && map->size(1) == z.size(2) &&
                           map->size(2) == q.size(2) && map->size(3) == q.size(3) &&
                           map->scalar_type() == z.scalar_type()),
                  "segkernels: r and dy must be [B, D, H, W], of z's type");
}

Tensor reproject(Tensor z, Tensor q, MaybeTensor r) {
  const Queue queue(z);
  check(z, q, r);
  const bool channels_last = is_channels_last(map_of(r ? *r : q));
  const Tensor y = empty_map(z, {z.size(0), z.size(2), q.size(2), q.size(3)}, channels_last);
  reprojection(queue, dense(z), q, r, y);
  return y;
}

std::tuple<Tensor, Tensor> reproject_backward(Tensor dy, Tensor z, Tensor q, Ints need) {
  const Queue queue(z);
  check(z, q, dy);
  STD_TORCH_CHECK(need.size() == 2, "segkernels: need must have 2 elements");
  const Tensor dz = need[0] ? empty(z, {z.size(0), z.size(1), z.size(2)}) : empty(z, {0});
  const Tensor dq = need[1] ? node_products(queue, dy, dense(z), q) : empty(q, {0});
  if (need[0]) add_parts(queue, gather_images(queue, q, dy, std::nullopt), dz);
  return {dz, dq};
}

STABLE_TORCH_LIBRARY_IMPL(segkernels, CUDA, m) {
  m.impl("reproject", TORCH_BOX(&reproject));
  m.impl("reproject_backward", TORCH_BOX(&reproject_backward));
}

}  // namespace
}  // namespace segkernels::cuda
