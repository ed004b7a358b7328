#include "cpu/projected_step.h"

#include <tuple>

#include "bindings/projected_step.h"

namespace pyvit {
namespace {

Tensor without_momentum(Tensor x, Tensor grad, Tensor x0, int64_t norm, bool raw, bool targeted,
                        double step_size, double eps, MaybeTensor step_sizes,
                        MaybeTensor eps_of_image, double lo, double hi, double quantile) {
  Tensor out = pyvit::empty_like(x);
  projected_step(dtype_of(x), describe_step(x, grad, x0, out, norm, raw, targeted, step_size, eps,
                                            step_sizes, eps_of_image, lo, hi, quantile));
  return out;
}

std::tuple<Tensor, Tensor> with_momentum(Tensor x, Tensor grad, Tensor x0, int64_t norm, bool raw,
                                         bool targeted, double step_size, double eps,
                                         MaybeTensor step_sizes, MaybeTensor eps_of_image,
                                         double lo, double hi, double quantile, Tensor momentum,
                                         double decay) {
  Tensor out = pyvit::empty_like(x), momentum_out = pyvit::empty_like(momentum);
  ProjectedStep step = describe_step(x, grad, x0, out, norm, raw, targeted, step_size, eps,
                                     step_sizes, eps_of_image, lo, hi, quantile);
  add_momentum(step, momentum, momentum_out, decay);
  projected_step(dtype_of(x), step);
  return {out, momentum_out};
}

}  // namespace
}  // namespace pyvit

STABLE_TORCH_LIBRARY_IMPL(pyvit, CPU, m) {
  m.impl("projected_step", TORCH_BOX(&pyvit::without_momentum));
  m.impl("projected_step_momentum", TORCH_BOX(&pyvit::with_momentum));
}
