// Unfold-based 2-D convolution and its gradients on a GPU: see conv2d.cu for the method.
#pragma once

#include "shapes.h"

namespace pyvit::cuda {

// What all launchers take. `scratch` has as many bytes as the launch's …_scratch function says,
// aligned to 16 (null where it says none); `stream` is a cudaStream_t.
struct Conv2dCall {
  DType dtype;
  bool allow_tf32;  // for float32
  Conv2dShape shape;
  void* scratch;
  void* stream;
};

// y = conv(x, w) + bias; bias may be null, else out_channels contiguous values.
int64_t conv2d_scratch(DType dtype, const Conv2dShape& shape, View4 w);
void conv2d(const Conv2dCall& call, View4 x, View4 w, const void* bias, View4 y);

int64_t conv2d_input_grad_scratch(DType dtype, const Conv2dShape& shape, View4 w);
void conv2d_input_grad(const Conv2dCall& call, View4 dy, View4 w, View4 dx);

int64_t conv2d_weight_grad_scratch(DType dtype, const Conv2dShape& shape);
void conv2d_weight_grad(const Conv2dCall& call, View4 dy, View4 x, View4 dw);

}  // namespace pyvit::cuda
