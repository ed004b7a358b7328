#include "cuda/unfold.h"

#include "bindings/cuda/device.h"
#include "bindings/unfold.h"

namespace pyvit {
namespace {

Tensor unfold_forward(Tensor x, Ints kernel, Ints dilation, Ints padding, Ints stride) {
  const UnfoldShape shape = unfold_shape(sizes_of(x), kernel, dilation, padding, stride);
  Tensor columns = empty_columns(x, shape);
  if (columns.numel() == 0) return columns;
  cuda::unfold(dtype_of(x), shape, view4(x), columns.mutable_data_ptr(), stream_of(x));
  return columns;
}

Tensor fold_forward(Tensor cols, Ints output_size, Ints kernel, Ints dilation, Ints padding,
                    Ints stride) {
  const Ints size = folded_size(cols, output_size, kernel);
  Tensor image = empty_like_options(cols, size);
  if (image.numel() == 0) return image;
  cuda::fold(dtype_of(cols), unfold_shape(size, kernel, dilation, padding, stride),
             column_view(cols), image.mutable_data_ptr(), stream_of(cols));
  return image;
}

}  // namespace
}  // namespace pyvit

STABLE_TORCH_LIBRARY_IMPL(pyvit_cuda, PYVIT_CUDA_KEY, m) {
  m.impl("unfold", TORCH_BOX(&pyvit::unfold_forward));
  m.impl("fold", TORCH_BOX(&pyvit::fold_forward));
}
