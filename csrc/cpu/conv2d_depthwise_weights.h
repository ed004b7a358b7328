// The weights of a vector of lanes, packed for conv2d_depthwise_kernel.h: [phase][slot][tap
// row][tap column] of vectors, where tap rows and columns are in ascending order of their offsets.
#pragma once

#include <vector>

#include "conv2d_depthwise_plan.h"

namespace pyvit {

template <class S>
class LaneWeights {
  using T = Compute<S>;
  static constexpr int64_t L = kLanes<T>;

 public:
  LaneWeights(const LanePlan<S>& plan, const int64_t kernel[2])
      : plan_(plan), kernel_columns_(kernel[1]), places_(kernel[0] * kernel[1]) {
    int64_t begin = 0;
    for (size_t p = 0; p < plan.phases.list.size(); ++p) {
      const auto& taps = plan.phases.list[p].source.taps;
      const TapAxis &down = plan.taps[0][p], &across = plan.taps[1][p];
      first_place_.push_back(begin);
      for (const Tap& i : taps[0])
        for (const Tap& j : taps[1])
          places_[i.kernel * kernel_columns_ + j.kernel] = {
              begin + down.place(i) * across.count + across.place(j), down.count * across.count};
      begin += plan.slots * down.count * across.count;
    }
  }

  // Where a phase's weights begin in a panel, in elements.
  int64_t phase(size_t p) const { return first_place_[p] * L; }

  // Each lane's kernels as a row of `kernels`, then all of them transposed and put where the sums
  // want them.
  void pack(T* panel, T* kernels, const LaneBlock<T>& block) const {
    const int64_t taps = places_.size(), length = plan_.slots * taps;
    const Gather<S>& g = plan_.any();
    const int64_t* stride = g.weights.stride;
    const bool run = stride[3] == 1 && stride[2] == kernel_columns_;
    // Channels side by side: a lane's weights are one run, tap by tap.
    const bool last = plan_.slots > 1 && stride[1] == 1 &&
                      (kernel_columns_ == 1 || stride[3] == plan_.slots) &&
                      (taps == kernel_columns_ || stride[2] == kernel_columns_ * plan_.slots);
    if (block.count < L) std::fill(kernels, kernels + length * L, T(0));
    for (int64_t l = 0; l < block.count; ++l) {
      const int64_t channel = block.first + l;
      const S* of_lane = g.weights.data + channel / plan_.per_group * g.group_stride +
                         channel % plan_.per_group * stride[0];
      T* to = kernels + l * length;
      if (last) {
        widen_run(to, of_lane, length);
        continue;
      }
      for (int64_t s = 0; s < plan_.slots; ++s, of_lane += stride[1], to += taps) {
        if (run) {
          widen_run(to, of_lane, taps);
          continue;
        }
        for (int64_t t = 0; t < taps; ++t)
          to[t] = widen(
              of_lane[t / kernel_columns_ * stride[2] + t % kernel_columns_ * stride[3]]);
      }
    }
    T turned[L * L];
    int64_t slot = 0, tap = 0;
    for (int64_t e = 0; e < length; e += L) {
      const int64_t count = std::min(L, length - e);
      transpose(turned, L, kernels + e, length, 1, L, count);
      for (int64_t i = 0; i < count; ++i) {
        const Place& place = places_[tap];
        if (place.first >= 0)
          store(panel + (place.first + slot * place.slot_stride) * L, load(turned + i * L));
        if (last) {
          if (++slot == plan_.slots) slot = 0, ++tap;
        } else if (++tap == taps) {
          tap = 0, ++slot;
        }
      }
    }
  }

 private:
  // Where tap (row, column) of the kernel stands in the panel, for slot 0 and in vectors; what
  // another slot adds; -1 where no destination pixel uses it.
  struct Place {
    int64_t first = -1, slot_stride = 0;
  };
  const LanePlan<S>& plan_;
  const int64_t kernel_columns_;
  std::vector<Place> places_;
  std::vector<int64_t> first_place_;  // of each phase
};

}  // namespace pyvit
