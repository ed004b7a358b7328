// What is asked of a convolution with few pixels (conv2d_small.cpp) before it is computed.
#pragma once

#include <algorithm>
#include <vector>

#include "conv2d.h"

namespace pyvit {

constexpr int64_t kFewPixels = 9;  // of the output: always this kernel's
constexpr int64_t kMostPixels = 64;
constexpr int64_t kManyChannels = 32;
constexpr int64_t kBytes = 768 << 10;  // of each operand of one task

// The convolution of one group, and the order of its weights.
struct Geometry {
  const Conv2dShape& shape;
  int64_t C, O, pixels;
  bool whole;  // the kernel is as large as the image: one row of weights meets one of pixels
  bool last;   // weights' channels lie side by side
  std::vector<int64_t> rows, columns;  // kernel rows and columns that take part

  Geometry(const Conv2dShape& s, const View4& w, bool whole_image)
      : shape(s), C(s.in_channels / s.groups), O(s.out_channels / s.groups),
        pixels(s.out_height * s.out_width), whole(whole_image) {
    const int64_t taps = s.kernel[0] * s.kernel[1];
    const bool by_column = s.kernel[1] == 1, by_row = s.kernel[0] == 1;
    const int64_t* t = w.stride;
    last = (C == 1 || t[1] == 1) && (by_column || t[3] == C) && (by_row || t[2] == C * s.kernel[1]);
    planar_ = (by_column || t[3] == 1) && (by_row || t[2] == s.kernel[1]) &&
              (C == 1 || t[1] == taps);
    for (int axis = 0; axis < 2; ++axis) {
      std::vector<int64_t>& kept = axis == 0 ? rows : columns;
      for (int64_t i = 0; i < s.kernel[axis]; ++i)
        if (!last || reaches(axis, i)) kept.push_back(i);
    }
  }

  // Whether to multiply weights where they lie pays; `narrow`: rows too short for a band; `run`:
  // weights side by side that a pixel meets.
  bool pays(bool narrow, int64_t run) const {
    if (whole) return true;
    // The pixels of a 1×1 layer may be a batch (a linear layer's rows), whose size must not decide.
    if (shape.kernel[0] * shape.kernel[1] == 1) return false;
    // Few weights are soon packed.
    if (!(last || planar_) || run < kManyChannels || rows.empty() || columns.empty()) return false;
    return pixels <= (narrow ? kMostPixels : kFewPixels);
  }
  // The input row or column that tap i of output position o meets; -1 outside the image.
  int64_t input(int axis, int64_t o, int64_t i) const {
    const int64_t at = o * shape.stride[axis] - shape.padding[axis] + i * shape.dilation[axis];
    return at < (axis == 0 ? shape.height : shape.width) ? std::max<int64_t>(-1, at) : -1;
  }

 private:
  bool reaches(int axis, int64_t i) const {
    const int64_t out = axis == 0 ? shape.out_height : shape.out_width;
    for (int64_t o = 0; o < out; ++o)
      if (input(axis, o, i) >= 0) return true;
    return false;
  }
  bool planar_;
};

// Makes a kernel that covers its whole image a 1×1 kernel of many channels, where memory has the
// elements of both in one order. Returns whether it did.
bool flatten_whole_image(Conv2dShape& s, View4& x, View4& w) {
  const int64_t C = s.in_channels, area = s.height * s.width;
  bool same = s.groups == 1 && area > 1 && s.out_height == 1 && s.out_width == 1;
  for (int axis = 0; axis < 2; ++axis)
    same = same && s.padding[axis] == 0 && s.kernel[axis] == (axis == 0 ? s.height : s.width) &&
           (s.dilation[axis] == 1 || s.kernel[axis] == 1);
  auto is_planar = [&](const View4& t) {
    return t.stride[3] == 1 && t.stride[2] == s.width && (C == 1 || t.stride[1] == area);
  };
  auto is_last = [&](const View4& t) {
    return t.stride[1] == 1 && t.stride[3] == C && t.stride[2] == C * s.width;
  };
  if (!same || !((is_planar(x) && is_planar(w)) || (is_last(x) && is_last(w)))) return false;
  s.in_channels *= area;
  s.height = s.width = s.kernel[0] = s.kernel[1] = 1;
  x.stride[1] = w.stride[1] = 1;
  return true;
}

}  // namespace pyvit
