// Unfold-based 2-D convolution and its gradients. The column matrix exists one cache panel at a
// time: it is built while the GEMM packs its operand. See conv2d.cpp for the method.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace pyvit {

struct Conv2dShape {
  int64_t batch, in_channels, height, width;
  int64_t out_channels, out_height, out_width;
  int64_t kernel[2], stride[2], padding[2], dilation[2];  // padding: above and left
  int64_t groups;
};

// A tensor of four dimensions with its strides in elements: batch, channel, row, column for an
// image; out channel, in channel, row, column for a weight.
struct View4 {
  void* data;
  int64_t stride[4];
};

// y = conv(x, w) + bias; bias may be null, else out_channels contiguous values.
void conv2d(DType dtype, const Conv2dShape& shape, View4 x, View4 w, const void* bias, View4 y);
void conv2d_input_grad(DType dtype, const Conv2dShape& shape, View4 dy, View4 w, View4 dx);
void conv2d_weight_grad(DType dtype, const Conv2dShape& shape, View4 dy, View4 x, View4 dw);

}  // namespace pyvit
