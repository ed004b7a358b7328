// A convolution seen from its destination: what its forward pass and its input gradient share.
//
// The input gradient gathers: no two tasks write one place. Input row h is read by output row
// (h + padding - i·dilation) / stride for each kernel row i where that is whole. Rows of one
// residue h mod stride share their kernel rows, and for h = residue + stride·t the output row is
// t + (residue + padding - i·dilation) / stride. So each of the stride² residues (phases) is a
// dense convolution of dy, with step 1, that writes every stride-th pixel. The forward pass is
// one phase.
#pragma once

#include <algorithm>
#include <vector>

#include "conv2d.h"
#include "conv2d_patches.h"

namespace pyvit {

template <class S>
struct Destination {
  S* data;
  int64_t channels;
  int64_t stride[4];  // batch, channel, row, column of the destination grid
};

// Weights seen from a destination: element (destination channel, source channel, row, column).
template <class S>
struct Weights {
  const S* data;
  int64_t stride[4];
  const S& at(int64_t d, int64_t s, int64_t i, int64_t j) const {
    return data[d * stride[0] + s * stride[1] + i * stride[2] + j * stride[3]];
  }
};

// One phase; `destination` starts at its first pixel and has the strides of its own pixels.
template <class S>
struct Gather {
  PatchSource<S> source;
  Weights<S> weights;
  Destination<S> destination;
  int64_t batch, groups;
  const S* bias;
  int64_t group_stride;  // of the weights

