// Tensors as the CPU and CUDA hosts see them, on LibTorch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/simd.h"

namespace segkernels {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A feature map [B, C, H, W] with its strides in elements.
struct Map {
  int64_t B, C, H, W;
  int64_t sB, sC, sH, sW;
};

inline Map map_of(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4, "segkernels: expected a map [B, C, H, W], got ", t.dim(), " dimensions");
  const auto n = t.sizes(), s = t.strides();
  return {n[0], n[1], n[2], n[3], s[0], s[1], s[2], s[3]};
}

// The rule of c10's is_channels_last_strides_2d: NCHW where strides are ambiguous.
inline bool is_channels_last(const Map& m) {
  const int64_t size[4] = {m.C, m.W, m.H, m.B}, stride[4] = {m.sC, m.sW, m.sH, m.sB};
  if (m.sC == 0) return false;
  int64_t least = 0;
  for (int i = 0; i < 4; ++i) {
    if (size[i] == 0 || stride[i] < least) return false;
    if (i == 3 && least == m.sC) return false;
    least = stride[i] * std::max<int64_t>(size[i], 1);
  }
  return true;
}

inline MemoryFormat format_of(bool channels_last) {
  return channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

// Uninitialised memory of the type and device of `like`.
inline Tensor empty_map(const Tensor& like, std::vector<int64_t> sizes, bool channels_last) {
  return torch::stable::empty(sizes, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              format_of(channels_last));
}
inline Tensor empty(const Tensor& like, std::vector<int64_t> sizes,
                    std::optional<ScalarType> type = std::nullopt) {
  return torch::stable::empty(sizes, type.value_or(like.scalar_type()), std::nullopt, like.device());
}

// `t` itself if its innermost dimension (C of channels_last, else W) is dense, whatever the others; else a
// copy.
inline Tensor with_dense_rows(const Tensor& t, bool channels_last) {
  const Map m = map_of(t);
  const bool dense = channels_last ? m.sC == 1 || m.C == 1 : m.sW == 1 || m.W == 1;
  return dense || t.numel() == 0 ? t : torch::stable::contiguous(t, format_of(channels_last));
}
inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// Calls f(T()) with the storage type T.
template <class F>
void by_type(ScalarType type, F&& f) {
  switch (type) {
    case ScalarType::Double:
      return f(double());
    case ScalarType::Float:
      return f(float());
    case ScalarType::BFloat16:
      return f(bfloat16());
    case ScalarType::Half:
      return f(float16());
    default:
      STD_TORCH_CHECK(false, "segkernels: unsupported type ", torch::headeronly::toString(type));
  }
}
inline ScalarType acc_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class T>
const T* const_data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// f(first, last) over contiguous parts of [0, n) on torch's threads; `cost` (about the operations of one
// item) keeps small work on the calling thread. Parts are taken in order and shrink towards the end, so that
// a thread that was held up leaves its share to the others. What an item computes must not depend on where
// the parts begin.
template <class F>
void parallel_for(int64_t n, int64_t cost, const F& f) {
  constexpr int64_t kWorthAThread = 1 << 16;
  if (n <= 0) return;
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(cost, 1));
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), n / grain);
  if (threads <= 1) return f(0, n);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t first = next; first < n;) {
      const int64_t last = std::min(n, first + std::max(grain, (n - first) / (2 * threads)));
      if (!next.compare_exchange_weak(first, last)) continue;
      f(first, last);
      first = next;
    }
  });
}

}  // namespace segkernels
