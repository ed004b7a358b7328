// A band: a part of an image, some of its rows, columns and channels, copied to scratch with the
// zeros left and right of the image, the channels of a pixel side by side, in the type that is
// computed in. Every tap of a convolution finds its operand in the band by an offset; an element
// is copied once for all of them.
#pragma once

#include <algorithm>

#include "interleave.h"
#include "patches.h"
#include "transpose.h"

namespace pyvit {

struct BandBox {
  int64_t image, row, column, channel;  // first ones in the image; row and column may be outside
  int64_t rows, columns, channels;
};

// A few channels of a band, from channel `first` of the box on.
template <class T, class S>
void pack_band_channels(T* dst, int64_t pitch, const PatchSource<S>& source, const BandBox& box,
                        int64_t first, int64_t count) {
  const int64_t line = box.columns * pitch;
  const Span across = inside(box.column, 1, source.width, box.columns);
  const int64_t columns = across.end - across.begin;
  const S* image = source.data + box.image * source.stride[0] +
                   (box.channel + first) * source.stride[1] +
                   (box.column + across.begin) * source.stride[3];
  T* to = dst + across.begin * pitch + first;
  for (int64_t r = 0; r < box.rows; ++r, to += line) {
    const int64_t h = box.row + r;
    if (h < 0 || h >= source.height) continue;
    const S* from = image + h * source.stride[2];
    if (count == 3 && pitch == 3 && source.stride[3] == 1) {
      interleave(to, from, source.stride[1], 3, columns);
    } else if (source.stride[1] != 1) {
      transpose(to, pitch, from, source.stride[1], source.stride[3], count, columns);
    } else if (source.stride[3] == count && pitch == count) {
      widen_run(to, from, columns * count);
    } else {
      for (int64_t c = 0; c < columns; ++c)
        widen_run(to + c * pitch, from + c * source.stride[3], count);
    }
  }
}

// The zeros of a band: columns outside the image. Rows outside it are left as they are, and must
// not be read.
template <class T, class S>
void clear_outside(T* dst, int64_t pitch, const PatchSource<S>& source, const BandBox& box) {
  const int64_t line = box.columns * pitch;
  const Span across = inside(box.column, 1, source.width, box.columns);
  if (across.begin == 0 && across.end == box.columns) return;
  for (int64_t r = 0; r < box.rows; ++r, dst += line) {
    std::fill(dst, dst + across.begin * pitch, T(0));
    std::fill(dst + across.end * pitch, dst + line, T(0));
  }
}

// dst[(row · columns + column) · pitch + channel]
template <class T, class S>
void pack_band(T* dst, int64_t pitch, const PatchSource<S>& source, const BandBox& box) {
  clear_outside(dst, pitch, source, box);
  const bool planar = source.stride[1] != 1 && box.channels > 3;
  // Each plane is a stream of its own from memory: a few at a time, down all rows.
  const int64_t step = planar ? kLanes<T> : box.channels;
  for (int64_t c = 0; c < box.channels; c += step)
    pack_band_channels(dst, pitch, source, box, c, std::min(step, box.channels - c));
}

}  // namespace pyvit
