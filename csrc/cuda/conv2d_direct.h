// Convolutions whose groups have very few channels, depth-wise ones above all: see
// conv2d_direct.cu. conv2d.cu sends them there.
#pragma once

#include "cuda/conv2d_product.h"
#include "shapes.h"

namespace pyvit::cuda {

// Whether matrix products would be mostly empty.
inline bool is_direct(int64_t groups, int64_t channels, int64_t summed) {
  return groups > 1 && channels * summed <= 16;
}

struct DirectSums {
  SourceShape source;
  AxisRule rows, columns;
  const void* from;
  View4 weight;  // strides by result channel, summed channel, row, column
  int64_t next_group;
  const void* bias;  // or null
  View4 out;
  int batch, groups, channels;  // of the result in a group
};

void direct_sums(DType dtype, const DirectSums& call, void* stream);
void direct_pixels(DType dtype, const PixelSums& call, void* stream);

}  // namespace pyvit::cuda
