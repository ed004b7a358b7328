// y[p, o] = Σ_e window(p)[e] · w[o, e] for few outputs, few pixels and planar weights: the weights of
// a task are turned to have channels side by side, as are its images, and a pixel's window is then
// some runs of its image, a row of taps each. One pixel of several images meets the same weights,
// those of the taps inside the image.
#pragma once

#include <algorithm>
#include <vector>

#include "conv2d_small_geometry.h"
#include "conv2d_small_tiles.h"
#include "dtypes.h"
#include "parallel.h"
#include "patches.h"
#include "transpose.h"

namespace pyvit {

constexpr int64_t kFewOutputs = 32;    // of a group; for more of them, patches are soon packed
constexpr int64_t kWindowChain = 256;  // longest sum in registers

template <class S>
class WindowProduct {
  using T = Compute<S>;
  using Tile = DotTile<T>;

 public:
  explicit WindowProduct(const Geometry& g)
      : g_(g),
        pitch_(round_up(g.C, kLanes<T>)),
        taps_(g.shape.kernel[0] * g.shape.kernel[1]),
        images_(std::min<int64_t>(g.shape.batch, Tile::pixels)),
        image_blocks_(ceil_div(g.shape.batch, images_)) {
    const Conv2dShape& s = g.shape;
    const int64_t row_bytes = taps_ * pitch_ * sizeof(T);
    const int64_t tasks = std::max<int64_t>(1, 2 * thread_count() / (image_blocks_ * s.groups));
    width_ = std::min(round_up(ceil_div(g.O, tasks), Tile::rows),
                      kBytes / row_bytes / Tile::rows * Tile::rows);
    // Where outputs fill a vector, a band wants fewer columns to keep the processor busy.
    const bool narrow = s.out_width <= (g.O <= kFewOutputs / 2 ? 7 : 4);
    possible = g.pays(narrow, g.C) && !g.last && !g.whole && g.O <= kFewOutputs && width_ > 0 &&
               s.dilation[1] == 1 &&
               images_ * image_elements() * static_cast<int64_t>(sizeof(T)) <= kBytes;
  }

  void run(View4 x, View4 w, const S* bias, View4 y) const {
    const Conv2dShape& s = g_.shape;
    const int64_t channel_blocks = ceil_div(g_.O, width_);
    parallel_ranges(s.groups * channel_blocks * image_blocks_, [&](int64_t begin, int64_t end) {
      Scratch scratch(Scratch::bytes_for<T>(width_ * taps_ * pitch_) +
                      Scratch::bytes_for<T>(images_ * image_elements()) +
                      Scratch::bytes_for<T>(images_ * width_));
      T* weights = scratch.take<T>(width_ * taps_ * pitch_);
      T* image = scratch.take<T>(images_ * image_elements());
      T* sums = scratch.take<T>(images_ * width_);
      for (int64_t task = begin, packed = -1; task < end; ++task) {
        const int64_t block = task / image_blocks_, group = block / channel_blocks;
        const int64_t o0 = block % channel_blocks * width_, outs = std::min(width_, g_.O - o0);
        const int64_t first = group * g_.O + o0;
        if (block != packed)
          pack_weights(weights, static_cast<const S*>(w.data) + first * w.stride[0], w, outs);
        packed = block;
        const int64_t n0 = task % image_blocks_ * images_;
        const int64_t count = std::min(images_, s.batch - n0);
        for (int64_t n = 0; n < count; ++n)
          pack_image(image + n * image_elements(),
                     static_cast<const S*>(x.data) + (n0 + n) * x.stride[0] +
                         group * g_.C * x.stride[1], x);
        for (int64_t p = 0; p < g_.pixels; ++p) {
          const int64_t oh = p / s.out_width, ow = p % s.out_width;
          for (int64_t n = 0; n < count; ++n)
            for (int64_t o = 0; o < outs; ++o)
              sums[n * width_ + o] = bias == nullptr ? T(0) : widen(bias[first + o]);
          multiply(sums, image, weights, oh, ow, count, outs);
          S* to = static_cast<S*>(y.data) + n0 * y.stride[0] + first * y.stride[1] +
                  oh * y.stride[2] + ow * y.stride[3];
          for (int64_t n = 0; n < count; ++n)
            for (int64_t o = 0; o < outs; ++o)
              to[n * y.stride[0] + o * y.stride[1]] = narrow<S>(sums[n * width_ + o]);
        }
      }
    });
  }

