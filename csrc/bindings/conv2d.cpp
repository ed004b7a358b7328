#include "cpu/conv2d.h"

#include "bindings/tensors.h"

namespace pyvit {
namespace {

// `padding` is (top, bottom, left, right); below and right follow from the output's size.
template <class Image, class Weight, class Out>
Conv2dShape shape_of(const Image& image, const Weight& weight, const Out& out, const Ints& stride,
                     const Ints& padding, const Ints& dilation, int64_t groups) {
  return {image[0],  image[1], image[2],   image[3],   out[1],
          out[2],    out[3],   {weight[2], weight[3]}, {stride[0], stride[1]},
          {padding[0], padding[2]}, {dilation[0], dilation[1]}, groups};
}

Tensor forward(Tensor x, Tensor weight, std::optional<Tensor> bias, Ints stride, Ints padding,
               Ints dilation, int64_t groups, bool channels_last) {
  const auto image = x.sizes(), kernel = weight.sizes();
  auto extent = [&](int axis) {
    const int64_t padded = image[2 + axis] + padding[2 * axis] + padding[2 * axis + 1];
    return (padded - dilation[axis] * (kernel[2 + axis] - 1) - 1) / stride[axis] + 1;
  };
  const Ints out = {image[0], kernel[0], extent(0), extent(1)};
  Tensor y = empty_like_options(x, out, channels_last);
  if (y.numel() == 0) return y;
  conv2d(dtype_of(x), shape_of(image, kernel, out, stride, padding, dilation, groups), view4(x),
         view4(weight), data_or_null(bias), view4(y));
  return y;
}

Tensor input_grad(Tensor grad, Tensor weight, Ints input_size, Ints stride, Ints padding,
                  Ints dilation, int64_t groups, bool channels_last) {
  Tensor dx = empty_like_options(grad, input_size, channels_last);
  if (dx.numel() == 0) return dx;
  conv2d_input_grad(dtype_of(grad),
                    shape_of(input_size, weight.sizes(), grad.sizes(), stride, padding,
                             dilation, groups),
                    view4(grad), view4(weight), view4(dx));
  return dx;
}

Tensor weight_grad(Tensor grad, Tensor x, Ints weight_size, Ints stride, Ints padding,
                   Ints dilation, int64_t groups, bool channels_last) {
  Tensor dw = empty_like_options(grad, weight_size, channels_last);
  if (dw.numel() == 0) return dw;
  conv2d_weight_grad(dtype_of(grad),
                     shape_of(x.sizes(), weight_size, grad.sizes(), stride, padding, dilation,
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
