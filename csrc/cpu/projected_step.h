// One step of a projected-gradient attack for a batch of images: momentum, step, projection on the
// ball around the clean image, clip to the bounds. See projected_step.cpp for the method.
#pragma once

#include <cstdint>
#include <vector>

#include "dtypes.h"

namespace pyvit {

enum class StepNorm : int64_t { linf, l2, l1 };

enum StepOperand { kX, kGrad, kX0, kOut, kMomentum, kMomentumOut, kStepOperands };

struct ProjectedStep {
  StepNorm norm;
  bool raw;              // step along the gradient itself, not its sign or its direction
  bool targeted;         // descend instead of ascend
  double lo, hi;         // bounds of a pixel
  double quantile;       // L1: a sparse step moves the (1 - quantile) part of the pixels
  bool has_momentum;     // else kMomentum and kMomentumOut are unused
  double decay;          // of the momentum
  double step_size;      // of every image, where step_sizes is null
  double eps;            // likewise; infinity: no ball
  const double* step_sizes;  // one an image, or null
  const double* eps_of_image;

  int64_t batch;
  std::vector<int64_t> sizes;  // of one image
  void* data[kStepOperands];
  int64_t batch_stride[kStepOperands];
  std::vector<int64_t> strides[kStepOperands];  // within one image, in elements

  double step_size_of(int64_t image) const { return step_sizes ? step_sizes[image] : step_size; }
  double eps_at(int64_t image) const { return eps_of_image ? eps_of_image[image] : eps; }
  // The operand that holds what the step follows.
  StepOperand direction() const { return has_momentum ? kMomentumOut : kGrad; }
};

void projected_step(DType dtype, ProjectedStep step);

// csrc/cpu/projected_step_l1.cpp: everything after the momentum.
void projected_step_l1(DType dtype, const ProjectedStep& step);

}  // namespace pyvit
