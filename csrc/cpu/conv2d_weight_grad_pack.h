// Packing the two operands of one band of the weight gradient (see conv2d_weight_grad_plan.h).
#pragma once

#include "conv2d_weight_grad_plan.h"
#include "transpose.h"

namespace pyvit::weight_gradient {

// Where a band lies in the output.
struct BandRange {
  Range image, row, column;

  int64_t pixels() const { return image.count * row.count * column.count; }
};

// Pixels of contiguous channels as strips of `lanes`: channel c of pixel p goes to
// dst[c / lanes · strip_step + p · lanes + c % lanes]. Whole pixels in turn, as they lie in memory.
template <class T, class S>
void copy_strips(T* dst, int64_t lanes, int64_t strip_step, const S* src, int64_t pixel_step,
                 int64_t channels, int64_t pixels) {
  constexpr int64_t NR = Panel<T>::NR;
  for (int64_t p = 0; p < pixels; ++p, src += pixel_step) {
    T* to = dst + p * lanes;
    int64_t c = 0;
    for (; c + NR <= channels; c += NR, to += strip_step) widen_run(to, src + c, NR);
    if (c == channels) continue;
    widen_run(to, src + c, channels - c);
    std::fill(to + channels - c, to + lanes, T(0));
  }
}

// dy of `channels` as strips of `lanes`: dst[strip · pixels · lanes + pixel · lanes + channel],
// zeros in the lanes that have no channel.
template <class S>
void pack_grad_band(Compute<S>* dst, int64_t lanes, const S* dy, const int64_t stride[4],
                    int64_t out_columns, const BandRange& band, Range channels) {
  const int64_t pixels = band.pixels();
  // Rows that run on into each other are one.
  const bool joined = band.column.count == out_columns && stride[2] == out_columns * stride[3];
  const int64_t rows = joined ? 1 : band.row.count;
  const int64_t run = joined ? band.row.count * band.column.count : band.column.count;
  for (int64_t n = 0; n < band.image.count; ++n) {
    for (int64_t r = 0; r < rows; ++r) {
      const S* from = dy + (band.image.begin + n) * stride[0] + channels.begin * stride[1] +
                      (band.row.begin + r) * stride[2] + band.column.begin * stride[3];
      auto* to = dst + (n * rows + r) * run * lanes;
      if (stride[1] == 1) {
        copy_strips(to, lanes, pixels * lanes, from, stride[3], channels.count, run);
        continue;
      }
      for (int64_t o = 0; o < channels.count; o += lanes) {
        const int64_t width = std::min(lanes, channels.count - o);
        auto* strip = to + o * pixels;
        transpose(strip, lanes, from + o * stride[1], stride[1], stride[3], width, run);
        for (int64_t p = 0; width < lanes && p < run; ++p)
          std::fill(strip + p * lanes + width, strip + (p + 1) * lanes, Compute<S>(0));
      }
    }
  }
}

// The source rows and columns of a band, and which of the packed lines lie inside the image.
struct BandWindow {
  Lines rows, columns;
  Span row_span, column_span;
};

inline Span lines_inside(const Lines& lines, int64_t extent) {
  int64_t begin = 0, end = lines.count;
  while (begin < end && lines.source(begin) < 0) ++begin;
  while (begin < end && lines.source(end - 1) >= extent) --end;
  return {begin, end};
}

// The band of x that `window` names, for channels counted from x: pixel (image, u, v) of channel c
// goes to dst[c · channel_step + (image · image_rows + u) · pitch + v], or, pixel-major, to
// dst[((image · image_rows + u) · pitch + v) · channels + c]. Lines outside the image are zeros if
// `padded`; else the packed lines begin with the first one inside.
template <class S>
class ImageBandPacker {
 public:
  using T = Compute<S>;
  const WeightGradPlan<T>& plan;
  const BandWindow& window;
  int64_t channels, image_rows, pitch, channel_step;

