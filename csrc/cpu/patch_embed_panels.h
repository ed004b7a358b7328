// Panels of the products (panel_product.h) that patch_embed.cpp packs: patches of images,
// normalised on the way, weights, and tokens.
//
// E = C·kh·kw is a patch's size. Its elements are ordered (c, i, j), or (i, j, c) where the image
// is channels last: then pixels and channels of an image row are one run of memory, and the image
// is treated as one of a single channel, C times as wide.
#pragma once

#include <algorithm>
#include <vector>

#include "interleave.h"
#include "patch_embed.h"
#include "patches.h"
#include "row_kernel.h"
#include "transpose.h"

namespace pyvit {

// f(image, its first patch, at, count) for the patches [first, first + count) of a batch.
template <class F>
void for_each_image(int64_t per_image, int64_t first, int64_t count, const F& f) {
  for (int64_t at = 0; at < count;) {
    const int64_t patch = (first + at) % per_image;
    const int64_t here = std::min(per_image - patch, count - at);
    f((first + at) / per_image, patch, at, here);
    at += here;
  }
}

// Asks for a block of memory whose rows lie too far apart for the hardware to foresee them.
template <class S>
inline void prefetch_block(const S* from, int64_t row_stride, int64_t rows, int64_t columns) {
  constexpr int64_t line = 64 / sizeof(S);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; c += line) __builtin_prefetch(from + r * row_stride + c);
}

// A row of a patch, or the part of it in a range of elements; with channels last the channel is 0
// and the column counts (j, c).
struct Segment {
  int64_t channel, row, column, element, count;
};

struct PatchLayout {
  int64_t image_stride[4];
  int64_t grid[2], kernel[2], step[2];
  int64_t interleaved;  // channels that lie side by side: C, or 1

  PatchLayout(const PatchEmbedShape& s, View4 image)
      : image_stride{image.stride[0], image.stride[1], image.stride[2], image.stride[3]},
        grid{s.grid[0], s.grid[1]},
        kernel{s.kernel[0], s.kernel[1]},
        step{s.stride[0], s.stride[1]},
        interleaved(1) {
    if (image.stride[1] != 1 || image.stride[3] != s.channels) return;
    interleaved = s.channels;
    image_stride[3] = 1;
    kernel[1] *= s.channels;
    step[1] *= s.channels;
  }

  template <class F>
  void for_each_segment(int64_t begin, int64_t end, const F& f) const {
    Segment s{begin / (kernel[0] * kernel[1]), begin / kernel[1] % kernel[0], begin % kernel[1],
              begin, 0};
    while (s.element < end) {
      s.count = std::min(kernel[1] - s.column, end - s.element);
      f(static_cast<const Segment&>(s));
      s.element += s.count;
      s.column = 0;
      if (++s.row == kernel[0]) s.row = 0, ++s.channel;
    }
  }

  // Where in memory a segment of the patches of a run begins.
  int64_t offset(const PixelRun& run, const Segment& s) const {
    return run.image * image_stride[0] + s.channel * image_stride[1] +
           (run.row * step[0] + s.row) * image_stride[2] +
           (run.column * step[1] + s.column) * image_stride[3];
  }
};

// normalised = (pixel - shift) · scale, by channel.
template <class T>
class ChannelTable {
  static constexpr int64_t L = kLanes<T>;

 public:
  // Of the elements of a segment: element i has shift[i · advance] and scale[i · advance], and so
  // have the L elements from it on.
  struct Values {
    const T *shift, *scale;
    int64_t advance;
  };

  ChannelTable(const PatchLayout& layout, int64_t channels, bool bytes,
               Normalisation normalisation)
      : interleaved_(layout.interleaved),
        size_(interleaved_ > 1 ? channels - 1 + layout.kernel[1] + L : channels * L),
        table_(2 * size_) {
    const T* mean = static_cast<const T*>(normalisation.mean);
    const T* std = static_cast<const T*>(normalisation.std);
    const double unit = bytes ? 255 : 1;
    for (int64_t i = 0; i < size_; ++i) {
      const int64_t c = interleaved_ > 1 ? i % channels : i / L;
      table_[i] = static_cast<T>(mean == nullptr ? 0 : unit * mean[c]);
      table_[size_ + i] = static_cast<T>(1 / (std == nullptr ? unit : unit * std[c]));
    }
  }

