// Packing the operands of the planar weight gradient: one plane of pixels for each channel.
#pragma once

#include "conv2d_weight_grad_pack.h"
#include "conv2d_weight_grad_planar_plan.h"

namespace pyvit::weight_gradient {

// dst[i] = src[2·i].
template <class T, class S>
inline void copy_every_other(T* dst, const S* src, int64_t n) {
  int64_t i = 0;
#if defined(PYVIT_HAS_LANE_MASKS)
  if constexpr (std::is_same_v<S, float>) {
    constexpr int64_t L = kLanes<float>;
    // The last element that is read has no neighbour.
    const LaneMask high = lanes_between(0, L - 1);
    while (n >= L) {
      const float* from = src + 2 * i;
      store(dst + i, even_lanes(load(from), load_masked(Vec<float>{}, high, from + L)));
      if (i == n - L) return;
      i = std::min(i + L, n - L);
    }
  }
#endif
  for (; i < n; ++i) dst[i] = widen(src[2 * i]);
}

// dst[c · plane_step + p] = src[p · pixel_step + c] for `pixels` of `channels`.
template <class T, class S>
void turn_pixels(T* dst, int64_t plane_step, const S* src, int64_t pixel_step, int64_t channels,
                 int64_t pixels) {
  constexpr int64_t L = kLanes<T>;
  if (!std::is_same_v<T, S> || pixels < L)
    return transpose(dst, plane_step, src, pixel_step, 1, pixels, channels);
  // Whole blocks of registers, of which the last overlap those before.
  const int64_t width = std::min(L, channels);
  for (int64_t p = 0;; p = std::min(p + L, pixels - L)) {
    for (int64_t c = 0;; c = std::min(c + L, channels - width)) {
      transpose(dst + c * plane_step + p, plane_step, src + p * pixel_step + c, pixel_step, 1, L,
                width);
      if (c == channels - width) break;
    }
    if (p == pixels - L) break;
  }
}

// The pixels of a band, which lie in rows of `pitch` after each other, as do the images of it. What
// lies between the rows and beside them is zero beforehand and stays so.
template <class S>
class PlanePacker {
  using T = Compute<S>;
  const PlanarPlan<T>& plan_;
  const int64_t pitch_, step_;

 public:
  explicit PlanePacker(const PlanarPlan<T>& plan)
      : plan_(plan), pitch_(plan.pitch()), step_(plan.plane_step()) {}

  void pack_grad(T* dst, const S* dy, const int64_t stride[4], const BandRange& band,
                 int64_t channels) const {
    dy += band.row.begin * stride[2] + band.column.begin * stride[3];
    for (int64_t n = 0; n < band.image.count; ++n)
      pack_rows(dst + n * plan_.image_step(), step_, dy + (band.image.begin + n) * stride[0],
                {stride[1], stride[2], stride[3]}, channels, band.row.count, band.column.count);
  }

  // A plane for each phase of a channel.
  void pack_image(T* dst, const S* x, const int64_t stride[4], const BandRange& band,
                  int64_t channels) const {
    const PhasedAxis &down = plan_.rows, &across = plan_.columns;
    const int64_t channel_step = plan_.phases() * step_, height = band.row.count + down.halo;
    const Steps step{stride[1], down.stride * stride[2], across.stride * stride[3]};
    for (size_t i = 0; i < down.phases.size(); ++i) {
      const int64_t h0 = down.source(band.row.begin, i);
      const Span rows = inside(h0, down.stride, down.in, height);
      for (size_t j = 0; j < across.phases.size(); ++j, dst += step_) {
        const int64_t w0 = across.source(band.column.begin, j);
        const Span columns = inside(w0, across.stride, across.in, pitch_);
        const S* first = x + (h0 + rows.begin * down.stride) * stride[2] +
                         (w0 + columns.begin * across.stride) * stride[3];
        for (int64_t n = 0; n < band.image.count; ++n) {
          T* to = dst + n * plan_.image_step();
          // Only a band of some rows of an image finds other rows outside than the band before.
          for (int64_t c = 0; plan_.bands[1] > 1 && c < channels; ++c) {
            T* plane = to + c * channel_step;
            std::fill(plane, plane + rows.begin * pitch_, T(0));
            std::fill(plane + rows.end * pitch_, plane + height * pitch_, T(0));
          }
          pack_rows(to + rows.begin * pitch_ + columns.begin, channel_step,
                    first + (band.image.begin + n) * stride[0], step, channels,
                    rows.end - rows.begin, columns.end - columns.begin);
        }
      }
    }
  }

 private:
  struct Steps {
    int64_t channel, row, column;
  };

  void pack_rows(T* dst, int64_t channel_step, const S* src, Steps step, int64_t channels,
                 int64_t rows, int64_t columns) const {
    if (rows <= 0 || columns <= 0) return;
    // Rows that run on into each other on both sides are one.
    if (columns == pitch_ && step.row == columns * step.column) columns *= rows, rows = 1;
    if (step.channel == 1 && channels > 1) {
      for (int64_t r = 0; r < rows; ++r)
        turn_pixels(dst + r * pitch_, channel_step, src + r * step.row, step.column, channels,
                    columns);
      return;
    }
    for (int64_t c = 0; c < channels; ++c) {
      T* to = dst + c * channel_step;
      const S* from = src + c * step.channel;
      for (int64_t r = 0; r < rows; ++r, to += pitch_, from += step.row) {
        if (step.column == 1) {
          widen_run(to, from, columns);
        } else if (step.column == 2) {
          copy_every_other(to, from, columns);
        } else {
          for (int64_t p = 0; p < columns; ++p) to[p] = widen(from[p * step.column]);
        }
      }
    }
  }
};

}  // namespace pyvit::weight_gradient
