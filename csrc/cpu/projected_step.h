// One step of a projected-gradient attack for a batch of images: momentum, step, projection on the
// ball around the clean image, clip to the bounds. See projected_step.cpp for the method.
#pragma once

#include "attack_step.h"
#include "dtypes.h"

namespace pyvit {

void projected_step(DType dtype, ProjectedStep step);

// csrc/cpu/projected_step_l1.cpp: everything after the momentum.
void projected_step_l1(DType dtype, const ProjectedStep& step);

}  // namespace pyvit
