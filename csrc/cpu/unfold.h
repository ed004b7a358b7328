// The column matrix of an image's patches, and its transpose: see unfold.cpp.
#pragma once

#include <cstdint>

#include "conv2d.h"
#include "dtypes.h"

namespace pyvit {

struct UnfoldShape {
  int64_t batch, channels, height, width;
  int64_t grid[2];  // rows and columns of patches
  int64_t kernel[2], stride[2], padding[2], dilation[2];
};

// The column matrix [batch, channels · kernel, patches]; strides in elements.
struct ColumnView {
  const void* data;
  int64_t stride[3];
};

// `columns` and `image` of the results are contiguous.
void unfold(DType dtype, const UnfoldShape& shape, View4 image, void* columns);
void fold(DType dtype, const UnfoldShape& shape, ColumnView columns, void* image);

}  // namespace pyvit