  Values at(const Segment& s) const {
    const int64_t first = interleaved_ > 1 ? s.column % interleaved_ : s.channel * L;
    return {table_.data() + first, table_.data() + size_ + first, interleaved_ > 1};
  }

 private:
  int64_t interleaved_, size_;
  std::vector<T> table_;
};

template <class T, class I>
inline Vec<T> widen_vector(const I* src) {
  T lanes[kLanes<T>];
  widen_run(lanes, src, kLanes<T>);
  return load(static_cast<const T*>(lanes));
}
// The same for n elements, at most a vector, `stride` apart; no other is touched.
template <class T, class I>
inline Vec<T> widen_part(const I* src, int64_t stride, int64_t n) {
  T lanes[kLanes<T>] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = widen(src[i * stride]);
  return load(static_cast<const T*>(lanes));
}

// The first n lanes, or all where there are fewer.
template <class T>
inline void store_some(T* dst, Vec<T> v, int64_t n) {
  if (n >= kLanes<T>) return store(dst, v);
#if defined(PYVIT_HAS_LANE_MASKS)
  if constexpr (std::is_same_v<T, float>) return store_masked(dst, lanes_between(0, n), v);
#endif
  for (int64_t i = 0; i < n; ++i) dst[i] = v[i];
}

// dst[i · stride] = src[i] times the scale, i < n; a whole vector may be read from any of them.
template <class S, class T>
inline void rescale_run(S* dst, int64_t stride, const T* src, int64_t n,
                        const typename ChannelTable<T>::Values& by) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t i = 0; i < n; i += L) {
    const Vec<T> v = load(src + i) * load(by.scale + i * by.advance);
    const int64_t count = std::min(L, n - i);
    if constexpr (std::is_same_v<S, T>) {
      if (stride == 1) {
        store_some(dst + i, v, count);
        continue;
      }
    }
    T lanes[L];
    store(lanes, v);
    if (stride == 1) {
      narrow_run(dst + i, lanes, count);
    } else {
      for (int64_t j = 0; j < count; ++j) dst[(i + j) * stride] = narrow<S>(lanes[j]);
    }
  }
}

// The patches of a batch of images, I being the type of a pixel.
template <class T, class I>
struct Patches {
  const I* data;
  PatchLayout layout;
  ChannelTable<T> table;

  Patches(const PatchEmbedShape& s, View4 image, Normalisation normalisation)
      : data(static_cast<const I*>(image.data)),
        layout(s, image),
        table(layout, s.channels, std::is_same_v<I, uint8_t>, normalisation) {}

  // Element e of patch first + i goes to to(e)[i · pitch(e)], and those after it, as many as
  // room(e), behind it.
  template <class Target>
  void read(int64_t first, int64_t count, int64_t begin, int64_t end, const Target& target) const {
    for_each_run(layout.grid, first, count, [&](const PixelRun& run) {
      layout.for_each_segment(begin, end, [&](Segment s) {
        for (int64_t left = s.count; left > 0; left -= s.count) {
          s.count = std::min(left, target.room(s.element));
          const int64_t pitch = target.pitch(s.element);
          copy(target.to(s.element) + run.at * pitch, pitch, run, s);
          s.element += s.count;
          s.column += s.count;
        }
      });
    });
  }

