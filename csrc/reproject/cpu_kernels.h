// Blocks of pixels as mixtures of nodes, forward and backward. Compiled once per instruction set (no include
// guard).

#include "common/assignment_kernels.h"

namespace segkernels {
namespace {
namespace SEGKERNELS_ISA {

using namespace reprojection;

template <class A, class T>
void widen_nodes(const Reprojection<T>& call, int64_t row, A* out) {
  const T* z = call.z_data + row * call.y.C;
  for (int64_t c = 0; c < call.y.C; c += Vec<A>::lanes)
    store(out + c, load<A>(z + c, lane_range<A>(0, call.y.C - c)));
}

template <class T>
void mix(const Reprojection<T>& call, int64_t first_block, int64_t last_block) {
  using A = acc_t<T>;
  Workspace<A> w(call.y.C, call.K, true);
  for (int64_t block = first_block; block < last_block; ++block) {
    const int64_t image = block / call.y.blocks(), first = block % call.y.blocks() * kPixels,
                  pixels = std::min(kPixels, call.y.N - first);
    load_nodes<A>(call.q_data + image * call.q.sample + first * call.q.pixel, call.q, pixels, w.q);
    Mixture<A> m{w.read(w.q), {call.z + image * call.rows * call.step, call.step}, {}, {}, {}, w.read(w.x),
                 nullptr};
    T* map = call.y_data + image * call.y.sample + first * call.y.pixel;
    const Rows<A> y = w.output(map, call.y, pixels);
    if (call.r_data) {
      load_block(call.r_data + image * call.r.sample + first * call.r.pixel, call.r, pixels,
                 static_cast<const A*>(nullptr), w.x);
      spread<Spread::nodes_and_residual>(pixels, w.width, call.K, m, y);
    } else {
      spread<Spread::nodes>(pixels, w.width, call.K, m, y);
    }
    if (y.p == w.y.p) store_block(w.read(y), pixels, map, call.y);
  }
}

// dq and the sums Σ q dy of one part of an image.
template <class T>
void mix_backward(const Reprojection<T>& call, int64_t first_part, int64_t last_part) {
  using A = acc_t<T>;
  Workspace<A> w(call.y.C, call.K, false);
  const int64_t blocks = call.y.blocks();
  for (int64_t part = first_part; part < last_part; ++part) {
    const int64_t image = part / call.splits, split = part % call.splits, size = call.rows * call.step;
    const Rows<A> sums = {call.sums + part * size, call.step};
    if (call.sums) std::fill_n(sums.p, size, A(0));
    for (int64_t block = split * blocks / call.splits; block < (split + 1) * blocks / call.splits; ++block) {
      const int64_t first = block * kPixels, pixels = std::min(kPixels, call.y.N - first);
      load_block(call.dy_data + image * call.y.sample + first * call.y.pixel, call.y, pixels,
                 static_cast<const A*>(nullptr), w.x);
      if (call.dq_data) {
        const Rows<const A> z = {call.z + image * size, call.step};
        const Ahead ahead = ahead_of(call.dy_data + image * call.y.sample, call.y, first + kPixels);
        scores<false>(pixels, w.width, call.K, w.read(w.x), z, {}, w.g, ahead);
        store_nodes(w.read(w.g), pixels, call.dq_data + image * call.dq.sample + first * call.dq.pixel,
                    call.dq);
      }
      if (call.sums) {
        load_nodes<A>(call.q_data + image * call.q.sample + first * call.q.pixel, call.q, pixels, w.q);
        gather<false>(pixels, w.width, call.K, w.read(w.q), w.read(w.x), sums, sums);
      }
    }
  }
}

// dz of one node of one image, out of the parts' sums.
template <class T>
void finish_row(const Reprojection<T>& call, int64_t image, int64_t k, acc_t<T>* row, T* dz) {
  using A = acc_t<T>;
  sum_parts<A>(call.sums, call.splits, call.rows, call.step, image, k, row);
  for (int64_t c = 0; c < call.y.C; c += Vec<A>::lanes)
    store(dz + (image * call.K + k) * call.y.C + c, load(static_cast<const A*>(row + c)),
          lane_range<A>(0, call.y.C - c));
}

}  // namespace SEGKERNELS_ISA
}  // namespace
}  // namespace segkernels
