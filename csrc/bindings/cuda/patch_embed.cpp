#include "cuda/patch_embed.h"

#include "bindings/cuda/device.h"
#include "bindings/patch_embed.h"

namespace pyvit {
namespace {

// `like`: a tensor of the call's dtype, on its device. Scratch memory is still to be given.
cuda::PatchEmbedCall describe(const Tensor& like, const PatchEmbedShape& shape, bool bytes,
                              bool allow_tf32) {
  return {dtype_of(like), bytes, allow_tf32, shape, nullptr, stream_of(like)};
}

Tensor forward(Tensor image, Tensor weight, std::optional<Tensor> bias,
               std::optional<Tensor> pos_embed, std::optional<Tensor> cls_token,
               std::optional<Tensor> mean, std::optional<Tensor> std, Ints stride,
               bool allow_tf32) {
  const PatchEmbedShape shape = patch_embed_shape(sizes_of(image), sizes_of(weight), stride);
  const int64_t tokens = patches_of(shape) + (cls_token.has_value() ? 1 : 0);
  Tensor out = empty_like_options(weight, {shape.batch, tokens, shape.embed_dim});
  if (out.numel() == 0) return out;
  auto call = describe(weight, shape, is_bytes(image), allow_tf32);
  const Scratch scratch(weight, cuda::patch_embed_scratch(call));
  call.scratch = scratch.data();
  cuda::patch_embed(call, view4(image), {data_or_null(mean), data_or_null(std)}, view4(weight),
                    {data_or_null(bias), data_or_null(pos_embed), data_or_null(cls_token)},
                    out.mutable_data_ptr());
  return out;
}

Tensor image_grad(Tensor grad, Tensor weight, std::optional<Tensor> std, Ints image_size,
                  Ints stride, bool channels_last, bool allow_tf32) {
  Tensor dimage = empty_like_options(grad, image_size, channels_last);
  if (dimage.numel() == 0) return dimage;
  const PatchEmbedShape shape = patch_embed_shape(image_size, sizes_of(weight), stride);
  if (shape.grid[0] * shape.kernel[0] != shape.height ||
      shape.grid[1] * shape.kernel[1] != shape.width) {
    torch::stable::zero_(dimage);  // pixels that no patch has
  }
  auto call = describe(grad, shape, false, allow_tf32);
  const Scratch scratch(grad, cuda::patch_embed_image_grad_scratch(call));
  call.scratch = scratch.data();
  cuda::patch_embed_image_grad(call, patch_tokens(grad, shape), view4(weight), data_or_null(std),
                               view4(dimage));
  return dimage;
}

Tensor weight_grad(Tensor grad, Tensor image, std::optional<Tensor> mean,
                   std::optional<Tensor> std, Ints weight_size, Ints stride, bool channels_last,
                   bool allow_tf32) {
  Tensor dweight = empty_like_options(grad, weight_size, channels_last);
  if (dweight.numel() == 0) return dweight;
  const PatchEmbedShape shape = patch_embed_shape(sizes_of(image), weight_size, stride);
  auto call = describe(grad, shape, is_bytes(image), allow_tf32);
  const Scratch scratch(grad, cuda::patch_embed_weight_grad_scratch(call));
  call.scratch = scratch.data();
  cuda::patch_embed_weight_grad(call, patch_tokens(grad, shape), view4(image),
                                {data_or_null(mean), data_or_null(std)}, view4(dweight));
  return dweight;
}

}  // namespace
}  // namespace pyvit

STABLE_TORCH_LIBRARY_IMPL(pyvit_cuda, PYVIT_CUDA_KEY, m) {
  m.impl("patch_embed", TORCH_BOX(&pyvit::forward));
  m.impl("patch_embed_image_grad", TORCH_BOX(&pyvit::image_grad));
  m.impl("patch_embed_weight_grad", TORCH_BOX(&pyvit::weight_grad));
}
