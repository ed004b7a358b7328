// Reading the patches of an image, the part that convolution, its gradients and unfold share.
//
// A convolution is described from its destination: pixel (h, w) of the destination grid reads, for
// each pair of taps, source pixel (h·step + tap.offset, w·step + tap.offset), zero outside the
// image. The forward pass has one tap per kernel row and column; the input gradient has, for
// each residue of the stride, the taps that reach it (see conv2d.cpp).
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "dtypes.h"
#include "parallel.h"

namespace pyvit {

struct Tap {
  int64_t kernel;  // row or column of the kernel
  int64_t offset;
};

template <class S>
struct PatchSource {
  const S* data;
  int64_t channels, height, width;
  int64_t stride[4];  // batch, channel, row, column
  int64_t grid[2];    // destination rows and columns
  int64_t step[2];
  std::vector<Tap> taps[2];

  int64_t patch_size() const {
    return channels * static_cast<int64_t>(taps[0].size() * taps[1].size());
  }
  int64_t pixels_per_image() const { return grid[0] * grid[1]; }
};

// A run of destination pixels in one row of one image; `at` counts from the first pixel asked for.
struct PixelRun {
  int64_t image, row, column, at, count;
};

// f(PixelRun) for the destination pixels [first, first + count), numbered through the batch.
template <class F>
void for_each_run(const int64_t grid[2], int64_t first, int64_t count, const F& f) {
  const int64_t per_image = grid[0] * grid[1];
  int64_t image = first / per_image;
  int64_t row = first % per_image / grid[1];
  int64_t column = first % grid[1];
  for (int64_t at = 0; at < count;) {
    const int64_t run = std::min(grid[1] - column, count - at);
    f(PixelRun{image, row, column, at, run});
    at += run;
    column = 0;
    if (++row == grid[0]) row = 0, ++image;
  }
}

// The t in [0, count) for which first + t·step lies in [0, width).
struct Span {
  int64_t begin, end;
};
inline Span inside(int64_t first, int64_t step, int64_t width, int64_t count) {
  int64_t begin = 0, end = count;
  if (first < 0) begin = std::min(count, step == 1 ? -first : ceil_div(-first, step));
  if (first + (count - 1) * step >= width) {
    const int64_t room = width - first;
    end = std::max(begin, room <= 0 ? 0 : step == 1 ? room : ceil_div(room, step));
  }
  return {begin, end};
}

// dst[t] = row[(first + t·step)·stride] widened for t in [0, count), zero where the source column
// lies outside [0, width).
template <class T, class S>
inline void copy_clipped(T* dst, const S* row, int64_t first, int64_t step, int64_t stride,
                         int64_t width, int64_t count) {
  const auto [begin, end] = inside(first, step, width, count);
#if defined(__AVX512F__)
  // Most runs are short: a masked load leaves zeros where the image ends, without a branch.
  if constexpr (std::is_same_v<S, float>) {
    if (step * stride == 1) {
      for (int64_t t = 0; t < count; t += 16) {
        const __mmask16 inside = lanes_between(begin - t, end - t);
        const __m512 v = _mm512_maskz_loadu_ps(inside, row + first + t);
        _mm512_mask_storeu_ps(dst + t, first_lanes(count - t), v);
      }
      return;
    }
  }
#endif
  for (int64_t t = 0; t < begin; ++t) dst[t] = T(0);
  if (step * stride == 1) {
    widen_run(dst + begin, row + first + begin, end - begin);
  } else {
    const S* source = row + (first + begin * step) * stride;
    for (int64_t t = begin; t < end; ++t, source += step * stride) dst[t] = widen(*source);
  }
  for (int64_t t = end; t < count; ++t) dst[t] = T(0);
}

// Walks (channel, row tap, column tap) in that order, the planar order of a patch.
struct PlanarIndex {
  int64_t channel, row_tap, column_tap;

  template <class S>
  PlanarIndex(const PatchSource<S>& source, int64_t k) {
    const int64_t columns = source.taps[1].size(), rows = source.taps[0].size();
    column_tap = k % columns;
    row_tap = k / columns % rows;
    channel = k / (columns * rows);
  }
  template <class S>
  void next(const PatchSource<S>& source) {
    if (++column_tap < static_cast<int64_t>(source.taps[1].size())) return;
    column_tap = 0;
    if (++row_tap < static_cast<int64_t>(source.taps[0].size())) return;
    row_tap = 0;
    ++channel;
  }
};

// One element `k` of the patches of a run of pixels.
template <class T, class S>
inline void copy_pixels(T* dst, const PatchSource<S>& source, const PlanarIndex& k,
                        const PixelRun& run) {
  const int64_t h = run.row * source.step[0] + source.taps[0][k.row_tap].offset;
  if (h < 0 || h >= source.height) {
    std::fill(dst, dst + run.count, T(0));
    return;
  }
  const S* row = source.data + run.image * source.stride[0] + k.channel * source.stride[1] +
                 h * source.stride[2];
  const int64_t first = run.column * source.step[1] + source.taps[1][k.column_tap].offset;
  copy_clipped(dst, row, first, source.step[1], source.stride[3], source.width, run.count);
}

// Elements [begin, end) of the patch of one pixel in (row tap, column tap, channel) order, for a
// source whose channels are contiguous. Where neighbouring taps lie side by side in memory, a whole
// row of the patch is one run.
template <class T, class S>
void copy_patch(T* dst, const PatchSource<S>& source, int64_t image, int64_t row, int64_t column,
                int64_t begin, int64_t end) {
  const auto& columns = source.taps[1];
  const int64_t C = source.channels, count = columns.size(), row_length = C * count;
  const bool side_by_side =
      source.stride[3] == C && columns.back().offset - columns.front().offset == count - 1 &&
      columns.back().offset >= columns.front().offset;
  const int64_t w0 = column * source.step[1];
  for (int64_t e = begin; e < end;) {
    const int64_t row_tap = e / row_length, within = e % row_length;
    const int64_t stop = std::min(row_length, within + end - e);
    const int64_t h = row * source.step[0] + source.taps[0][row_tap].offset;
    const int64_t length = stop - within;
    if (h < 0 || h >= source.height) {
      std::fill(dst, dst + length, T(0));
    } else {
      const S* line = source.data + image * source.stride[0] + h * source.stride[2];
      if (side_by_side) {
        const int64_t first = (w0 + columns[0].offset) * C + within;
        copy_clipped(dst, line, first, 1, 1, source.width * C, length);
      } else {
        for (int64_t i = within; i < stop;) {
          const int64_t tap = i / C, c = i % C, run = std::min(C - c, stop - i);
          const int64_t w = w0 + columns[tap].offset;
          if (w < 0 || w >= source.width) {
            std::fill(dst + (i - within), dst + (i - within) + run, T(0));
          } else {
            widen_run(dst + (i - within), line + w * source.stride[3] + c, run);
          }
          i += run;
        }
      }
    }
    dst += length;
    e += length;
  }
}

}  // namespace pyvit
