// Unfold-based 2-D convolution and its gradients. The column matrix exists one cache panel at a
// time: it is built while the GEMM packs its operand. See conv2d.cpp for the method.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "shapes.h"

namespace pyvit {

// y = conv(x, w) + bias; bias may be null, else out_channels contiguous values.
void conv2d(DType dtype, const Conv2dShape& shape, View4 x, View4 w, const void* bias, View4 y);
void conv2d_input_grad(DType dtype, const Conv2dShape& shape, View4 dy, View4 w, View4 dx);
void conv2d_weight_grad(DType dtype, const Conv2dShape& shape, View4 dy, View4 x, View4 dw);

}  // namespace pyvit
