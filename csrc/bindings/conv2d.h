// What the bindings of the convolutions share: those of the CPU and of CUDA C++.
#pragma once

#include "bindings/tensors.h"

namespace pyvit {

// `padding` is (top, bottom, left, right); below and right follow from the output's size.
template <class Image, class Weight, class Out>
Conv2dShape conv2d_shape(const Image& image, const Weight& weight, const Out& out,
                         const Ints& stride, const Ints& padding, const Ints& dilation,
                         int64_t groups) {
  return {image[0],  image[1], image[2],   image[3],   out[1],
          out[2],    out[3],   {weight[2], weight[3]}, {stride[0], stride[1]},
          {padding[0], padding[2]}, {dilation[0], dilation[1]}, groups};
}

inline Ints convolved_size(const Tensor& x, const Tensor& weight, const Ints& stride,
                           const Ints& padding, const Ints& dilation) {
  const auto image = x.sizes(), kernel = weight.sizes();
  auto extent = [&](int axis) {
    const int64_t padded = image[2 + axis] + padding[2 * axis] + padding[2 * axis + 1];
    return (padded - dilation[axis] * (kernel[2 + axis] - 1) - 1) / stride[axis] + 1;
  };
  return {image[0], kernel[0], extent(0), extent(1)};
}

// ---- a linear layer: the 1×1 convolution of an image of M rows, one pixel wide, channels last

inline Conv2dShape linear_shape(int64_t rows, int64_t inputs, int64_t outputs) {
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

inline View4 linear_weight(const Tensor& weight) {
  const auto strides = weight.strides();
  return {const_cast<void*>(weight.const_data_ptr()), {strides[0], strides[1], 1, 1}};
}

}  // namespace pyvit
