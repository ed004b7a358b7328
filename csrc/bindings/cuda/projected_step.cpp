#include "cuda/projected_step.h"

#include <tuple>

#include "bindings/cuda/device.h"
#include "bindings/projected_step.h"

namespace pyvit {
namespace {

void run(const Tensor& x, const ProjectedStep& step) {
  if (x.numel() == 0) return;
  const Tensor sums = empty_of(x, {cuda::step_sums(step)}, ScalarType::Double);
  const Tensor deltas = empty_of(x, {cuda::step_deltas(step)}, ScalarType::Float);
  cuda::projected_step(dtype_of(x), step,
                       {static_cast<double*>(sums.mutable_data_ptr()),
                        static_cast<float*>(deltas.mutable_data_ptr())},
                       stream_of(x));
}

Tensor without_momentum(Tensor x, Tensor grad, Tensor x0, int64_t norm, bool raw, bool targeted,
                        double step_size, double eps, MaybeTensor step_sizes,
                        MaybeTensor eps_of_image, double lo, double hi, double quantile) {
  Tensor out = pyvit::empty_like(x);
  run(x, describe_step(x, grad, x0, out, norm, raw, targeted, step_size, eps, step_sizes,
                       eps_of_image, lo, hi, quantile));
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
  run(x, step);
  return {out, momentum_out};
}

}  // namespace
}  // namespace pyvit

STABLE_TORCH_LIBRARY_IMPL(pyvit_cuda, PYVIT_CUDA_KEY, m) {
  m.impl("projected_step", TORCH_BOX(&pyvit::without_momentum));
  m.impl("projected_step_momentum", TORCH_BOX(&pyvit::with_momentum));
}
