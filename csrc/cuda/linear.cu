#include "cuda/linear.h"

namespace pyvit::cuda {

int64_t linear_scratch(DType dtype, const Conv2dShape& shape, View4 w) {
  return conv2d_scratch(dtype, shape, w);
}

void linear(const Conv2dCall& call, View4 x, View4 w, const void* bias, View4 y) {
  conv2d(call, x, w, bias, y);
}

int64_t linear_weight_grad_scratch(DType dtype, const Conv2dShape& shape) {
  return conv2d_weight_grad_scratch(dtype, shape);
}

void linear_weight_grad(const Conv2dCall& call, View4 dy, View4 x, View4 dw) {
  conv2d_weight_grad(call, dy, x, dw);
}

}  // namespace pyvit::cuda
