// The column matrix of an image's patches, and its transpose: see unfold.cpp.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "shapes.h"

namespace pyvit {

// `columns` and `image` of the results are contiguous.
void unfold(DType dtype, const UnfoldShape& shape, View4 image, void* columns);
void fold(DType dtype, const UnfoldShape& shape, ColumnView columns, void* image);

}  // namespace pyvit
