// Convolution of images with few pixels: see conv2d_small.cpp.
#pragma once

#include "conv2d.h"

namespace pyvit {

// Whether it is this kernel's; both do the work if so.
bool conv2d_small(DType dtype, const Conv2dShape& shape, View4 x, View4 w, const void* bias,
                  View4 y);
bool conv2d_small_input_grad(DType dtype, const Conv2dShape& shape, View4 dy, View4 w, View4 dx);

}  // namespace pyvit
