// A linear layer is the 1×1 convolution of an image of M rows, one pixel wide, channels last.
#pragma once

#include "cuda/conv2d.h"

namespace pyvit::cuda {

int64_t linear_scratch(DType dtype, const Conv2dShape& shape, View4 w);
void linear(const Conv2dCall& call, View4 x, View4 w, const void* bias, View4 y);

int64_t linear_weight_grad_scratch(DType dtype, const Conv2dShape& shape);
void linear_weight_grad(const Conv2dCall& call, View4 dy, View4 x, View4 dw);

}  // namespace pyvit::cuda