  Gather group(int64_t g) const {
    Gather one = *this;
    one.source.data += g * source.channels * source.stride[1];
    one.destination.data += g * destination.channels * destination.stride[1];
    one.weights.data += g * group_stride;
    if (bias != nullptr) one.bias += g * destination.channels;
    return one;
  }
};

// All phases of one convolution, row residue by row residue.
template <class S>
struct Phases {
  std::vector<Gather<S>> list;
  int64_t size[2];    // of the whole destination
  int64_t stride[2];  // destination pixels from one pixel of a phase to the next
};

template <class S>
Phases<S> forward_phases(const Conv2dShape& shape, View4 x, View4 w, const void* bias, View4 y) {
  const int64_t out_per_group = shape.out_channels / shape.groups;
  Gather<S> g{forward_patches<S>(shape, x),
              {static_cast<const S*>(w.data),
               {w.stride[0], w.stride[1], w.stride[2], w.stride[3]}},
              {static_cast<S*>(y.data),
               out_per_group,
               {y.stride[0], y.stride[1], y.stride[2], y.stride[3]}},
              shape.batch,
              shape.groups,
              static_cast<const S*>(bias),
              out_per_group * w.stride[0]};
  return {{g}, {shape.out_height, shape.out_width}, {1, 1}};
}

// The kernel rows (or columns) that reach inputs of one residue, with the output they reach from.
inline std::vector<Tap> taps_of_residue(const Conv2dShape& shape, int axis, int64_t residue) {
  std::vector<Tap> taps;
  for (int64_t i = 0; i < shape.kernel[axis]; ++i) {
    const int64_t distance = residue + shape.padding[axis] - i * shape.dilation[axis];
    if (distance % shape.stride[axis] == 0) taps.push_back({i, distance / shape.stride[axis]});
  }
  return taps;
}

template <class S>
Phases<S> input_grad_phases(const Conv2dShape& shape, View4 dy, View4 w, View4 dx) {
  const int64_t out_per_group = shape.out_channels / shape.groups;
  Phases<S> phases{{}, {shape.height, shape.width}, {shape.stride[0], shape.stride[1]}};
  phases.list.reserve(std::min(shape.stride[0], shape.height) *
                      std::min(shape.stride[1], shape.width));
  for (int64_t rh = 0; rh < std::min(shape.stride[0], shape.height); ++rh) {
    for (int64_t rw = 0; rw < std::min(shape.stride[1], shape.width); ++rw) {
      phases.list.push_back(
          {{static_cast<const S*>(dy.data),
            out_per_group,
            shape.out_height,
            shape.out_width,
            {dy.stride[0], dy.stride[1], dy.stride[2], dy.stride[3]},
            {ceil_div(shape.height - rh, shape.stride[0]),
             ceil_div(shape.width - rw, shape.stride[1])},
            {1, 1},
            {taps_of_residue(shape, 0, rh), taps_of_residue(shape, 1, rw)}},
           {static_cast<const S*>(w.data), {w.stride[1], w.stride[0], w.stride[2], w.stride[3]}},
           {static_cast<S*>(dx.data) + rh * dx.stride[2] + rw * dx.stride[3],
            shape.in_channels / shape.groups,
            {dx.stride[0], dx.stride[1], dx.stride[2] * shape.stride[0],
             dx.stride[3] * shape.stride[1]}},
           shape.batch,
           shape.groups,
           nullptr,
           out_per_group * w.stride[0]});
    }
  }
  return phases;
}

// Leaves out the first and last taps that meet no source pixel from any destination pixel, as with a
// dilation beyond the image's size. Those that a step has pass over a small image stay: taps are
// equally spaced.
template <class S>
void drop_idle_taps(Phases<S>& phases) {
  for (Gather<S>& phase : phases.list) {
    PatchSource<S>& source = phase.source;
    for (int axis = 0; axis < 2; ++axis) {
      const int64_t size = axis == 0 ? source.height : source.width;
      auto idle = [&](const Tap& tap) {
        const Span meets = inside(tap.offset, source.step[axis], size, source.grid[axis]);
        return meets.begin >= meets.end;
      };
      auto& taps = source.taps[axis];
      taps.erase(taps.begin(), std::find_if_not(taps.begin(), taps.end(), idle));
      while (!taps.empty() && idle(taps.back())) taps.pop_back();
    }
  }
}

// Where an axis has one tap, always inside the image, the pixels that a step skips need not exist:
// a strided view of the source takes its place.
template <class S>
void drop_skipped_pixels(Phases<S>& phases) {
  for (Gather<S>& phase : phases.list) {
    PatchSource<S>& s = phase.source;
    for (int axis = 0; axis < 2; ++axis) {
      if (s.taps[axis].size() != 1 || s.step[axis] == 1) continue;
      int64_t& size = axis == 0 ? s.height : s.width;
      int64_t& offset = s.taps[axis][0].offset;
      if (offset < 0 || offset + (s.grid[axis] - 1) * s.step[axis] >= size) continue;
      s.data += offset * s.stride[2 + axis];
      s.stride[2 + axis] *= s.step[axis];
      size = s.grid[axis];
      s.step[axis] = 1;
      offset = 0;
    }
  }
}

// A 1×1 convolution with step 1 takes an image as one long row where memory allows it, and the
// whole batch as one image.
template <class S>
void flatten_pointwise(Phases<S>& phases) {
  if (phases.list.size() != 1) return;
  Gather<S>& g = phases.list[0];
  PatchSource<S>& s = g.source;
  Destination<S>& d = g.destination;
  const bool pointwise = s.taps[0].size() == 1 && s.taps[1].size() == 1 &&
                         s.taps[0][0].offset == 0 && s.taps[1][0].offset == 0 &&
                         s.step[0] == 1 && s.step[1] == 1 && s.grid[0] == s.height &&
                         s.grid[1] == s.width;
  if (!pointwise) return;
  if (s.width == 1) s.stride[3] = s.stride[2], d.stride[3] = d.stride[2];
  if (s.height > 1 && s.width > 1 &&
      (s.stride[2] != s.width * s.stride[3] || d.stride[2] != s.width * d.stride[3]))
    return;
  s.width *= s.height;
  s.height = 1;
  if (g.batch == 1 ||
      (s.stride[0] == s.width * s.stride[3] && d.stride[0] == s.width * d.stride[3])) {
    s.width *= g.batch;
    g.batch = 1;
  }
  s.grid[0] = phases.size[0] = 1;
  s.grid[1] = phases.size[1] = s.width;
  // The only phase of a stride across an image one pixel wide or high is the whole of it.
  phases.stride[0] = phases.stride[1] = 1;
}

}  // namespace pyvit
