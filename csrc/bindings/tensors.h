// From torch's stable tensors to the plain pointers and strides that kernels take.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "cpu/conv2d.h"
#include "cpu/dtypes.h"

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

// An uninitialised tensor with the dtype and the device of `like`.
inline Tensor empty_like_options(const Tensor& like, const std::vector<int64_t>& size,
                                 bool channels_last = false) {
  return torch::stable::empty(
      size, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
      channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
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
