// Packing the image for groups of few output channels (depth-wise and nearly so): each lane of a
// strip of output channels gets the input channel that its own group reads.
#pragma once

#include "conv2d_weight_grad_pack.h"

namespace pyvit::weight_gradient {

// dst[l] = src[index[l]] for l < kLanes<T>; `within` says that all indices are below kLanes<T>.
template <class T>
class LaneChoice {
  static constexpr int L = kLanes<T>;
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  Index index_[L];
  bool within_ = true;

 public:
  int64_t first;  // of the channels in reach

  // Lanes [begin, begin + L) of channels, of which `count` exist, with `per_group` to each group
  // of `channels`.
  LaneChoice(int64_t begin, int64_t count, int64_t per_group, int64_t channels)
      : first(begin / per_group * channels) {
    for (int64_t l = 0; l < L; ++l) {
      index_[l] = (begin + std::min(l, count - 1)) / per_group * channels - first;
      within_ = within_ && index_[l] < L;
    }
  }
  int64_t reach() const { return index_[L - 1] + 1; }

  void copy(T* dst, const T* src) const {
#if defined(__AVX512F__)
    if (within_) {
      if constexpr (sizeof(T) == 4) {
        const __m512i index = _mm512_loadu_si512(index_);
        _mm512_storeu_ps(dst, _mm512_permutexvar_ps(index, _mm512_loadu_ps(src)));
      } else {
        const __m512i index = _mm512_loadu_si512(index_);
        _mm512_storeu_pd(dst, _mm512_permutexvar_pd(index, _mm512_loadu_pd(src)));
      }
      return;
    }
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4) {
      if (within_) {
        const __m256i index = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index_));
        _mm256_storeu_ps(dst, _mm256_permutevar8x32_ps(_mm256_loadu_ps(src), index));
        return;
      }
    }
#endif
    for (int l = 0; l < L; ++l) dst[l] = src[index_[l]];
  }
};

// The band that `window` names: pixel (image, u, v) of channel c of lane l goes to
// dst[s · strip_step + c · channel_step + ((image · image_rows + u) · pitch + v) · NR + l] for
// strip s of the output channels `out`; zeros outside the image.
template <class S>
class LanePacker {
 public:
  using T = Compute<S>;
  static constexpr int64_t NR = Panel<T>::NR, L = kLanes<T>;
  const WeightGradPlan<T>& plan;
  const BandWindow& window;
  Range out, channels;
  int64_t image_rows, pitch, channel_step, strip_step;

  void pack(T* dst, const S* x, const int64_t stride[4], Range images) const {
    for (int64_t n = 0; n < images.count; ++n) {
      for (int64_t u = 0; u < window.rows.count; ++u) {
        const bool outside = u < window.row_span.begin || u >= window.row_span.end;
        const S* row = x + (images.begin + n) * stride[0] + window.rows.source(u) * stride[2];
        T* to = dst + (n * image_rows + u) * pitch * NR;
        fill_outside(to, outside ? Span{0, 0} : window.column_span);
        if (!outside)
          pack_row(to + window.column_span.begin * NR,
                   row + window.columns.source(window.column_span.begin) * stride[3], stride);
      }
    }
  }

 private:
  void fill_outside(T* dst, Span inside) const {
    for (int64_t o = 0; o < out.count; o += NR, dst += strip_step) {
      for (int64_t c = 0; c < channels.count; ++c) {
        T* to = dst + c * channel_step;
        std::fill(to, to + inside.begin * NR, T(0));
        std::fill(to + inside.end * NR, to + window.columns.count * NR, T(0));
      }
    }
  }

  // The pixels of a row that lie inside the image.
  void pack_row(T* dst, const S* row, const int64_t stride[4]) const {
    const int64_t pixels = window.column_span.end - window.column_span.begin;
    const int64_t step = window.columns.line_step * stride[3];
    const int64_t between = plan.channels * stride[1];  // from group to group
    const S* first = row + out.begin * between + channels.begin * stride[1];
    if (plan.group_out_channels == 1 && between == 1)
      return copy_strips(dst, NR, strip_step, first, step, out.count, pixels);
    for (int64_t o = 0; o < out.count; o += NR, dst += strip_step) {
      const Range strip{o, std::min(NR, out.count - o)};
      if (plan.group_out_channels > 1) {
        choose_lanes(dst, row, stride[1], step, strip, pixels);
        continue;
      }
      for (int64_t c = 0; c < channels.count; ++c)
        copy_lanes(dst + c * channel_step, NR, first + o * between + c * stride[1], between,
                   step, strip.count, pixels);
    }
  }

  // dst[p · ldd + l] = from[l · between + p · step] for `count` lanes of `pixels`.
  static void copy_lanes(T* dst, int64_t ldd, const S* from, int64_t between, int64_t step,
                         int64_t count, int64_t pixels) {
    if (between != 1) {
      transpose(dst, ldd, from, between, step, count, pixels);
    } else if (count == NR) {
      for (int64_t p = 0; p < pixels; ++p) widen_run(dst + p * ldd, from + p * step, NR);
    } else {
      for (int64_t p = 0; p < pixels; ++p) widen_run(dst + p * ldd, from + p * step, count);
    }
  }

  // Several lanes share their group's channels: those are turned once, and lanes choose from them.
  void choose_lanes(T* dst, const S* from, int64_t between, int64_t step, Range strip,
                    int64_t pixels) const {
    constexpr int64_t most_pixels = kLanes<T>, most_channels = 4 * L;
    T turned[most_pixels * most_channels];
    for (int64_t l = 0; l < strip.count; l += L) {
      const LaneChoice<T> choice(out.begin + strip.begin + l, std::min(L, strip.count - l),
                                 plan.group_out_channels, plan.channels);
      // So many channels of the group at a time that those of all its lanes fit.
      const int64_t span = choice.reach() - 1;
      for (int64_t c = 0; c < channels.count;) {
        const int64_t count = std::min(channels.count - c, most_channels - L - span);
        const S* first = from + (choice.first + channels.begin + c) * between;
        for (int64_t p = 0; p < pixels; p += most_pixels) {
          const int64_t some = std::min(most_pixels, pixels - p);
          copy_lanes(turned, most_channels, first + p * step, between, step, span + count, some);
          for (int64_t k = 0; k < count; ++k)
            for (int64_t q = 0; q < some; ++q)
              choice.copy(dst + (c + k) * channel_step + (p + q) * NR + l,
                          turned + q * most_channels + k);
        }
        c += count;
      }
    }
  }
};

}  // namespace pyvit::weight_gradient