 private:
  // A vector of each patch at a time, whose shift and scale then stay in registers.
  void copy(T* to, int64_t pitch, const PixelRun& run, const Segment& s) const {
    constexpr int64_t L = kLanes<T>;
    const int64_t stride = layout.image_stride[3], step = layout.step[1] * stride;
    const typename ChannelTable<T>::Values values = table.at(s);
    const I* from = data + layout.offset(run, s);
    for (int64_t i = 0; i < s.count; i += L, from += L * stride, to += L) {
      const Vec<T> shift = load(values.shift + i * values.advance);
      const Vec<T> scale = load(values.scale + i * values.advance);
      const int64_t n = std::min(L, s.count - i);
      // Vectors may reach into the next patch, but not beyond the last.
      const int64_t last = stride == 1 ? (run.count - 1) * step + n - L : -1;
      int64_t t = 0;
      for (; t < run.count && t * step <= last; ++t) {
        __builtin_prefetch(from + t * step + 2 * layout.image_stride[2]);
        store_some(to + t * pitch, (widen_vector<T>(from + t * step) - shift) * scale, n);
      }
      for (; t < run.count; ++t) {
        const Vec<T> v = widen_part<T>(from + t * step, stride, n);
        store_some(to + t * pitch, (v - shift) * scale, n);
      }
    }
  }
};

// A[p, e]
template <class T>
struct RowTarget {
  T* data;
  int64_t row_pitch, begin;

  T* to(int64_t e) const { return data + e - begin; }
  int64_t pitch(int64_t) const { return row_pitch; }
  int64_t room(int64_t) const { return INT64_MAX; }
};

// B[p, e]
template <class T>
struct StripTarget {
  Strips<T> strips;
  int64_t begin;

  T* to(int64_t e) const { return strips.at(0, e - begin); }
  int64_t pitch(int64_t e) const { return strips.lanes(e - begin); }
  int64_t room(int64_t e) const { return strips.strip - (e - begin) % strips.strip; }
};

// Zeros in the lanes of the last strip that no column has.
template <class T>
void clear_last_lanes(const Strips<T>& strips) {
  const int64_t used = (strips.width - 1) % strips.strip + 1;
  const int64_t lanes = strips.lanes(strips.width - 1);
  T* last = strips.at(0, strips.width - used);
  for (int64_t k = 0; used < lanes && k < strips.rows; ++k)
    std::fill(last + k * lanes + used, last + (k + 1) * lanes, T(0));
}

// w[d, e]: the offset of element e in a row, in the order of the image's patches.
template <class S>
struct Weight {
  S* data;
  int64_t stride[4];
  int64_t kernel[2], interleaved;
  bool contiguous;               // e lies at offset e
  std::vector<int64_t> offsets;  // else

  Weight(const PatchEmbedShape& s, View4 w, const PatchLayout& layout)
      : data(static_cast<S*>(w.data)),
        stride{w.stride[0], w.stride[1], w.stride[2], w.stride[3]},
        kernel{s.kernel[0], s.kernel[1]},
        interleaved(layout.interleaved) {
    const int64_t C = interleaved;
    const int64_t dense = C > 1 ? C : s.kernel[0] * s.kernel[1];
    contiguous = stride[C > 1 ? 3 : 1] == dense && stride[C > 1 ? 1 : 3] == 1 &&
                 stride[2] == s.kernel[1] * C;
    for (int64_t c = 0; !contiguous && c < s.channels / C; ++c)
      for (int64_t i = 0; i < s.kernel[0]; ++i)
        for (int64_t j = 0; j < s.kernel[1]; ++j)
          for (int64_t inner = 0; inner < C; ++inner)
            offsets.push_back((c + inner) * stride[1] + i * stride[2] + j * stride[3]);
  }
  int64_t offset(int64_t e) const { return contiguous ? e : offsets[e]; }
};

