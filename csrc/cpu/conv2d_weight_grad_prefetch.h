// Fetches the operands of the next band into the second cache while the present one is multiplied:
// packing would else wait for memory, since a band's rows are too short for the processor's own
// prefetching.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "conv2d_weight_grad_plan.h"

namespace pyvit::weight_gradient {

// The cache lines of a rectangle of a tensor: images × channels × rows × columns.
class Prefetcher {
 public:
  Prefetcher() = default;

  template <class S>
  Prefetcher(const S* data, const int64_t stride[4], const Range (&range)[4]) {
    const int64_t size = sizeof(S), columns = range[3].count;
    next_ = reinterpret_cast<const char*>(data);
    for (int d = 0; d < 4; ++d) next_ += range[d].begin * stride[d] * size;
    if (stride[1] == 1 && stride[3] == range[1].count) {  // rows of whole pixels
      set({range[0].count, range[2].count, 1}, {stride[0], stride[2], 0}, columns * stride[3],
          size);
    } else if (stride[1] == 1) {  // pixels
      set({range[0].count, range[2].count, columns}, {stride[0], stride[2], stride[3]},
          range[1].count, size);
    } else if (stride[3] == 1 && stride[2] == columns) {  // whole rows of a plane
      set({range[0].count, range[1].count, 1}, {stride[0], stride[1], 0},
          range[2].count * columns, size);
    } else if (stride[3] == 1) {
      set({range[0].count, range[1].count, range[2].count}, {stride[0], stride[1], stride[2]},
          columns, size);
    }
  }

  int64_t lines() const { return lines_; }

  void fetch(int64_t count) {
    count = std::min(count, lines_);
    lines_ -= count;
    while (count > 0) {
      const int64_t some = std::min(count, left_);
      const char* line = next_;
      for (int64_t i = 0; i < some; ++i, line += kLine) __builtin_prefetch(line, 0, 2);
      next_ = line;
      count -= some;
      left_ -= some;
      if (left_ == 0) start_run();
    }
  }

 private:
  static constexpr int64_t kLine = 64;

  void set(std::array<int64_t, 3> count, std::array<int64_t, 3> step, int64_t run, int64_t size) {
    count_ = count;
    for (int d = 0; d < 3; ++d) step_[d] = step[d] * size;
    run_ = left_ = ceil_div(run * size, kLine);
    lines_ = count[0] * count[1] * count[2] * run_;
  }
  void start_run() {
    next_ -= run_ * kLine;
    left_ = run_;
    for (int d = 2; d >= 0; --d) {
      next_ += step_[d];
      if (++index_[d] < count_[d]) return;
      next_ -= step_[d] * count_[d];
      index_[d] = 0;
    }
  }

  const char* next_ = nullptr;
  std::array<int64_t, 3> count_{}, step_{}, index_{};
  int64_t run_ = 0, left_ = 0, lines_ = 0;  // lines of a run, those left of it and in all
};

}  // namespace pyvit::weight_gradient
