// Convolution without unfolding: see conv2d_band.cpp.
#pragma once

#include "conv2d_gather.h"

namespace pyvit {

// Whether the band kernel takes this convolution, and does it; defined for every storage type.
template <class S>
bool conv2d_band(const Phases<S>& phases, const int64_t kernel[2]);

}  // namespace pyvit
