// 1×1 convolution of few channels to many, channels last: see conv2d_pixels.cpp.
#pragma once

#include "conv2d_gather.h"

namespace pyvit {

// Whether this way takes the convolution, and does it; defined for every storage type.
template <class S>
bool conv2d_pixels(const Phases<S>& phases);

}  // namespace pyvit
