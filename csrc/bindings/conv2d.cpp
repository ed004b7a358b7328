#include "bindings/conv2d.h"

#include "cpu/conv2d.h"

namespace pyvit {
namespace {

Tensor forward(Tensor x, Tensor weight, std::optional<Tensor> bias, Ints stride, Ints padding,
               Ints dilation, int64_t groups, bool channels_last) {
  const Ints out = convolved_size(x, weight, stride, padding, dilation);
  Tensor y = empty_like_options(x, out, channels_last);
  if (y.numel() == 0) return y;
  conv2d(dtype_of(x),
         conv2d_shape(x.sizes(), weight.sizes(), out, stride, padding, dilation, groups), view4(x),
         view4(weight), data_or_null(bias), view4(y));
  return y;
}

Tensor input_grad(Tensor grad, Tensor weight, Ints input_size, Ints stride, Ints padding,
                  Ints dilation, int64_t groups, bool channels_last) {
  Tensor dx = empty_like_options(grad, input_size, channels_last);
  if (dx.numel() == 0) return dx;
  conv2d_input_grad(dtype_of(grad),
                    conv2d_shape(input_size, weight.sizes(), grad.sizes(), stride, padding,
                                 dilation, groups),
                    view4(grad), view4(weight), view4(dx));
  return dx;
}

Tensor weight_grad(Tensor grad, Tensor x, Ints weight_size, Ints stride, Ints padding,
                   Ints dilation, int64_t groups, bool channels_last) {
  Tensor dw = empty_like_options(grad, weight_size, channels_last);
  if (dw.numel() == 0) return dw;
  conv2d_weight_grad(dtype_of(grad),
                     conv2d_shape(x.sizes(), weight_size, grad.sizes(), stride, padding, dilation,
                                  groups),
                     view4(grad), view4(x), view4(dw));
  return dw;
}

}  // namespace
}  // namespace pyvit

STABLE_TORCH_LIBRARY_IMPL(pyvit, CPU, m) {
  m.impl("conv2d", TORCH_BOX(&pyvit::forward));
  m.impl("conv2d_input_grad", TORCH_BOX(&pyvit::input_grad));
  m.impl("conv2d_weight_grad", TORCH_BOX(&pyvit::weight_grad));
}
