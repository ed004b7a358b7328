// From images to tokens in one pass: normalise, cut into patches, project, add bias and position,
// prepend the class token; and the gradients. See patch_embed.cpp for the method.
#pragma once

#include <cstdint>

#include "conv2d.h"
#include "dtypes.h"

namespace pyvit {

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
