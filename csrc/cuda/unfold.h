// The column matrix of an image's patches, and its transpose, on a GPU: see unfold.cu.
#pragma once

#include "shapes.h"

namespace pyvit::cuda {

// `stream` is a cudaStream_t; `columns` and `image` of the results are contiguous.
void unfold(DType dtype, const UnfoldShape& shape, View4 image, void* columns, void* stream);
void fold(DType dtype, const UnfoldShape& shape, ColumnView columns, void* image, void* stream);

}  // namespace pyvit::cuda
