// The matrix products of a convolution, by the kind of their multiplication (product.cuh): what
// conv2d.cu asks of conv2d_{bf16,f16,f32}.cu.
#pragma once

#include "cuda/conv2d_taps.cuh"
#include "cuda/product.cuh"

namespace pyvit::cuda {

// A sum over taps for all phases and groups. Rows of weights have a phase's terms and lie `pitch`
// elements apart, aligned to 16 bytes; phases are in the order of their first taps.
struct TapSums {
  SourceShape source;
  AxisRule rows, columns;
  const void* from;
  const void* weights;
  const void* bias;  // or null
  void* out;
  int64_t out_stride[4];
  int64_t pitch, next_group, next_phase;
  int batch, groups, channels;  // of the result in a group
  bool copies;   // chunks of the source's channels can be copied asynchronously
  bool vectors;  // the result's channels are written in chunks
};

// Partial sums of the weight's gradient, [part, group, out channel, term] in float32, over `each`
// pixels a part.
struct PixelSums {
  SourceShape grad, image;
  AxisRule rows, columns;
  const void* of_grad;
  const void* of_image;
  float* sums;
  int pixels, each, parts, groups;
  int channels, terms;  // out channels of a group, terms of each
  bool grad_copies, image_copies;
};

template <class Kind>
void sum_over_taps(const TapSums& call, void* stream);
template <class Kind>
void sum_over_pixels(const PixelSums& call, void* stream);

}  // namespace pyvit::cuda
