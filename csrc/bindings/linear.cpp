#include "bindings/conv2d.h"
#include "cpu/conv2d.h"

namespace pyvit {
namespace {

Tensor forward(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  Ints size = sizes_of(x);
  size.back() = weight.size(0);
  Tensor y = empty_like_options(x, size);
  if (y.numel() == 0) return y;
  const Rows rows(x);
  conv2d(dtype_of(x), linear_shape(rows.count, rows.features, weight.size(0)), rows.image,
         linear_weight(weight), data_or_null(bias), Rows(y).image);
  return y;
}

Tensor weight_grad(Tensor grad, Tensor x) {
  const Rows of_grad(grad), of_x(x);
  Tensor dw = empty_like_options(grad, {of_grad.features, of_x.features});
  if (dw.numel() == 0) return dw;
  conv2d_weight_grad(dtype_of(grad), linear_shape(of_x.count, of_x.features, of_grad.features),
                     of_grad.image, of_x.image, linear_weight(dw));
  return dw;
}

}  // namespace
}  // namespace pyvit

STABLE_TORCH_LIBRARY_IMPL(pyvit, CPU, m) {
  m.impl("linear", TORCH_BOX(&pyvit::forward));
  m.impl("linear_weight_grad", TORCH_BOX(&pyvit::weight_grad));
}