// B[e, d] = w[d, e], from element e0 and feature d0 on
template <class S>
void pack_weight_columns(const Strips<Compute<S>>& to, const Weight<const S>& w,
                         const PatchLayout& layout, int64_t d0, int64_t e0) {
  const int64_t C = w.interleaved;
  for (int64_t j = 0; j < to.width; j += to.strip) {
    const int64_t width = std::min(to.strip, to.width - j), lanes = to.lanes(j);
    const S* from = w.data + (d0 + j) * w.stride[0];
    if (w.contiguous) {
      transpose(to.at(0, j), lanes, from + e0, w.stride[0], 1, width, to.rows);
      continue;
    }
    // A row of one channel's kernel lies side by side in memory, C apart in the patch.
    layout.for_each_segment(e0, e0 + to.rows, [&](const Segment& s) {
      for (int64_t e = s.element; e < std::min(s.element + C, s.element + s.count); ++e) {
        prefetch_block(from + w.offset(e) + 4 * w.stride[2], w.stride[0], width, 1);
        transpose(to.at(e - e0, j), C * lanes, from + w.offset(e), w.stride[0], w.stride[3], width,
                  ceil_div(s.element + s.count - e, C));
      }
    });
  }
  clear_last_lanes(to);
}

// B[d, e] = w[d, e], from feature d0 and element e0 on
template <class S>
void pack_weight_rows(const Strips<Compute<S>>& to, const Weight<const S>& w, int64_t e0,
                      int64_t d0) {
  using T = Compute<S>;
  // Planar weights for an image of pixels: taps [first, first + taps) hold the columns.
  const int64_t C = w.interleaved, first = e0 / C, taps = ceil_div(e0 + to.width, C) - first;
  const bool planar = C > 1 && w.stride[3] == 1 && w.stride[2] == w.kernel[1];
  std::vector<T> line(planar ? C * taps : 0);
  for (int64_t k = 0; k < to.rows; ++k) {
    const S* from = w.data + (d0 + k) * w.stride[0];
    if (planar) interleave(line.data(), from + first, w.stride[1], C, taps);
    for (int64_t j = 0; j < to.width; j += to.strip) {
      const int64_t width = std::min(to.strip, to.width - j);
      T* row = to.at(k, j);
      if (planar) {
        widen_run(row, line.data() + e0 + j - C * first, width);
      } else if (w.contiguous) {
        prefetch_block(from + 4 * w.stride[0] + e0 + j, 0, 1, width);
        widen_run(row, from + e0 + j, width);
      } else {
        const int64_t* offset = w.offsets.data() + e0 + j;
        for (int64_t i = 0; i < width; ++i) row[i] = widen(from[offset[i]]);
      }
    }
  }
  clear_last_lanes(to);
}

// A[p, d], from patch m0 and feature k0 on
template <class S>
void pack_token_rows(Compute<S>* to, int64_t pitch, TokenView grad, int64_t per_image, int64_t m0,
                     int64_t mb, int64_t k0, int64_t kb) {
  const int64_t* stride = grad.stride;
  for (int64_t m = m0; m < m0 + mb; ++m, to += pitch) {
    const S* from = static_cast<const S*>(grad.data) + m / per_image * stride[0] +
                    m % per_image * stride[1] + k0 * stride[2];
    if (stride[2] == 1) {
      widen_run(to, from, kb);
    } else {
      for (int64_t k = 0; k < kb; ++k) to[k] = widen(from[k * stride[2]]);
    }
  }
}

// A[d, p] = grad[p, d], from feature m0 and patch k0 on
template <class S>
void pack_token_columns(Compute<S>* to, int64_t pitch, TokenView grad, int64_t per_image,
                        int64_t m0, int64_t mb, int64_t k0, int64_t kb) {
  for_each_image(per_image, k0, kb, [&](int64_t image, int64_t patch, int64_t at, int64_t count) {
    const S* from = static_cast<const S*>(grad.data) + image * grad.stride[0] +
                    patch * grad.stride[1] + m0 * grad.stride[2];
    constexpr int64_t ahead = kLanes<Compute<S>>;
    for (int64_t t = 0; t < count; t += ahead) {
      const S* block = from + t * grad.stride[1];
      prefetch_block(block + ahead * grad.stride[1], grad.stride[1], ahead, mb);
      transpose(to + at + t, pitch, block, grad.stride[1], grad.stride[2],
                std::min(ahead, count - t), mb);
    }
  });
}

}  // namespace pyvit
