// From images to tokens in one pass: normalise, cut into patches, project, add bias and position,
// prepend the class token; and the gradients. See patch_embed.cpp for the method.
#pragma once

#include <cstdint>

#include "conv2d.h"
#include "dtypes.h"

namespace pyvit {

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

// `dtype` is that of everything but the image, which may be uint8 (`bytes`; scaled by 1/255).
// `tokens` is contiguous and begins with the class token's row where there is one.
void patch_embed(DType dtype, bool bytes, const PatchEmbedShape& shape, View4 image,
                 Normalisation normalisation, View4 weight, TokenTerms terms, void* tokens);

// Patches must not overlap (stride >= kernel); pixels that no patch covers get 0.
// `dimage` is dense, in any order of its dimensions.
void patch_embed_image_grad(DType dtype, const PatchEmbedShape& shape, TokenView grad,
                            View4 weight, const void* std, View4 dimage);

void patch_embed_weight_grad(DType dtype, bool bytes, const PatchEmbedShape& shape,
                             TokenView grad, View4 image, Normalisation normalisation,
                             View4 dweight);

}  // namespace pyvit
