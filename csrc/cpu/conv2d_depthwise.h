// Convolution of groups with few channels: see conv2d_depthwise.cpp.
#pragma once

#include "conv2d_gather.h"

namespace pyvit {

// Whether the depth-wise kernel takes this convolution, and does it; defined for every storage
// type.
template <class S>
bool conv2d_depthwise(const Phases<S>& phases, const int64_t kernel[2]);

}  // namespace pyvit
