// The matrix products of patch embedding, by the kind of their multiplication (product.cuh): what
// patch_embed.cu asks of patch_embed_{bf16,f16,f32}.cu.
#pragma once

#include "cuda/patch_embed_operands.cuh"

namespace pyvit::cuda {

// How a patch's pixels are copied or made.
enum class Pixels { copied, made, made_of_bytes };

// tokens[t, d] = Σ_k patches[t, k] · weights[d, k], with terms; null where there are none.
struct TokenSums {
  Operand patches, weights;
  Pixels pixels;
  const void *bias, *position, *class_token;
  void* tokens;
  bool vectors;  // every row of `tokens` and of the terms is aligned to 16 bytes
};

// pixels[t, k] = Σ_d grads[t, d] · weights[d, k] / std, written where `image` says.
struct ImageSums {
  Operand grads, weights, image;  // weights: lines of features; image: lines of tokens
};

// Partial sums Σ_t grads[t, d] · patches[t, k], [part, d, k], over `each` tokens a part.
struct WeightSums {
  Operand grads, patches;
  Pixels pixels;
  float* sums;
  int each, parts;
};

template <class Kind>
void sum_tokens(const TokenSums& call, void* stream);
template <class Kind>
void sum_image(const ImageSums& call, void* stream);
template <class Kind>
void sum_weights(const WeightSums& call, void* stream);

}  // namespace pyvit::cuda
