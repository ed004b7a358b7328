// A band: a part of an image, some of its rows, columns and channels, copied to scratch with the
// zeros around the image, the channels of a pixel side by side, in the type that is computed in.
// Every tap of a convolution finds its operand in the band by an offset; an element is copied
// once for all of them.
#pragma once

#include <algorithm>

#include "patches.h"
#include "transpose.h"

namespace pyvit {

struct BandBox {
  int64_t image, row, column, channel;  // first ones in the image; row and column may be outside
  int64_t rows, columns, channels;
};

// dst[(row · columns + column) · pitch + channel]
template <class T, class S>
void pack_band(T* dst, int64_t pitch, const PatchSource<S>& source, const BandBox& box) {
  const int64_t line = box.columns * pitch;
  const Span inside_columns = inside(box.column, 1, source.width, box.columns);
  const int64_t count = inside_columns.end - inside_columns.begin;
  for (int64_t r = 0; r < box.rows; ++r, dst += line) {
    const int64_t h = box.row + r;
    if (h < 0 || h >= source.height || count <= 0) {
      std::fill(dst, dst + line, T(0));
      continue;
    }
    std::fill(dst, dst + inside_columns.begin * pitch, T(0));
    std::fill(dst + inside_columns.end * pitch, dst + line, T(0));
    const S* from = source.data + box.image * source.stride[0] + box.channel * source.stride[1] +
                    h * source.stride[2] + (box.column + inside_columns.begin) * source.stride[3];
    T* to = dst + inside_columns.begin * pitch;
    if (source.stride[1] != 1) {
      transpose(to, pitch, from, source.stride[1], source.stride[3], box.channels, count);
    } else if (source.stride[3] == box.channels && pitch == box.channels) {
      widen_run(to, from, count * box.channels);
    } else {
      for (int64_t c = 0; c < count; ++c)
        widen_run(to + c * pitch, from + c * source.stride[3], box.channels);
    }
  }
}

}  // namespace pyvit
