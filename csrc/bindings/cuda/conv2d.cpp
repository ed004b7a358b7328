#include "cuda/conv2d.h"

#include "bindings/conv2d.h"
#include "bindings/cuda/device.h"

namespace pyvit {
namespace {

Tensor conv2d_forward(Tensor x, Tensor weight, std::optional<Tensor> bias, Ints stride,
                      Ints padding, Ints dilation, int64_t groups, bool channels_last,
                      bool allow_tf32) {
  const Ints out = convolved_size(x, weight, stride, padding, dilation);
  Tensor y = empty_like_options(x, out, channels_last);
  if (y.numel() == 0) return y;
  const Conv2dShape shape =
      conv2d_shape(x.sizes(), weight.sizes(), out, stride, padding, dilation, groups);
  const Scratch scratch(x, cuda::conv2d_scratch(dtype_of(x), shape, view4(weight)));
  cuda::conv2d({dtype_of(x), allow_tf32, shape, scratch.data(), stream_of(x)}, view4(x),
               view4(weight), data_or_null(bias), view4(y));
  return y;
}

Tensor conv2d_input_grad(Tensor grad, Tensor weight, Ints input_size, Ints stride, Ints padding,
                         Ints dilation, int64_t groups, bool channels_last, bool allow_tf32) {
  Tensor dx = empty_like_options(grad, input_size, channels_last);
  if (dx.numel() == 0) return dx;
  const Conv2dShape shape =
      conv2d_shape(input_size, weight.sizes(), grad.sizes(), stride, padding, dilation, groups);
  const DType dtype = dtype_of(grad);
  const Scratch scratch(grad, cuda::conv2d_input_grad_scratch(dtype, shape, view4(weight)));
  cuda::conv2d_input_grad({dtype, allow_tf32, shape, scratch.data(), stream_of(grad)},
                          view4(grad), view4(weight), view4(dx));
  return dx;
}

Tensor conv2d_weight_grad(Tensor grad, Tensor x, Ints weight_size, Ints stride, Ints padding,
                          Ints dilation, int64_t groups, bool channels_last, bool allow_tf32) {
  Tensor dw = empty_like_options(grad, weight_size, channels_last);
  if (dw.numel() == 0) return dw;
  const Conv2dShape shape =
      conv2d_shape(x.sizes(), weight_size, grad.sizes(), stride, padding, dilation, groups);
  const Scratch scratch(grad, cuda::conv2d_weight_grad_scratch(dtype_of(grad), shape));
  cuda::conv2d_weight_grad({dtype_of(grad), allow_tf32, shape, scratch.data(), stream_of(grad)},
                           view4(grad), view4(x), view4(dw));
  return dw;
}

}  // namespace
}  // namespace pyvit

STABLE_TORCH_LIBRARY_IMPL(pyvit_cuda, PYVIT_CUDA_KEY, m) {
  m.impl("conv2d", TORCH_BOX(&pyvit::conv2d_forward));
  m.impl("conv2d_input_grad", TORCH_BOX(&pyvit::conv2d_input_grad));
  m.impl("conv2d_weight_grad", TORCH_BOX(&pyvit::conv2d_weight_grad));
}
