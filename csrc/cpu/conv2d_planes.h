// Convolution of planar images to few channels: see conv2d_planes.cpp.
#pragma once

#include "conv2d_gather.h"

namespace pyvit {

// Whether this way takes the convolution, or only one whose images need no copy, and does it; defined
// for every storage type.
template <class S>
bool conv2d_planes(const Phases<S>& phases, bool only_in_place = false);

}  // namespace pyvit