  void pack(T* dst, const S* x, const int64_t stride[4], Range images) const {
    const Span rows = window.row_span, columns = window.column_span;
    const Axis& across = plan.axis[1];
    const int64_t first_row = plan.padded ? 0 : rows.begin;
    const int64_t last_row = plan.padded ? window.rows.count : rows.end;
    const int64_t width = plan.padded ? window.columns.count : columns.end - columns.begin;
    const int64_t w0 = window.columns.source(plan.padded ? 0 : columns.begin);
    // Whole rows, none of them outside, that run on into each other are one.
    const bool joined = !plan.pixel_major && first_row == rows.begin && last_row == rows.end &&
                        width == pitch && w0 == 0 && width == across.in &&
                        window.columns.line_step == 1 && window.rows.line_step == 1 &&
                        window.rows.group == 0 && stride[2] == width * stride[3];
    for (int64_t n = 0; n < images.count; ++n) {
      const S* image = x + (images.begin + n) * stride[0];
      T* to = dst + n * image_rows * pitch * (plan.pixel_major ? channels : 1);
      if (joined) {
        if (last_row > first_row)
          pack_row(to, image + window.rows.source(first_row) * stride[2], stride, 0,
                   (last_row - first_row) * width, (last_row - first_row) * width, 1);
        continue;
      }
      for (int64_t u = first_row; u < last_row; ++u) {
        T* row = to + (u - first_row) * pitch * (plan.pixel_major ? channels : 1);
        const bool outside = u < rows.begin || u >= rows.end;
        pack_row(row, outside ? nullptr : image + window.rows.source(u) * stride[2], stride, w0,
                 width, across.in, window.columns.line_step);
      }
    }
  }

 private:
  // `width` pixels from column w0 on, `step` apart, of a row of `extent`; null: a row of zeros.
  void pack_row(T* dst, const S* row, const int64_t stride[4], int64_t w0, int64_t width,
                int64_t extent, int64_t step) const {
    if (plan.pixel_major) {
      if (row == nullptr) {
        std::fill(dst, dst + width * channels, T(0));
      } else if (step == 1) {
        copy_clipped(dst, row, w0 * channels, 1, 1, extent * channels, width * channels);
      } else {
        for (int64_t v = 0; v < width; ++v, dst += channels)
          copy_clipped(dst, row, (w0 + v * step) * channels, 1, 1, extent * channels, channels);
      }
      return;
    }
    const bool whole = row != nullptr && w0 >= 0 && w0 + (width - 1) * step < extent;
    if (whole && stride[1] == 1 && channels > 1) {
      transpose(dst, channel_step, row + w0 * stride[3], step * stride[3], 1, width, channels);
      return;
    }
    for (int64_t c = 0; c < channels; ++c, dst += channel_step) {
      if (row == nullptr) {
        std::fill(dst, dst + width, T(0));
      } else if (whole && step * stride[3] == 1) {
        widen_run(dst, row + c * stride[1] + w0, width);
      } else {
        copy_clipped(dst, row + c * stride[1], w0, step, stride[3], extent, width);
      }
    }
  }
};

// The same band, depth-wise: channel l of pixel (image, u, v) goes to
// dst[l / NR · strip_step + ((image · image_rows + u) · pitch + v) · NR + l % NR], counted from
// channel out.begin; zeros outside the image.
template <class S>
class LanePacker {
 public:
  using T = Compute<S>;
  static constexpr int64_t NR = Panel<T>::NR;
  const WeightGradPlan<T>& plan;
  const BandWindow& window;
  Range out;
  int64_t image_rows, pitch, strip_step;

  void pack(T* dst, const S* x, const int64_t stride[4], Range images) const {
    const Span columns = window.column_span;
    for (int64_t n = 0; n < images.count; ++n) {
      for (int64_t u = 0; u < window.rows.count; ++u) {
        const bool outside = u < window.row_span.begin || u >= window.row_span.end;
        T* to = dst + (n * image_rows + u) * pitch * NR;
        fill_outside(to, outside ? Span{0, 0} : columns);
        if (outside) continue;
        const S* row = x + (images.begin + n) * stride[0] + window.rows.source(u) * stride[2] +
                       window.columns.source(columns.begin) * stride[3] + out.begin * stride[1];
        pack_row(to + columns.begin * NR, row, stride[1], window.columns.line_step * stride[3],
                 columns.end - columns.begin);
      }
    }
  }

 private:
  void pack_row(T* dst, const S* row, int64_t channel_step, int64_t step, int64_t pixels) const {
    if (channel_step == 1) return copy_strips(dst, NR, strip_step, row, step, out.count, pixels);
    for (int64_t o = 0; o < out.count; o += NR, dst += strip_step, row += NR * channel_step)
      transpose(dst, NR, row, channel_step, step, std::min(NR, out.count - o), pixels);
  }

  void fill_outside(T* dst, Span inside) const {
    for (int64_t o = 0; o < out.count; o += NR, dst += strip_step) {
      std::fill(dst, dst + inside.begin * NR, T(0));
      std::fill(dst + inside.end * NR, dst + window.columns.count * NR, T(0));
    }
  }
};

}  // namespace pyvit::weight_gradient
