// A linear layer is the 1×1 convolution of an image of M rows, one pixel wide, channels last.
#include "bindings/tensors.h"
#include "cpu/conv2d.h"

namespace pyvit {
namespace {

Conv2dShape shape_of(int64_t rows, int64_t inputs, int64_t outputs) {
  return {1,      inputs, rows,   1,      outputs, rows, 1,
          {1, 1}, {1, 1}, {0, 0}, {1, 1}, 1};
}

// Rows of `features` side by side: two dimensions, or any number of contiguous ones.
struct Rows {
  int64_t count, features;
  View4 image;

  explicit Rows(const Tensor& tensor) {
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    features = sizes[sizes.size() - 1];
    count = 1;
    for (size_t i = 0; i + 1 < sizes.size(); ++i) count *= sizes[i];
    const int64_t pitch = sizes.size() == 2 ? strides[0] : features;
    image = {const_cast<void*>(tensor.const_data_ptr()), {count * pitch, 1, pitch, pitch}};
  }
};

Tensor forward(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  const auto of_weight = weight.strides();
  Ints size = sizes_of(x);
  size.back() = weight.size(0);
  Tensor y = empty_like_options(x, size);
  if (y.numel() == 0) return y;
  const Rows rows(x);
  conv2d(dtype_of(x), shape_of(rows.count, rows.features, weight.size(0)), rows.image,
         {const_cast<void*>(weight.const_data_ptr()), {of_weight[0], of_weight[1], 1, 1}},
         data_or_null(bias), Rows(y).image);
  return y;
}

Tensor weight_grad(Tensor grad, Tensor x) {
  const Rows of_grad(grad), of_x(x);
  Tensor dw = empty_like_options(grad, {of_grad.features, of_x.features});
  if (dw.numel() == 0) return dw;
  conv2d_weight_grad(dtype_of(grad),
                     shape_of(of_x.count, of_x.features, of_grad.features), of_grad.image,
                     of_x.image, {dw.mutable_data_ptr(), {of_x.features, 1, 1, 1}});
  return dw;
}

}  // namespace
}  // namespace pyvit

STABLE_TORCH_LIBRARY_IMPL(pyvit, CPU, m) {
  m.impl("linear", TORCH_BOX(&pyvit::forward));
  m.impl("linear_weight_grad", TORCH_BOX(&pyvit::weight_grad));
}
