#include "cpu/patch_embed.h"

#include "bindings/patch_embed.h"

namespace pyvit {
namespace {

Tensor forward(Tensor image, Tensor weight, std::optional<Tensor> bias,
               std::optional<Tensor> pos_embed, std::optional<Tensor> cls_token,
               std::optional<Tensor> mean, std::optional<Tensor> std, Ints stride) {
  const PatchEmbedShape shape = patch_embed_shape(sizes_of(image), sizes_of(weight), stride);
  const int64_t tokens = patches_of(shape) + (cls_token.has_value() ? 1 : 0);
  Tensor out = empty_like_options(weight, {shape.batch, tokens, shape.embed_dim});
  if (out.numel() == 0) return out;
  patch_embed(dtype_of(weight), is_bytes(image), shape, view4(image),
              {data_or_null(mean), data_or_null(std)}, view4(weight),
              {data_or_null(bias), data_or_null(pos_embed), data_or_null(cls_token)},
              out.mutable_data_ptr());
  return out;
}

Tensor image_grad(Tensor grad, Tensor weight, std::optional<Tensor> std, Ints image_size,
                  Ints stride, bool channels_last) {
  Tensor dimage = empty_like_options(grad, image_size, channels_last);
  if (dimage.numel() == 0) return dimage;
  const PatchEmbedShape shape = patch_embed_shape(image_size, sizes_of(weight), stride);
  patch_embed_image_grad(dtype_of(grad), shape, patch_tokens(grad, shape), view4(weight),
                         data_or_null(std), view4(dimage));
  return dimage;
}

Tensor weight_grad(Tensor grad, Tensor image, std::optional<Tensor> mean,
                   std::optional<Tensor> std, Ints weight_size, Ints stride,
                   bool channels_last) {
  Tensor dweight = empty_like_options(grad, weight_size, channels_last);
  if (dweight.numel() == 0) return dweight;
  const PatchEmbedShape shape = patch_embed_shape(sizes_of(image), weight_size, stride);
  patch_embed_weight_grad(dtype_of(grad), is_bytes(image), shape, patch_tokens(grad, shape),
                          view4(image), {data_or_null(mean), data_or_null(std)}, view4(dweight));
  return dweight;
}

}  // namespace
}  // namespace pyvit

STABLE_TORCH_LIBRARY_IMPL(pyvit, CPU, m) {
  m.impl("patch_embed", TORCH_BOX(&pyvit::forward));
  m.impl("patch_embed_image_grad", TORCH_BOX(&pyvit::image_grad));
  m.impl("patch_embed_weight_grad", TORCH_BOX(&pyvit::weight_grad));
}
