// The input gradient of a convolution with few input channels.
#pragma once

#include "conv2d.h"

namespace pyvit {

// Whether conv2d_input_grad_scatter does less work than gathering; a function of one image's shape.
bool scatter_is_cheaper(const Conv2dShape& shape);
void conv2d_input_grad_scatter(DType dtype, const Conv2dShape& shape, View4 dy, View4 w, View4 dx);

}  // namespace pyvit
