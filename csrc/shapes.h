// What calls say of their tensors, to kernels of the CPU and of a GPU alike. No torch here.
#pragma once

#include <cstdint>

namespace pyvit {

enum class DType { f64, f32, bf16, f16 };

// A tensor of four dimensions with its strides in elements: batch, channel, row, column for an
// image; out channel, in channel, row, column for a weight.
struct View4 {
  void* data;
  int64_t stride[4];
};

// The column matrix [batch, channels · kernel, patches]; strides in elements.
struct ColumnView {
  const void* data;
  int64_t stride[3];
};

struct UnfoldShape {
  int64_t batch, channels, height, width;
  int64_t grid[2];  // rows and columns of patches
  int64_t kernel[2], stride[2], padding[2], dilation[2];
};

struct Conv2dShape {
  int64_t batch, in_channels, height, width;
  int64_t out_channels, out_height, out_width;
  int64_t kernel[2], stride[2], padding[2], dilation[2];  // padding: above and left
  int64_t groups;
};

struct PatchEmbedShape {
  int64_t batch, channels, height, width;
  int64_t embed_dim;
  int64_t grid[2];              // rows and columns of patches
  int64_t kernel[2], stride[2]; // of a patch, in pixels
};

// (x - mean) / std for each channel; float32 values, float64 where the weight is; null: 0 and 1.
struct Normalisation {
  const void* mean;
  const void* std;
};

// What is added to the projected patches; each is contiguous, or null. Positions and tokens have
// one row more when there is a class token, and it comes first.
struct TokenTerms {
  const void* bias;       // [embed_dim]
  const void* position;   // [tokens, embed_dim]
  const void* class_token;  // [embed_dim]
};

// The rows of the patches in a tensor of tokens; strides in elements: image, token, feature.
struct TokenView {
  void* data;
  int64_t stride[3];
};

}  // namespace pyvit
