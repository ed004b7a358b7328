// What patch_embed's arguments say of their tensors, for every device.
#pragma once

#include "bindings/tensors.h"
#include "shapes.h"

namespace pyvit {

inline PatchEmbedShape patch_embed_shape(const Ints& image, const Ints& weight,
                                         const Ints& stride) {
  auto patches = [&](int axis) { return (image[2 + axis] - weight[2 + axis]) / stride[axis] + 1; };
  return {image[0],  image[1],
          image[2],  image[3],
          weight[0], {patches(0), patches(1)},
          {weight[2], weight[3]}, {stride[0], stride[1]}};
}

inline int64_t patches_of(const PatchEmbedShape& shape) { return shape.grid[0] * shape.grid[1]; }

inline bool is_bytes(const Tensor& image) { return image.scalar_type() == ScalarType::Byte; }

// `grad` may have the class token's row before those of the patches.
inline TokenView patch_tokens(const Tensor& grad, const PatchEmbedShape& shape) {
  const auto stride = grad.strides();
  const int64_t skipped = grad.size(1) - patches_of(shape);
  const int64_t bytes = grad.numel() == 0 ? 0 : skipped * stride[1] * grad.element_size();
  return {static_cast<char*>(const_cast<void*>(grad.const_data_ptr())) + bytes,
          {stride[0], stride[1], stride[2]}};
}

}  // namespace pyvit
