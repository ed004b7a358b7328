// Panels of the GEMM (gemm.h) that patch_embed.cpp packs: patches of images, normalised on the
// way, weights, and tokens.
//
// E = C·kh·kw is a patch's size. Its elements are ordered (c, i, j), or (i, j, c) where the image
// is channels last: then pixels and channels of an image row are one run of memory, and the image
// is treated as one of a single channel, C times as wide.
#pragma once

#include <algorithm>
#include <vector>

#include "gemm.h"
#include "patch_embed.h"
#include "patches.h"
#include "transpose.h"

namespace pyvit {

// Elements of several patches are handled as one line of an image row; a segment of a patch row
// is no longer than a panel, so that a line holds at least one.
constexpr int64_t kLine = 1024;
static_assert(Panel<float>::KC <= kLine && Panel<float>::NB <= kLine);

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
    for (int64_t e = begin; e < end;) {
      const int64_t column = e % kernel[1];
      const int64_t count = std::min(kernel[1] - column, end - e);
      f(Segment{e / (kernel[0] * kernel[1]), e / kernel[1] % kernel[0], column, e, count});
      e += count;
    }
  }

  // Where in memory a segment of the patches of a run begins.
  int64_t offset(const PixelRun& run, const Segment& s) const {
    return run.image * image_stride[0] + s.channel * image_stride[1] +
           (run.row * step[0] + s.row) * image_stride[2] +
           (run.column * step[1] + s.column) * image_stride[3];
  }
};

// normalised = (pixel - shift) · scale, by channel; repeated to the length of a line where
// channels lie side by side.
template <class T>
class ChannelTable {
 public:
  ChannelTable(int64_t channels, int64_t interleaved, bool bytes, Normalisation normalisation)
      : interleaved_(interleaved),
        shift_(channels + (interleaved > 1 ? kLine : 0)),
        scale_(shift_.size()) {
    const T* mean = static_cast<const T*>(normalisation.mean);
    const T* std = static_cast<const T*>(normalisation.std);
    const double unit = bytes ? 255 : 1;
    for (int64_t c = 0; c < channels; ++c) {
      shift_[c] = static_cast<T>(mean == nullptr ? 0 : unit * mean[c]);
      scale_[c] = static_cast<T>(1 / (std == nullptr ? unit : unit * std[c]));
    }
    for (size_t i = channels; i < shift_.size(); ++i) {
      shift_[i] = shift_[i - channels];
      scale_[i] = scale_[i - channels];
    }
  }

  void normalise(T* line, int64_t n, const Segment& s) const {
    if (interleaved_ > 1) {
      const T* shift = shift_.data() + s.column % interleaved_;
      const T* scale = scale_.data() + s.column % interleaved_;
      for (int64_t i = 0; i < n; ++i) line[i] = (line[i] - shift[i]) * scale[i];
    } else {
      const T shift = shift_[s.channel], scale = scale_[s.channel];
      for (int64_t i = 0; i < n; ++i) line[i] = (line[i] - shift) * scale;
    }
  }
  void rescale(T* line, int64_t n, const Segment& s) const {
    if (interleaved_ > 1) {
      const T* scale = scale_.data() + s.column % interleaved_;
      for (int64_t i = 0; i < n; ++i) line[i] *= scale[i];
    } else {
      const T scale = scale_[s.channel];
      for (int64_t i = 0; i < n; ++i) line[i] *= scale;
    }
  }

 private:
  int64_t interleaved_;
  std::vector<T> shift_, scale_;
};

// The patches of a batch of images, I being the type of a pixel.
template <class T, class I>
struct Patches {
  const I* data;
  PatchLayout layout;
  ChannelTable<T> table;

  Patches(const PatchEmbedShape& s, View4 image, Normalisation normalisation)
      : data(static_cast<const I*>(image.data)),
        layout(s, image),
        table(s.channels, layout.interleaved, std::is_same_v<I, uint8_t>, normalisation) {}

  // place(p, e, from, n): elements [e, e + n) of patch first + p are from[0 : n].
  template <class Place>
  void read(int64_t first, int64_t count, int64_t begin, int64_t end, const Place& place) const {
    const int64_t step = layout.step[1], stride = layout.image_stride[3];
    T line[kLine];
    for_each_run(layout.grid, first, count, [&](const PixelRun& run) {
      layout.for_each_segment(begin, end, [&](const Segment& s) {
        const I* row = data + layout.offset(run, s);
        // Side by side or overlapping, as many as fit one line; with wide gaps, one by one.
        const int64_t fitting = step < 2 * s.count ? 1 + (kLine - s.count) / step : 1;
        for (int64_t t = 0; t < run.count; t += fitting) {
          const int64_t here = std::min(fitting, run.count - t);
          const int64_t length = (here - 1) * step + s.count;
          const I* from = row + t * step * stride;
          if (stride == 1) {
            widen_run(line, from, length);
          } else {
            for (int64_t i = 0; i < length; ++i) line[i] = widen(from[i * stride]);
          }
          table.normalise(line, length, s);
          for (int64_t u = 0; u < here; ++u)
            place(run.at + t + u, s.element, line + u * step, s.count);
        }
      });
    });
  }
};

