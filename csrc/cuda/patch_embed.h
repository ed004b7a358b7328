// Fused patch embedding on a GPU, and its gradients: see patch_embed.cu.
#pragma once

#include "shapes.h"

namespace pyvit::cuda {

// What all launchers take. `scratch` has at least as many bytes as the launch's …_scratch function
// says, aligned to 16; `stream` is a cudaStream_t.
struct PatchEmbedCall {
  DType dtype;      // of everything but the image, mean and std (float32)
  bool bytes;       // the image is uint8, and is scaled by 1/255
  bool allow_tf32;  // for float32
  PatchEmbedShape shape;
  void* scratch;
  void* stream;
};

// `tokens` is contiguous and begins with the class token's row where there is one.
int64_t patch_embed_scratch(const PatchEmbedCall& call);
void patch_embed(const PatchEmbedCall& call, View4 image, Normalisation normalisation,
                 View4 weight, TokenTerms terms, void* tokens);

// Patches must not overlap (stride >= kernel). Pixels that no patch covers are not written.
int64_t patch_embed_image_grad_scratch(const PatchEmbedCall& call);
void patch_embed_image_grad(const PatchEmbedCall& call, TokenView grad, View4 weight,
                            const void* std, View4 dimage);

int64_t patch_embed_weight_grad_scratch(const PatchEmbedCall& call);
void patch_embed_weight_grad(const PatchEmbedCall& call, TokenView grad, View4 image,
                             Normalisation normalisation, View4 dweight);

}  // namespace pyvit::cuda