  bool possible;

 private:
  int64_t image_elements() const { return g_.shape.height * g_.shape.width * pitch_; }

  // to[out][tap][channel]
  void pack_weights(T* to, const S* from, const View4& w, int64_t outs) const {
    std::fill_n(to, outs * taps_ * pitch_, T(0));
    for (int64_t o = 0; o < outs; ++o)
      transpose(to + o * taps_ * pitch_, pitch_, from + o * w.stride[0], taps_, 1, g_.C, taps_);
  }

  // to[row][column][channel]
  void pack_image(T* to, const S* from, const View4& x) const {
    const Conv2dShape& s = g_.shape;
    const bool joined = x.stride[2] == s.width * x.stride[3];
    const int64_t rows = joined ? 1 : s.height, columns = joined ? s.height * s.width : s.width;
    std::fill_n(to, image_elements(), T(0));
    for (int64_t r = 0; r < rows; ++r, to += columns * pitch_, from += x.stride[2])
      transpose(to, pitch_, from, x.stride[1], x.stride[3], g_.C, columns);
  }

  // The taps of one axis that meet the image from an output position.
  Span taps_inside(int axis, int64_t out) const {
    Span taps{0, g_.shape.kernel[axis]};
    while (taps.begin < taps.end && g_.input(axis, out, taps.begin) < 0) ++taps.begin;
    while (taps.begin < taps.end && g_.input(axis, out, taps.end - 1) < 0) --taps.end;
    return taps;
  }

  void multiply(T* sums, const T* image, const T* weights, int64_t oh, int64_t ow, int64_t count,
                int64_t outs) const {
    const Conv2dShape& s = g_.shape;
    const Span rows = taps_inside(0, oh), columns = taps_inside(1, ow);
    if (rows.begin == rows.end || columns.begin == columns.end) return;
    typename Tile::Arguments tile;
    tile.pitch = image_elements();
    tile.c_pitch = width_;
    tile.a_step = s.dilation[0] * s.width * pitch_;
    tile.w_step = s.kernel[1] * pitch_;
    const int64_t length = (columns.end - columns.begin) * pitch_;
    const int64_t most = kWindowChain * kLanes<T>, together = std::max<int64_t>(1, most / length);
    for (int64_t i = rows.begin; i < rows.end; i += together) {
      tile.runs = std::min(together, rows.end - i);
      const T* window =
          image + (g_.input(0, oh, i) * s.width + g_.input(1, ow, columns.begin)) * pitch_;
      const T* of_tap = weights + (i * s.kernel[1] + columns.begin) * pitch_;
      for (int64_t k = 0; k < length; k += most) {
        tile.a = window + k;
        tile.length = std::min(most, length - k);
        for (int64_t o = 0; o < outs; o += Tile::rows) {
          tile.row_count = std::min<int64_t>(Tile::rows, outs - o);
          tile.c = sums + o;
          for (int64_t r = 0; r < Tile::rows; ++r)
            tile.w[r] = of_tap + k + (o + std::min(r, tile.row_count - 1)) * taps_ * pitch_;
          kDotKernels<T>[count - 1](tile);
        }
      }
    }
  }

  const Geometry& g_;
  const int64_t pitch_, taps_, images_, image_blocks_;
  int64_t width_;  // outputs of a task
};

}  // namespace pyvit
