#include "cpu/projected_step.h"

#include <tuple>

#include "bindings/tensors.h"

namespace pyvit {
namespace {

using MaybeTensor = std::optional<Tensor>;

void set_operand(ProjectedStep& step, StepOperand operand, const Tensor& tensor) {
  const auto strides = tensor.strides();
  step.data[operand] = const_cast<void*>(tensor.const_data_ptr());
  step.batch_stride[operand] = strides[0];
  step.strides[operand].assign(strides.begin() + 1, strides.end());
}

ProjectedStep describe(const Tensor& x, const Tensor& grad, const Tensor& x0, const Tensor& out,
                       int64_t norm, bool raw, bool targeted, double step_size, double eps,
                       const MaybeTensor& step_sizes, const MaybeTensor& eps_of_image, double lo,
                       double hi, double quantile) {
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

Tensor without_momentum(Tensor x, Tensor grad, Tensor x0, int64_t norm, bool raw, bool targeted,
                        double step_size, double eps, MaybeTensor step_sizes,
                        MaybeTensor eps_of_image, double lo, double hi, double quantile) {
  Tensor out = pyvit::empty_like(x);
  projected_step(dtype_of(x), describe(x, grad, x0, out, norm, raw, targeted, step_size, eps,
                                       step_sizes, eps_of_image, lo, hi, quantile));
  return out;
}

std::tuple<Tensor, Tensor> with_momentum(Tensor x, Tensor grad, Tensor x0, int64_t norm, bool raw,
                                         bool targeted, double step_size, double eps,
                                         MaybeTensor step_sizes, MaybeTensor eps_of_image,
                                         double lo, double hi, double quantile, Tensor momentum,
                                         double decay) {
  Tensor out = pyvit::empty_like(x), momentum_out = pyvit::empty_like(momentum);
  ProjectedStep step = describe(x, grad, x0, out, norm, raw, targeted, step_size, eps, step_sizes,
                                eps_of_image, lo, hi, quantile);
  step.has_momentum = true;
  step.decay = decay;
  set_operand(step, kMomentum, momentum);
  set_operand(step, kMomentumOut, momentum_out);
  projected_step(dtype_of(x), step);
  return {out, momentum_out};
}

}  // namespace
}  // namespace pyvit

STABLE_TORCH_LIBRARY_IMPL(pyvit, CPU, m) {
  m.impl("projected_step", TORCH_BOX(&pyvit::without_momentum));
  m.impl("projected_step_momentum", TORCH_BOX(&pyvit::with_momentum));
}
