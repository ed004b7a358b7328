// The weight gradient where few channels meet (small groups, few outputs): see the .cpp.
#pragma once

#include "conv2d.h"

namespace pyvit {

bool planar_weight_grad_pays(DType dtype, const Conv2dShape& shape, View4 x);
void conv2d_weight_grad_planar(DType dtype, const Conv2dShape& shape, View4 dy, View4 x, View4 dw);

}  // namespace pyvit