// A[p, e]
template <class T, class I>
void pack_patch_rows(T* dst, const Patches<T, I>& patches, int64_t m0, int64_t mb, int64_t k0,
                     int64_t kb) {
  patches.read(m0, mb, k0, k0 + kb, [&](int64_t p, int64_t e, const T* from, int64_t n) {
    widen_run(dst + p * Panel<T>::lda + (e - k0), from, n);
  });
}

// B[p, e], in strips of NR elements
template <class T, class I>
void pack_patch_strips(T* dst, const Patches<T, I>& patches, int64_t k0, int64_t kb, int64_t n0,
                       int64_t nb) {
  constexpr int64_t NR = Panel<T>::NR;
  patches.read(k0, kb, n0, n0 + nb, [&](int64_t p, int64_t e, const T* from, int64_t n) {
    for (int64_t j = e - n0, last = j + n; j < last;) {
      const int64_t count = std::min(NR - j % NR, last - j);
      widen_run(dst + j / NR * kb * NR + p * NR + j % NR, from, count);
      from += count;
      j += count;
    }
  });
  if (nb % NR == 0) return;
  T* last = dst + nb / NR * kb * NR;
  for (int64_t k = 0; k < kb; ++k) std::fill(last + k * NR + nb % NR, last + (k + 1) * NR, T(0));
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

// B[e, d] = w[d, e]
template <class S>
void pack_weight_columns(Compute<S>* dst, const Weight<const S>& w, const PatchLayout& layout,
                         int64_t k0, int64_t kb, int64_t n0, int64_t nb) {
  constexpr int64_t NR = Panel<Compute<S>>::NR;
  const int64_t C = w.interleaved;
  for (int64_t j = 0; j < nb; j += NR, dst += kb * NR) {
    const int64_t width = std::min(NR, nb - j);
    const S* from = w.data + (n0 + j) * w.stride[0];
    if (w.contiguous) {
      transpose(dst, NR, from + k0, w.stride[0], 1, width, kb);
    } else {
      // A row of one channel's kernel lies side by side in memory, C apart in the patch.
      layout.for_each_segment(k0, k0 + kb, [&](const Segment& s) {
        for (int64_t e = s.element; e < std::min(s.element + C, s.element + s.count); ++e)
          transpose(dst + (e - k0) * NR, C * NR, from + w.offset(e), w.stride[0], w.stride[3],
                    width, ceil_div(s.element + s.count - e, C));
      });
    }
    for (int64_t k = 0; width < NR && k < kb; ++k)
      std::fill(dst + k * NR + width, dst + (k + 1) * NR, Compute<S>(0));
  }
}

// B[d, e] = w[d, e]
template <class S>
void pack_weight_rows(Compute<S>* dst, const Weight<const S>& w, int64_t k0, int64_t kb, int64_t n0,
                      int64_t nb) {
  using T = Compute<S>;
  constexpr int64_t NR = Panel<T>::NR;
  for (int64_t j = 0; j < nb; j += NR, dst += kb * NR) {
    const int64_t width = std::min(NR, nb - j);
    for (int64_t k = 0; k < kb; ++k) {
      const S* from = w.data + (k0 + k) * w.stride[0];
      T* row = dst + k * NR;
      if (w.contiguous) {
        widen_run(row, from + n0 + j, width);
      } else {
        const int64_t* offset = w.offsets.data() + n0 + j;
        for (int64_t i = 0; i < width; ++i) row[i] = widen(from[offset[i]]);
      }
      std::fill(row + width, row + NR, T(0));
    }
  }
}

// A[p, d]
template <class S>
void pack_token_rows(Compute<S>* dst, TokenView grad, const int64_t grid[2], int64_t m0,
                     int64_t mb, int64_t k0, int64_t kb) {
  const int64_t* stride = grad.stride;
  for (int64_t m = 0; m < mb; ++m, dst += Panel<Compute<S>>::lda) {
    const int64_t image = (m0 + m) / (grid[0] * grid[1]), token = (m0 + m) % (grid[0] * grid[1]);
    const S* from = static_cast<const S*>(grad.data) + image * stride[0] + token * stride[1] +
                    k0 * stride[2];
    if (stride[2] == 1) {
      widen_run(dst, from, kb);
    } else {
      for (int64_t k = 0; k < kb; ++k) dst[k] = widen(from[k * stride[2]]);
    }
  }
}

// A[d, p] = grad[p, d]
template <class S>
void pack_token_columns(Compute<S>* dst, TokenView grad, const int64_t grid[2], int64_t m0,
                        int64_t mb, int64_t k0, int64_t kb) {
  const int64_t per_image = grid[0] * grid[1];
  for (int64_t k = 0; k < kb;) {
    const int64_t image = (k0 + k) / per_image, token = (k0 + k) % per_image;
    const int64_t count = std::min(per_image - token, kb - k);
    const S* from = static_cast<const S*>(grad.data) + image * grad.stride[0] +
                    token * grad.stride[1] + m0 * grad.stride[2];
    transpose(dst + k, Panel<Compute<S>>::lda, from, grad.stride[1], grad.stride[2], count, mb);
    k += count;
  }
}

}  // namespace pyvit
