// What a call of projected_step says of its images, to kernels of the CPU and of a GPU alike. No
// torch here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <numeric>
#include <vector>

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

// Brings the dimensions of an image into the order of the result's memory and merges neighbours
// that every operand allows to merge. What is left depends on the layout of one image alone, and
// so does the order of every sum: an image's batch-mates change nothing.
inline void merge_dimensions(ProjectedStep& p) {
  const int operands = p.has_momentum ? kStepOperands : kMomentum;
  std::vector<size_t> order;
  for (size_t d = 0; d < p.sizes.size(); ++d)
    if (p.sizes[d] != 1) order.push_back(d);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return p.strides[kOut][a] > p.strides[kOut][b];
  });
  std::vector<int64_t> sizes, strides[kStepOperands];
  for (const size_t d : order) {
    bool merges = !sizes.empty();
    for (int o = 0; o < operands && merges; ++o)
      merges = strides[o].back() == p.strides[o][d] * p.sizes[d];
    if (merges) {
      sizes.back() *= p.sizes[d];
    } else {
      sizes.push_back(p.sizes[d]);
    }
    for (int o = 0; o < operands; ++o) {
      if (!merges) strides[o].push_back(0);
      strides[o].back() = p.strides[o][d];
    }
  }
  if (sizes.empty()) {  // an image of one element
    sizes.push_back(1);
    for (auto& s : strides) s.push_back(1);
  }
  p.sizes = sizes;
  for (int o = 0; o < operands; ++o) p.strides[o] = strides[o];
}

inline int64_t image_elements(const ProjectedStep& p) {
  return std::accumulate(p.sizes.begin(), p.sizes.end(), int64_t{1}, std::multiplies<int64_t>());
}

}  // namespace pyvit
