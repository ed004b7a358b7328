// From torch's stable tensors to the plain pointers and strides that kernels take.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <optional>
#include <vector>

#include "shapes.h"

namespace pyvit {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return DType::f64;
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: STD_TORCH_CHECK(false, "pyvit: a kernel was given a dtype it has no code for");
  }
  return DType::f32;
}

// Asks for huge pages under a large result, and gives it back. malloc takes such blocks from the
// system anew at each call, and the system fills every page with zeros when it is first written:
// in pages of 4 KB that costs several times what writing the result does. Advice alone: where
// it cannot be followed nothing changes, and no memory outside the tensor is touched.
inline Tensor in_huge_pages(Tensor result) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 << 20;
  const auto bytes = static_cast<uintptr_t>(result.numel()) * result.element_size();
  if (bytes >= 2 * kHugePage && result.is_cpu()) {  // then at least one whole page lies inside
    const auto begin = reinterpret_cast<uintptr_t>(result.const_data_ptr());
    const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
    const uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  return result;
}

// Uninitialised results; every op's come from one of these three.
inline Tensor empty_of(const Tensor& like, const std::vector<int64_t>& size, ScalarType dtype,
                       bool channels_last = false) {
  return in_huge_pages(torch::stable::empty(
      size, dtype, std::nullopt, like.device(), std::nullopt,
      channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous));
}
inline Tensor empty_like_options(const Tensor& like, const std::vector<int64_t>& size,
                                 bool channels_last = false) {
  return empty_of(like, size, like.scalar_type(), channels_last);
}
inline Tensor empty_like(const Tensor& like) {
  return in_huge_pages(torch::stable::empty_like(like));
}

using Ints = std::vector<int64_t>;

inline Ints sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return Ints(sizes.begin(), sizes.end());
}

inline const void* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

inline View4 view4(const Tensor& tensor) {
  const auto strides = tensor.strides();
  return {const_cast<void*>(tensor.const_data_ptr()),
          {strides[0], strides[1], strides[2], strides[3]}};
}

}  // namespace pyvit
