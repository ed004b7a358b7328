// One vector-wide group of destination pixels at a time: the innermost loop of planar packing.
#pragma once

#include "gemm.h"
#include "patches.h"

namespace pyvit {

// The NR destination pixels from `first` on, of which `width` exist, cut into runs.
template <class T>
struct PixelGroup {
  static constexpr int NR = Panel<T>::NR;
  PixelRun runs[NR];
  int count = 0;
  int64_t width;

  PixelGroup(const int64_t grid[2], int64_t first, int64_t width_) : width(width_) {
    for_each_run(grid, first, width, [&](const PixelRun& run) { runs[count++] = run; });
  }
};

template <class T, class S>
void copy_group_by_runs(T* dst, int64_t stride, const PatchSource<S>& source, int64_t e0,
                        int64_t count, const PixelGroup<T>& group) {
  PlanarIndex index(source, e0);
  for (int64_t e = 0; e < count; ++e, dst += stride, index.next(source)) {
    for (int r = 0; r < group.count; ++r)
      copy_pixels(dst + group.runs[r].at, source, index, group.runs[r]);
    for (int64_t i = group.width; i < group.NR; ++i) dst[i] = T(0);
  }
}

#if defined(PYVIT_HAS_LANE_MASKS)
// Whole vectors, with a mask for each run and column tap: the masks say both where a run lies in
// the group and where the image ends, and are computed once for all channels and row taps.
template <int Step>
struct MaskedGroup {
  static constexpr int64_t most_taps = 16;
  static constexpr int L = kLanes<float>, NR = 2 * L;
  struct Masks {
    LaneMask take, low, high;  // lanes to keep; where Step is 2, lanes to load for them
  };

  const PatchSource<float>& source;
  const PixelGroup<float>& group;
  Masks masks[most_taps][NR][2];
  const float* row[NR];  // source row of each run, shifted to the group's first lane; or null

  MaskedGroup(const PatchSource<float>& s, const PixelGroup<float>& g) : source(s), group(g) {
    for (size_t tap = 0; tap < source.taps[1].size(); ++tap) {
      for (int r = 0; r < group.count; ++r) {
        const PixelRun& run = group.runs[r];
        // Source column of run pixel t: first + t · Step.
        const int64_t first = run.column * Step + source.taps[1][tap].offset;
        const Span span = inside(first, Step, source.width, run.count);
        for (int half = 0; half < 2; ++half) {
          const int64_t begin = run.at + span.begin - half * L, end = run.at + span.end - half * L;
          Masks& m = masks[tap][r][half];
          m.take = lanes_between(begin, end);
          const int64_t last = std::max(2 * begin, 2 * end - 1);
          m.low = lanes_between(2 * begin, last);
          m.high = lanes_between(2 * begin - L, last - L);
        }
      }
    }
  }

  void enter(int64_t channel, int64_t row_tap) {
    for (int r = 0; r < group.count; ++r) {
      const PixelRun& run = group.runs[r];
      const int64_t h = run.row * source.step[0] + source.taps[0][row_tap].offset;
      row[r] = h < 0 || h >= source.height
                   ? nullptr
                   : source.data + run.image * source.stride[0] + channel * source.stride[1] +
                         h * source.stride[2] + (run.column - run.at) * Step;
    }
  }

  Vec<float> half(int64_t tap, int which) const {
    Vec<float> v = {};
    for (int r = 0; r < group.count; ++r) {
      if (row[r] == nullptr) continue;
      const Masks& m = masks[tap][r][which];
      const float* p = row[r] + source.taps[1][tap].offset + which * L * Step;
      if constexpr (Step == 1) {
        v = load_masked(v, m.take, p);
      } else {
        const Vec<float> low = load_masked(Vec<float>{}, m.low, p);
        v = select(m.take, even_lanes(low, load_masked(Vec<float>{}, m.high, p + L)), v);
      }
    }
    return v;
  }

  void copy(float* dst, int64_t stride, int64_t e0, int64_t count) {
    PlanarIndex index(source, e0);
    enter(index.channel, index.row_tap);
    for (int64_t e = 0; e < count; ++e, dst += stride) {
      store(dst, half(index.column_tap, 0));
      store(dst + L, half(index.column_tap, 1));
      index.next(source);
      if (index.column_tap == 0 && e + 1 < count) enter(index.channel, index.row_tap);
    }
  }
};
#endif

// Patch elements [e0, e0 + count) of the group's pixels: element e goes to dst[(e - e0) · stride],
// NR values, zeros past the group's width.
template <class T, class S>
void copy_pixel_group(T* dst, int64_t stride, const PatchSource<S>& source, int64_t e0,
                      int64_t count, int64_t first_pixel, int64_t width) {
  const PixelGroup<T> group(source.grid, first_pixel, width);
#if defined(PYVIT_HAS_LANE_MASKS)
  if constexpr (std::is_same_v<S, float>) {
    const int64_t taps = source.taps[1].size();
    if (source.stride[3] == 1 && taps <= MaskedGroup<1>::most_taps) {
      if (source.step[1] == 1) return MaskedGroup<1>(source, group).copy(dst, stride, e0, count);
      if (source.step[1] == 2) return MaskedGroup<2>(source, group).copy(dst, stride, e0, count);
    }
  }
#endif
  copy_group_by_runs(dst, stride, source, e0, count, group);
}

}  // namespace pyvit
