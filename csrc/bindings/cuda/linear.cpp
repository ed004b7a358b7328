#include "cuda/linear.h"

#include "bindings/conv2d.h"
#include "bindings/cuda/device.h"

namespace pyvit {
namespace {

Tensor linear_forward(Tensor x, Tensor weight, std::optional<Tensor> bias, bool allow_tf32) {
  Ints size = sizes_of(x);
  size.back() = weight.size(0);
  Tensor y = empty_like_options(x, size);
  if (y.numel() == 0) return y;
  const Rows rows(x);
  const Conv2dShape shape = linear_shape(rows.count, rows.features, weight.size(0));
  const View4 of_weight = linear_weight(weight);
  const Scratch scratch(x, cuda::linear_scratch(dtype_of(x), shape, of_weight));
  cuda::linear({dtype_of(x), allow_tf32, shape, scratch.data(), stream_of(x)}, rows.image,
               of_weight, data_or_null(bias), Rows(y).image);
  return y;
}

Tensor linear_weight_grad(Tensor grad, Tensor x, bool allow_tf32) {
  const Rows of_grad(grad), of_x(x);
  Tensor dw = empty_like_options(grad, {of_grad.features, of_x.features});
  if (dw.numel() == 0) return dw;
  const Conv2dShape shape = linear_shape(of_x.count, of_x.features, of_grad.features);
  const Scratch scratch(grad, cuda::linear_weight_grad_scratch(dtype_of(grad), shape));
  cuda::linear_weight_grad(
      {dtype_of(grad), allow_tf32, shape, scratch.data(), stream_of(grad)}, of_grad.image,
      of_x.image, linear_weight(dw));
  return dw;
}

}  // namespace
}  // namespace pyvit

STABLE_TORCH_LIBRARY_IMPL(pyvit_cuda, PYVIT_CUDA_KEY, m) {
  m.impl("linear", TORCH_BOX(&pyvit::linear_forward));
  m.impl("linear_weight_grad", TORCH_BOX(&pyvit::linear_weight_grad));
}
