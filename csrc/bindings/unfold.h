// What unfold's and fold's arguments say of their tensors, for every device.
#pragma once

#include "bindings/tensors.h"
#include "shapes.h"

namespace pyvit {

inline UnfoldShape unfold_shape(const Ints& image, const Ints& kernel, const Ints& dilation,
                                const Ints& padding, const Ints& stride) {
  auto patches = [&](int axis) {
    const int64_t span = dilation[axis] * (kernel[axis] - 1) + 1;
    return (image[2 + axis] + 2 * padding[axis] - span) / stride[axis] + 1;
  };
  return {image[0],
          image[1],
          image[2],
          image[3],
          {patches(0), patches(1)},
          {kernel[0], kernel[1]},
          {stride[0], stride[1]},
          {padding[0], padding[1]},
          {dilation[0], dilation[1]}};
}

// The results, not yet written.
inline Tensor empty_columns(const Tensor& x, const UnfoldShape& shape) {
  return empty_like_options(x, {shape.batch, shape.channels * shape.kernel[0] * shape.kernel[1],
                                shape.grid[0] * shape.grid[1]});
}
inline Ints folded_size(const Tensor& cols, const Ints& output_size, const Ints& kernel) {
  const int64_t channels = cols.size(1) / (kernel[0] * kernel[1]);
  return {cols.size(0), channels, output_size[0], output_size[1]};
}
inline ColumnView column_view(const Tensor& cols) {
  const auto strides = cols.strides();
  return {cols.const_data_ptr(), {strides[0], strides[1], strides[2]}};
}

}  // namespace pyvit
