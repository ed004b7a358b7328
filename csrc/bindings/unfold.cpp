#include "cpu/unfold.h"

#include "bindings/tensors.h"

namespace pyvit {
namespace {

UnfoldShape shape_of(const Ints& image, const Ints& kernel, const Ints& dilation,
                     const Ints& padding, const Ints& stride) {
  auto patches = [&](int axis) {
    const int64_t span = dilation[axis] * (kernel[axis] - 1) + 1;
    return (image[2 + axis] + 2 * padding[axis] - span) / stride[axis] + 1;
  };
  return {image[0],
          image[1],
          image[2],
          image[3],
          {patches(0), patches(1)},
          {kernel[0], kernel[1]},
          {stride[0], stride[1]},
          {padding[0], padding[1]},
          {dilation[0], dilation[1]}};
}

Tensor unfold_forward(Tensor x, Ints kernel, Ints dilation, Ints padding, Ints stride) {
  const UnfoldShape shape = shape_of(sizes_of(x), kernel, dilation, padding, stride);
  Tensor columns = empty_like_options(
      x, {shape.batch, shape.channels * kernel[0] * kernel[1], shape.grid[0] * shape.grid[1]});
  if (columns.numel() == 0) return columns;
  unfold(dtype_of(x), shape, view4(x), columns.mutable_data_ptr());
  return columns;
}

Tensor fold_forward(Tensor cols, Ints output_size, Ints kernel, Ints dilation, Ints padding,
                    Ints stride) {
  const int64_t channels = cols.size(1) / (kernel[0] * kernel[1]);
  const Ints size = {cols.size(0), channels, output_size[0], output_size[1]};
  Tensor image = empty_like_options(cols, size);
  if (image.numel() == 0) return image;
  const auto strides = cols.strides();
  fold(dtype_of(cols), shape_of(size, kernel, dilation, padding, stride),
       {cols.const_data_ptr(), {strides[0], strides[1], strides[2]}}, image.mutable_data_ptr());
  return image;
}

}  // namespace
}  // namespace pyvit

STABLE_TORCH_LIBRARY_IMPL(pyvit, CPU, m) {
  m.impl("unfold", TORCH_BOX(&pyvit::unfold_forward));
  m.impl("fold", TORCH_BOX(&pyvit::fold_forward));
}
