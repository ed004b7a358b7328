// A band: a part of an image, some of its rows, columns and channels, copied to scratch with the
// zeros left and right of the image, the channels of a pixel side by side, in the type that is computed in.
// Every tap of a convolution finds its operand in the band by an offset; an element is copied
// once for all of them.
#pragma once

#include <algorithm>

#include "patches.h"
#include "transpose.h"

namespace pyvit {

// Three planes to pixels of three channels, as images mostly come: two shuffles a vector.
template <class T, int... Lane>
inline void interleave_three(T* dst, Vec<T> a, Vec<T> b, Vec<T> c,
                             std::integer_sequence<int, Lane...>) {
  constexpr int L = kLanes<T>;
  // Lane e of the whole takes channel e % 3 of pixel e / 3; c joins a and b's in a second step.
  auto part = [&](auto first) {
    constexpr int f = decltype(first)::value;
    const Vec<T> ab = shuffle_lanes<T, ((f + Lane) / 3 + ((f + Lane) % 3 == 1 ? L : 0))...>(a, b);
    store(dst + f, shuffle_lanes<T, ((f + Lane) % 3 == 2 ? L + (f + Lane) / 3 : Lane)...>(ab, c));
  };
  part(std::integral_constant<int, 0>{});
  part(std::integral_constant<int, L>{});
  part(std::integral_constant<int, 2 * L>{});
}

// dst[3 · column + channel]
template <class T, class S>
void pack_three_planes(T* dst, const S* src, int64_t plane, int64_t count) {
  constexpr int64_t L = kLanes<T>;
  int64_t w = 0;
  for (; w + L <= count; w += L) {
    T lanes[3][L];
    for (int c = 0; c < 3; ++c) widen_run(lanes[c], src + c * plane + w, L);
    interleave_three(dst + 3 * w, load(lanes[0]), load(lanes[1]), load(lanes[2]),
                     std::make_integer_sequence<int, L>{});
  }
  for (; w < count; ++w)
    for (int c = 0; c < 3; ++c) dst[3 * w + c] = widen(src[c * plane + w]);
}

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
      pack_three_planes(to, from, source.stride[1], columns);
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
