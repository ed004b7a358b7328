// How the planar weight gradient is cut up (see conv2d_weight_grad_planar.cpp): bands of output
// pixels, which depend on the sizes alone, and blocks of the result.
#pragma once

#include <vector>

#include "conv2d_weight_grad_plan.h"

namespace pyvit::weight_gradient {

// One axis of the packed image. Tap i of output line q reads source line
// q·stride − padding + i·dilation, which is line q + shift(i) of those that start phase(i)·step
// later: with a stride, taps are shared among as many planes as there are phases, so that the
// source lines of neighbouring output lines are neighbours too.
struct PhasedAxis {
  int64_t out, in, stride, padding, step;
  struct Place {
    int64_t phase, shift;
  };
  std::vector<Place> taps;
  std::vector<int64_t> phases;  // lines from the first tap's to the phase's first
  int64_t halo = 0;             // the largest shift

  PhasedAxis(const Conv2dShape& s, int a)
      : out(a == 0 ? s.out_height : s.out_width),
        in(a == 0 ? s.height : s.width),
        stride(s.stride[a]),
        padding(s.padding[a]),
        step(std::gcd(s.stride[a], s.dilation[a])) {
    for (int64_t i = 0; i < s.kernel[a]; ++i) {
      const int64_t line = i * s.dilation[a], first = line % stride;
      auto found = std::find(phases.begin(), phases.end(), first);
      const int64_t phase = found - phases.begin();
      if (found == phases.end()) phases.push_back(first);
      taps.push_back({phase, line / stride});
      halo = std::max(halo, line / stride);
    }
  }
  // Source line of a packed one, counted from output line q.
  int64_t source(int64_t q, int64_t phase) const { return q * stride - padding + phases[phase]; }
};

template <class T>
struct PlanarPlan {
  static constexpr int64_t L = kLanes<T>;
  static constexpr int64_t kBlockBytes = 3 << 18;  // what a task keeps in the second cache
  static constexpr int64_t kBandPixels = 1024;


  int64_t images, groups, outs, channels;  // of a group
  PhasedAxis rows, columns;
  struct {
    int64_t images, rows, columns;
  } band;
  int64_t bands[3];
  bool run_on;       // the images of a band are one run of pixels, not a run each
  int64_t block[3];  // groups, output channels, channels

  // `interleaved`: an operand's channels lie side by side.
  PlanarPlan(const Conv2dShape& s, bool interleaved)
      : images(s.batch),
        groups(s.groups),
        outs(s.out_channels / s.groups),
        channels(s.in_channels / s.groups),
        rows(s, 0),
        columns(s, 1) {
    band.columns = equal_length(s.out_width, kBandPixels);
    band.rows = equal_length(s.out_height, kBandPixels / pitch() - rows.halo);
    const bool whole = band.columns == s.out_width && band.rows == s.out_height;
    band.images = whole ? equal_length(s.batch, kBandPixels / (image_rows() * pitch())) : 1;
    bands[0] = ceil_div(s.batch, band.images);
    bands[1] = ceil_div(s.out_height, band.rows);
    bands[2] = ceil_div(s.out_width, band.columns);
    const int64_t run = round_up(image_run(band.rows), L);
    run_on = (band.images - 1) * image_rows() * pitch() + run <= band.images * run;
    choose_blocks(interleaved);
  }

  int64_t pitch() const { return band.columns + columns.halo; }
  int64_t image_rows() const { return band.rows + rows.halo; }
  int64_t image_step() const { return image_rows() * pitch(); }
  // Pixels from the first of an image to its last.
  int64_t image_run(int64_t band_rows) const { return (band_rows - 1) * pitch() + band.columns; }
  // A plane is read up to a vector beyond its end. Planes lie an odd number of cache lines apart,
  // so that they do not share a cache set.
  int64_t plane_step() const {
    const int64_t line = 64 / sizeof(T);
    return (ceil_div(band.images * image_step() + L, line) | 1) * line;
  }
  int64_t phases() const { return rows.phases.size() * columns.phases.size(); }
  int64_t taps() const { return rows.taps.size() * columns.taps.size(); }
  int64_t elements() const { return channels * taps(); }  // of an output channel
  int64_t band_count() const { return bands[0] * bands[1] * bands[2]; }

  int64_t image_elements() const { return block[0] * block[2] * phases() * plane_step(); }
  int64_t grad_elements() const { return block[0] * block[1] * plane_step(); }
  int64_t sum_elements() const { return block[0] * block[1] * block[2] * taps() * L; }
  int64_t scratch_bytes() const {
    return Scratch::bytes_for<T>(image_elements()) + Scratch::bytes_for<T>(grad_elements()) +
           Scratch::bytes_for<T>(sum_elements() + L * L) + Scratch::bytes_for<T>(plane_step());
  }

  // Pixels of all bands in one plane, and vectors of them that are multiplied.
  int64_t pixels() const { return band_count() * band.images * image_step(); }
  int64_t vectors() const {
    const int64_t run = image_run(band.rows), more = band.images - 1;
    const int64_t count = run_on ? ceil_div(more * image_step() + run, L)
                                 : band.images * ceil_div(run, L);
    return band_count() * count;
  }

  int64_t extent(int dim) const { return dim == 0 ? groups : dim == 1 ? outs : channels; }
  int64_t blocks(int dim) const { return ceil_div(extent(dim), block[dim]); }
  int64_t block_count() const { return blocks(0) * blocks(1) * blocks(2); }
  Range block_range(int dim, int64_t index) const { return piece(extent(dim), block[dim], index); }

  // Smaller blocks where `copies` times as many tasks as blocks would leave threads idle.
  void divide_among(int64_t threads, int64_t copies) {
    for (int dim = 0; dim < 3; ++dim) {
      for (;;) {
        const int64_t tasks = block_count() * copies;
        if (10 * tasks >= 9 * round_up(tasks, threads)) return;
        if (block[dim] == 1) break;
        block[dim] = ceil_div(block[dim], 2);
      }
    }
  }

 private:
  // Interleaved channels are packed many at a time, since they share cache lines; planes one group
  // at a time.
  void choose_blocks(bool interleaved) {
    block[0] = 1, block[1] = outs, block[2] = channels;
    for (const int dim : {2, 1})
      while (block[dim] > 1 && scratch_bytes() > kBlockBytes) block[dim] = ceil_div(block[dim], 2);
    if (!interleaved || block[1] < outs || block[2] < channels) return;
    block[0] = groups;
    while (block[0] > 1 && scratch_bytes() > kBlockBytes) block[0] = ceil_div(block[0], 2);
  }
};

}  // namespace pyvit::weight_gradient
