// dw[o, c] = Σ_p dy[p, o] · x[p, c] of 1×1 layers with few outputs whose images have channels last:
// channels of x take the vector side of conv2d_planes_kernel.h, and both images are read where they
// lie. To read x is nearly all there is to do.
#pragma once

#include <algorithm>

#include "conv2d.h"
#include "conv2d_planes_kernel.h"
#include "split_sum.h"

namespace pyvit {

template <class T>
class PixelWeightGrad {
  static constexpr int64_t kChain = 256;  // pixels of one sum in registers
  static constexpr int64_t kMostChannels = 2048, kMostOutputs = 16;

 public:
  PixelWeightGrad(const Conv2dShape& s, const View4& dy, const View4& x)
      : C_(s.in_channels), O_(s.out_channels), pixels_(s.batch * s.height * s.width) {
    possible = s.groups == 1 && O_ <= kMostOutputs && C_ % kLanes<T> == 0 && C_ <= kMostChannels;
    for (int axis = 0; axis < 2; ++axis)
      possible = possible && s.kernel[axis] == 1 && s.stride[axis] == 1 && s.padding[axis] == 0;
    possible = possible && is_dense(s, x.stride, C_) && is_dense(s, dy.stride, O_) &&
               s.out_height == s.height && s.out_width == s.width;
  }

  void run(View4 dy, View4 x, View4 dw) const {
    const auto split = SplitSum<T>::of_bands(ceil_div(pixels_, kChain), O_ * C_, 0);
    T* const result = static_cast<T*>(dw.data);
    parallel_for(split.parts, [&](int64_t part) {
      Scratch scratch(Scratch::bytes_for<T>(O_ * C_) + Scratch::bytes_for<int64_t>(kChain));
      T* sums = split.parts > 1 ? split.partial(part) : scratch.take<T>(O_ * C_);
      int64_t* offsets = scratch.take<int64_t>(kChain);
      for (int64_t k = 0; k < kChain; ++k) offsets[k] = k * C_;
      std::fill_n(sums, O_ * C_, T(0));
      typename PlaneTile<T>::Arguments tile;
      tile.offsets = offsets;
      tile.w_step = O_, tile.w_pitch = 1;
      tile.base = nullptr;
      tile.from_pitch = tile.c_pitch = C_;
      const int64_t end = std::min(pixels_, split.end(part) * kChain);
      for (int64_t p = split.begin(part) * kChain; p < end; p += kChain) {
        tile.length = std::min(kChain, end - p);
        tile.x = static_cast<const T*>(x.data) + p * C_;
        for (int64_t o = 0; o < O_; o += PlaneTile<T>::rows) {
          tile.w = static_cast<const T*>(dy.data) + p * O_ + o;
          tile.from = tile.c = sums + o * C_;
          run_plane_kernel<T>(std::min<int64_t>(PlaneTile<T>::rows, O_ - o), C_ / kLanes<T>, tile);
        }
      }
      if (split.parts == 1) store(result, dw.stride, [&](int64_t i) { return sums[i]; });
    });
    if (split.parts > 1) store(result, dw.stride, [&](int64_t i) { return split.sum(i); });
  }

  bool possible;

 private:
  // Whether pixels of so many channels follow each other.
  static bool is_dense(const Conv2dShape& s, const int64_t stride[4], int64_t channels) {
    return (channels == 1 || stride[1] == 1) && (s.width == 1 || stride[3] == channels) &&
           (s.height == 1 || stride[2] == s.width * channels) &&
           (s.batch == 1 || stride[0] == s.height * s.width * channels);
  }

  template <class Sum>
  void store(T* to, const int64_t stride[4], const Sum& sum) const {
    for (int64_t o = 0; o < O_; ++o)
      for (int64_t c = 0; c < C_; ++c) to[o * stride[0] + c * stride[1]] = sum(o * C_ + c);
  }

  const int64_t C_, O_, pixels_;
};

// Whether the layer is of this kind; does the work if so.
template <class S>
bool pixel_weight_grad(const Conv2dShape& shape, View4 dy, View4 x, View4 dw) {
  if constexpr (std::is_same_v<S, Compute<S>>) {
    const PixelWeightGrad<S> pixels(shape, dy, x);
    if (pixels.possible) pixels.run(dy, x, dw);
    return pixels.possible;
  }
  return false;
}

}  // namespace pyvit
