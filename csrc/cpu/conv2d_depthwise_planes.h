// Depth-wise 3×3 layers on planar images (conv2d_depthwise.cpp): every plane is a convolution of
// its own, with columns in the lanes (conv2d_depthwise_plane_kernel.h); nothing is copied or
// transposed.
//
// A task owns a destination plane, or some rows of it.
#pragma once

#include <algorithm>

#include "conv2d_depthwise_plan.h"
#include "conv2d_depthwise_plane_kernel.h"

#if defined(PYVIT_HAS_LANE_MASKS)
namespace pyvit {

struct DepthwisePlan {
  static constexpr int64_t L = kLanes<float>;
  const Gather<float>& g;
  const TapAxis down, across;
  const int64_t columns;
  int64_t rows = 0, boxes = 0;  // destination rows of a task
  bool possible;

  explicit DepthwisePlan(const Phases<float>& phases)
      : g(phases.list[0]),
        down(g.source.taps[0]),
        across(g.source.taps[1]),
        columns(g.source.grid[1]) {
    const auto &source = g.source;
    const auto &to = g.destination;
    const bool planar = source.stride[3] == 1 && to.stride[3] == 1 && to.stride[1] != 1;
    const bool dense = source.step[0] == 1 && source.step[1] == 1 && down.spacing == 1 &&
                       across.spacing == 1 && down.count == DepthwiseTile::taps &&
                       across.count == DepthwiseTile::taps;
    possible = phases.list.size() == 1 && phases.stride[0] * phases.stride[1] == 1 && planar &&
               dense && source.channels == 1 && to.channels == 1 && g.groups > 1 && columns >= L;
    if (!possible) return;
    const int64_t planes = g.batch * g.groups;
    boxes = std::min(ceil_div(source.grid[0], DepthwiseTile::rows),
                     ceil_div(2 * thread_count(), planes));
    rows = ceil_div(source.grid[0], boxes);
    boxes = ceil_div(source.grid[0], rows);
  }
  int64_t tasks() const { return g.batch * g.groups * boxes; }
  // Zeros in the place of a row outside the image.
  int64_t zeros() const { return g.source.width; }
};

class DepthwiseWorker {
  static constexpr int64_t L = kLanes<float>;

 public:
  explicit DepthwiseWorker(const DepthwisePlan& plan) : plan_(plan) {
    Scratch scratch(Scratch::bytes_for<float>(plan.zeros()));
    zeros_ = scratch.take<float>(plan.zeros());
    std::fill(zeros_, zeros_ + plan.zeros(), 0.0f);
  }

  void run(int64_t task) {
    const auto &source = plan_.g.source;
    const auto &to = plan_.g.destination;
    const int64_t plane = task / plan_.boxes, row = task % plan_.boxes * plan_.rows;
    const int64_t image = plane / plan_.g.groups, channel = plane % plan_.g.groups;
    if (channel != channel_) enter(channel);
    const int64_t end = std::min(source.grid[0], row + plan_.rows);
    multiply(source.data + image * source.stride[0] + channel * source.stride[1],
             to.data + image * to.stride[0] + channel * to.stride[1], row, end);
  }

 private:
  void enter(int64_t channel) {
    const Gather<float>& g = plan_.g;
    const float* of_channel = g.weights.data + channel * g.group_stride;
    channel_ = channel;
    bias_ = g.bias == nullptr ? 0.0f : g.bias[channel];
    for (const Tap& i : g.source.taps[0])
      for (const Tap& j : g.source.taps[1])
        weights_[plan_.down.place(i) * DepthwiseTile::taps + plan_.across.place(j)] =
            of_channel[i.kernel * g.weights.stride[2] + j.kernel * g.weights.stride[3]];
  }

  // Destination rows [begin, end), a strip of one or two vectors of columns after the other.
  void multiply(const float* source, float* to, int64_t begin, int64_t end) const {
    const PatchSource<float>& shape = plan_.g.source;
    const int64_t columns = plan_.columns, row_stride = plan_.g.destination.stride[2];
    DepthwiseTile::Arguments tile;
    tile.weights = weights_;
    tile.base = bias_;
    tile.c_row_stride = row_stride;
    for (int64_t w = 0; w < columns;) {
      // The last vector of a row overlaps its neighbour.
      const int64_t last = columns - L, at = std::min(w, last);
      const int64_t vectors = w + L < columns ? 2 : 1, first = at + plan_.across.first;
      tile.vector_stride = std::min(w + L, last) - at;
      const int64_t reach = (vectors - 1) * tile.vector_stride + L + DepthwiseTile::taps - 1;
      const bool masked = first < 0 || first + reach > shape.width;
      for (int64_t j = 0; masked && j < DepthwiseTile::taps; ++j)
        for (int64_t v = 0; v < vectors; ++v) {
          const int64_t column = first + j + v * tile.vector_stride;
          tile.inside[j][v] = lanes_between(-column, shape.width - column);
        }
      for (int64_t r = begin; r < end;) {
        const int64_t count = (end - r) / ceil_div(end - r, DepthwiseTile::rows);
        for (int64_t i = 0; i < count + DepthwiseTile::taps - 1; ++i) {
          const int64_t h = r + plan_.down.first + i;
          const bool outside = h < 0 || h >= shape.height;
          tile.source[i] = (outside ? zeros_ : source + h * shape.stride[2]) + first;
        }
        tile.c = to + r * row_stride + at;
        const int64_t next = r + plan_.down.first + count + DepthwiseTile::taps - 1;
        fetch(tile, source + next * shape.stride[2] + first, shape.stride[2], count);
        run_depthwise_kernel(count, vectors, masked, tile);
        r += count;
      }
      w += vectors * L;
    }
  }

  // What the next rows read and write; the row after a plane's last is the next plane's first.
  static void fetch(const DepthwiseTile::Arguments& tile, const float* source, int64_t row_stride,
                    int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      const float* from = source + r * row_stride;
      const float* to = tile.c + (rows + r) * tile.c_row_stride;
      __builtin_prefetch(from);
      __builtin_prefetch(from + tile.vector_stride);
      __builtin_prefetch(to, 1);
      __builtin_prefetch(to + tile.vector_stride, 1);
    }
  }

  const DepthwisePlan& plan_;
  float* zeros_;
  float weights_[DepthwiseTile::taps * DepthwiseTile::taps];
  float bias_ = 0;
  int64_t channel_ = -1;
};

}  // namespace pyvit
#endif
