// One step of a projected-gradient attack on a GPU: see projected_step.cu.
#pragma once

#include "attack_step.h"
#include "shapes.h"

namespace pyvit::cuda {

// What a call needs besides its operands; what it holds at first does not matter.
struct StepScratch {
  double* sums;   // step_sums() of them
  float* deltas;  // step_deltas(); aligned to 32 bytes
};
int64_t step_sums(const ProjectedStep& step);
int64_t step_deltas(const ProjectedStep& step);

// `stream` is a cudaStream_t. Not for empty tensors.
void projected_step(DType dtype, ProjectedStep step, StepScratch scratch, void* stream);

}  // namespace pyvit::cuda
