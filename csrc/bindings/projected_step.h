// What projected_step's arguments say of their tensors, for every device.
#pragma once

#include "attack_step.h"
#include "bindings/tensors.h"

namespace pyvit {

using MaybeTensor = std::optional<Tensor>;

inline void set_operand(ProjectedStep& step, StepOperand operand, const Tensor& tensor) {
  const auto strides = tensor.strides();
  step.data[operand] = const_cast<void*>(tensor.const_data_ptr());
  step.batch_stride[operand] = strides[0];
  step.strides[operand].assign(strides.begin() + 1, strides.end());
}

inline ProjectedStep describe_step(const Tensor& x, const Tensor& grad, const Tensor& x0,
                                   const Tensor& out, int64_t norm, bool raw, bool targeted,
                                   double step_size, double eps, const MaybeTensor& step_sizes,
                                   const MaybeTensor& eps_of_image, double lo, double hi,
                                   double quantile) {
  ProjectedStep step{};
  step.norm = static_cast<StepNorm>(norm);
  step.raw = raw;
  step.targeted = targeted;
  step.lo = lo;
  step.hi = hi;
  step.quantile = quantile;
  step.step_size = step_size;
  step.eps = eps;
  step.step_sizes = static_cast<const double*>(data_or_null(step_sizes));
  step.eps_of_image = static_cast<const double*>(data_or_null(eps_of_image));
  const auto sizes = x.sizes();
  step.batch = sizes[0];
  step.sizes.assign(sizes.begin() + 1, sizes.end());
  set_operand(step, kX, x);
  set_operand(step, kGrad, grad);
  set_operand(step, kX0, x0);
  set_operand(step, kOut, out);
  return step;
}

inline void add_momentum(ProjectedStep& step, const Tensor& momentum, const Tensor& momentum_out,
                         double decay) {
  step.has_momentum = true;
  step.decay = decay;
  set_operand(step, kMomentum, momentum);
  set_operand(step, kMomentumOut, momentum_out);
}

}  // namespace pyvit
