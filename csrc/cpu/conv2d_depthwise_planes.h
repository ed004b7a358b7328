// Depth-wise 3×3 layers on planar images (conv2d_depthwise.cpp): every plane is a convolution of
// its own, with columns in the lanes (conv2d_depthwise_plane_kernel.h); nothing is copied or
// transposed. So is an image whose channels lie side by side and are too few to fill a vector: one
// plane, in which a pixel's neighbour is as many columns away as there are channels.
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
  int64_t step = 0;                          // columns of a plane that a pixel has
  int64_t columns = 0, width = 0;            // of a destination and of a source plane
  int64_t planes = 0, rows = 0, boxes = 0;  // of the batch; destination rows of a task
  bool possible;

  explicit DepthwisePlan(const Phases<float>& phases)
      : g(phases.list[0]), down(g.source.taps[0]), across(g.source.taps[1]) {
    const auto &source = g.source;
    const auto &to = g.destination;
    const bool dense = source.step[0] == 1 && source.step[1] == 1 && down.spacing == 1 &&
                       across.spacing == 1 && down.count == DepthwiseTile::taps &&
                       across.count == DepthwiseTile::taps;
    if (source.stride[3] == 1 && to.stride[3] == 1 && to.stride[1] != 1) {
      step = 1;
    } else if (g.groups < L && source.stride[1] == 1 && to.stride[1] == 1 &&
               source.stride[3] == g.groups && to.stride[3] == g.groups) {
      step = g.groups;
    }
    columns = source.grid[1] * step;
    width = source.width * step;
    possible = phases.list.size() == 1 && phases.stride[0] * phases.stride[1] == 1 && dense &&
               source.channels == 1 && to.channels == 1 && g.groups > 1 && columns >= L;
    if (!possible) return;
    planes = g.batch * (step == 1 ? g.groups : 1);
    boxes = std::min(ceil_div(source.grid[0], DepthwiseTile::rows),
                     ceil_div(2 * thread_count(), planes));
    rows = ceil_div(source.grid[0], boxes);
    boxes = ceil_div(source.grid[0], rows);
  }
  int64_t tasks() const { return planes * boxes; }
  // Zeros in the place of a row outside the image.
  int64_t zeros() const { return width; }
};

class DepthwiseWorker {
  static constexpr int64_t L = kLanes<float>;

 public:
  explicit DepthwiseWorker(const DepthwisePlan& plan)
      : plan_(plan),
        scratch_(Scratch::bytes_for<float>(plan.zeros()) +
                 Scratch::bytes_for<float>(plan.step * (kTaps + 1) * L)),
        zeros_(scratch_.take<float>(plan.zeros())),
        weights_(scratch_.take<float>(plan.step * (kTaps + 1) * L)) {
    std::fill(zeros_, zeros_ + plan.zeros(), 0.0f);
  }

  void run(int64_t task) {
    const auto &source = plan_.g.source;
    const auto &to = plan_.g.destination;
    const int64_t plane = task / plan_.boxes, row = task % plan_.boxes * plan_.rows;
    const int64_t planes = plan_.planes / plan_.g.batch;  // of an image
    const int64_t image = plane / planes, channel = plane % planes;
    if (channel != channel_) enter(channel);
    const int64_t end = std::min(source.grid[0], row + plan_.rows);
    multiply(source.data + image * source.stride[0] + channel * source.stride[1],
             to.data + image * to.stride[0] + channel * to.stride[1], row, end);
  }

 private:
  static constexpr int64_t kTaps = DepthwiseTile::taps * DepthwiseTile::taps;

  // What each lane multiplies by, for each channel that the first of them can have; and the bias.
  void enter(int64_t channel) {
    const Gather<float>& g = plan_.g;
    channel_ = channel;
    // value(c) for the channel c of each lane; planes change often, so that one channel is quick.
    auto fill = [&](float* to, auto value) {
      if (plan_.step == 1) return std::fill(to, to + L, value(channel));
      for (int64_t first = 0; first < plan_.step; ++first, to += (kTaps + 1) * L)
        for (int64_t lane = 0; lane < L; ++lane) to[lane] = value((first + lane) % plan_.step);
    };
    for (const Tap& i : g.source.taps[0])
      for (const Tap& j : g.source.taps[1]) {
        const float* tap = g.weights.data + i.kernel * g.weights.stride[2] +
                           j.kernel * g.weights.stride[3];
        fill(weights_ + (plan_.down.place(i) * DepthwiseTile::taps + plan_.across.place(j)) * L,
             [&](int64_t c) { return tap[c * g.group_stride]; });
      }
    fill(weights_ + kTaps * L, [&](int64_t c) { return g.bias == nullptr ? 0.0f : g.bias[c]; });
  }

  // Destination rows [begin, end), a strip of one or two vectors of columns after the other.
  void multiply(const float* source, float* to, int64_t begin, int64_t end) const {
    const PatchSource<float>& shape = plan_.g.source;
    const int64_t columns = plan_.columns, row_stride = plan_.g.destination.stride[2];
    const int64_t before = plan_.across.first * plan_.step;  // the first tap of column 0
    DepthwiseTile::Arguments tile;
    tile.tap_step = plan_.step;
    tile.c_row_stride = row_stride;
    for (int64_t w = 0; w < columns;) {
      // The last vector of a row overlaps its neighbour.
      const int64_t last = columns - L, at = std::min(w, last);
      const int64_t vectors = w + L < columns ? 2 : 1, first = at + before;
      tile.vector_stride = std::min(w + L, last) - at;
      const int64_t reach = (vectors - 1) * tile.vector_stride + L +
                            (DepthwiseTile::taps - 1) * plan_.step;
      const bool masked = first < 0 || first + reach > plan_.width;
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t lane = (at + v * tile.vector_stride) % plan_.step;
        tile.weights[v] = weights_ + lane * (kTaps + 1) * L;
        tile.base[v] = tile.weights[v] + kTaps * L;
        for (int64_t j = 0; masked && j < DepthwiseTile::taps; ++j) {
          const int64_t column = first + j * plan_.step + v * tile.vector_stride;
          tile.inside[j][v] = lanes_between(-column, plan_.width - column);
        }
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
  Scratch scratch_;
  float *zeros_, *weights_;
  int64_t channel_ = -1;
};

}  // namespace pyvit
#endif
