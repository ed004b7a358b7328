// How a convolution is cut into tasks for conv2d_band.cpp: the slices of its sums, which decide the
// result's rounding and follow from channels and kernel alone, and the boxes of the destination,
// which follow from the caches and the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "cache.h"
#include "conv2d_band_columns.h"
#include "conv2d_band_fold.h"
#include "conv2d_band_windows.h"
#include "conv2d_gather.h"
#include "parallel.h"
#include "row_kernel.h"

namespace pyvit {

constexpr int64_t kPanelLength = 1152;  // longest operand that is packed whole
constexpr int64_t kSliceLength = 640;   // a part of one that is not, about
constexpr int64_t kMostBandBytes = 512 << 10;
constexpr int64_t kLeastSums = 10;      // vectors that a tile must sum to keep the processor busy
constexpr int64_t kMostCutTaps = 32;    // of longer kernels, planning the cuts would cost too much

// Parts of the second-level cache. Together with kMostBandBytes they keep within kScratchLimit.
struct BlockBytes {
  int64_t panel, band, sums;  // packed weights, copied image, sums waiting for their next slice
  BlockBytes() {
    const int64_t cache = std::min<int64_t>(second_cache_bytes(), 1 << 20);
    panel = cache * 3 / 8;
    band = cache / 8;
    sums = cache * 7 / 16;
  }
};

// One axis of a box of destination pixels, and of the band under it.
struct BandAxis {
  int64_t extent;     // destination pixels of a box, a multiple of phase_step
  int64_t size;       // of the destination
  int64_t phase_step, step, first_offset, span;
  int64_t low, high;  // source positions that are read at all, zeros at the sides among them

  int64_t band(int64_t pixels) const {
    return std::min((ceil_div(pixels, phase_step) - 1) * step + span + 1, high - low);
  }
  int64_t boxes() const { return ceil_div(size, extent); }
  int64_t count(int64_t begin) const { return std::min(extent, size - begin); }
  // Where the band of the box from `begin` on starts.
  int64_t first(int64_t begin) const {
    const int64_t reached = begin / phase_step * step + first_offset;
    return std::max(low, std::min(reached, high - band(extent)));
  }
  void cut(int64_t parts) { extent = round_up(ceil_div(size, parts), phase_step); }
};

// Every so many rows of the destination, and the source rows that they read: a dilated kernel is a
// dense one for them.
struct RowView {
  int64_t first_row, height;  // of the source, every BandPlan::views rows from there on
  int64_t first_offset;       // of the taps, in rows of the view
  int64_t size;               // destination rows
};

template <class S>
struct BandPlan {
  using T = Compute<S>;
  Phases<S> phases;  // taps are in order of their offsets, those of rows count from the first
  BandAxis rows, columns;  // rows of a view
  int64_t views = 1;
  std::vector<std::vector<ColumnSegment>> segments;  // of each phase
  int64_t channels, slice, slices;  // source channels
  int64_t taps = 0;                 // of all phases together
  int64_t width, blocks;            // destination channels of a task
  int64_t fold;  // terms of a sum side by side in the lanes that few channels leave idle
  int64_t boxes_per_task, boxes;
  bool direct;  // sums go straight to the destination
  bool in_place;  // windows are the source's own pixels: each is read once, so a copy gains nothing
  bool possible = false;

  explicit BandPlan(const Phases<S>& phases_);

  RowView view(int64_t index) const {
    const int64_t height = any().source.height, first = index * rows.step + rows.first_offset;
    const int64_t first_row = (first % views + views) % views;
    return {first_row, ceil_div(height - first_row, views), (first - first_row) / views,
            ceil_div(phases.size[0] - index, views)};
  }

  const Gather<S>& any() const { return phases.list[0]; }
  int64_t pitch(int64_t count) const {
    // Windows that lie a multiple of a page's half apart would share few cache lines.
    return only_column() && count % 128 == 0 ? count + 16 : count;
  }
  bool only_column() const { return columns.span == 0; }
  int64_t band_elements() const {
    // A folded run is read to the end of a vector.
    return rows.band(rows.extent) * columns.band(columns.extent) * pitch(slice) + kLanes<T>;
  }
  int64_t box_pixels() const { return rows.extent * columns.extent; }
  int64_t padded_width() const { return round_up(width, kLanes<T> / fold); }
  int64_t tile_pixels(int64_t vectors) const {
    return fold > 1 ? FoldTile<T>::pixels : RowTile<T>::pixels_of(vectors);
  }
  // Rows of packed weights of one phase.
  int64_t panel_rows(const Gather<S>& phase, int64_t count) const {
    const auto& taps_of = phase.source.taps;
    if (fold == 1) return taps_of[0].size() * taps_of[1].size() * count;
    return taps_of[0].size() * weight_rows(taps_of[1], pitch(count), count, fold);
  }
  int64_t panel_elements() const {
    if (fold == 1) return taps * slice * padded_width();
    int64_t elements = 0;
    for (const Gather<S>& phase : phases.list) elements += panel_rows(phase, slice) * kLanes<T>;
    return elements;
  }
  // The packed weights before they are folded.
  int64_t unfolded_elements() const {
    return fold == 1 ? 0 : taps * slice * padded_width();
  }
  int64_t sum_elements() const {
    return direct ? 0 : boxes_per_task * box_pixels() * padded_width();
  }
  int64_t bias_elements() const { return fold == 1 ? padded_width() : kLanes<T>; }
  int64_t tasks() const { return any().groups * blocks * ceil_div(boxes, boxes_per_task); }
  int64_t scratch_bytes() const {
    return Scratch::bytes_for<T>(panel_elements()) + Scratch::bytes_for<T>(unfolded_elements()) +
           Scratch::bytes_for<T>(band_elements()) + Scratch::bytes_for<T>(sum_elements()) +
           Scratch::bytes_for<T>(bias_elements());
  }

 private:
  const BlockBytes bytes_;
  void plan_axis(BandAxis& axis, int index);
  void plan_views();
  void plan_segments();
  void plan_slices(int64_t most_taps);
  void plan_fold();
  void plan_boxes();
  void plan_tasks();
  bool reads_in_place() const;
  void count_boxes() { boxes = any().batch * views * rows.boxes() * columns.boxes(); }
};

template <class S>
BandPlan<S>::BandPlan(const Phases<S>& phases_) : phases(phases_) {
  const Gather<S>& g = any();
  channels = g.source.channels;
  int64_t most_taps = 1;
  for (Gather<S>& phase : phases.list) {
    for (auto& axis : phase.source.taps)
      std::sort(axis.begin(), axis.end(),
                [](const Tap& a, const Tap& b) { return a.offset < b.offset; });
    const int64_t of_phase = phase.source.taps[0].size() * phase.source.taps[1].size();
    taps += of_phase;
    most_taps = std::max(most_taps, of_phase);
  }
  if (taps == 0) return;
  plan_axis(rows, 0);
  plan_axis(columns, 1);
  plan_views();
  plan_segments();
  plan_slices(most_taps);
  plan_fold();
  direct = std::is_same_v<S, T> && (g.destination.stride[1] == 1 || g.destination.channels == 1) &&
           g.destination.channels % (kLanes<T> / fold) == 0;
  const int64_t strip = RowTile<T>::strip, D = g.destination.channels;
  const int64_t row_bytes = taps * slice * static_cast<int64_t>(sizeof(T));
  width = std::max(strip, bytes_.panel / row_bytes / strip * strip);
  blocks = ceil_div(D, width);
  width = std::min(D, round_up(ceil_div(D, blocks), strip));
  in_place = reads_in_place();
  plan_boxes();
  possible = scratch_bytes() <= kScratchLimit && rows.extent > 0;
  if (possible) plan_tasks();
}

template <class S>
void BandPlan<S>::plan_axis(BandAxis& axis, int index) {
  int64_t least = INT64_MAX, most = INT64_MIN;
  for (const Gather<S>& phase : phases.list) {
    for (const Tap& tap : phase.source.taps[index]) {
      least = std::min(least, tap.offset);
      most = std::max(most, tap.offset);
    }
  }
  axis = {0, phases.size[index], phases.stride[index], any().source.step[index], least,
          most - least, 0, index == 0 ? any().source.height : any().source.width};
}

// The rows between the taps of a dilated kernel would be copied for nothing.
template <class S>
void BandPlan<S>::plan_views() {
  const PatchSource<S>& source = any().source;
  for (Gather<S>& phase : phases.list)
    for (Tap& tap : phase.source.taps[0]) tap.offset -= rows.first_offset;
  int64_t between = 0;
  for (const Tap& tap : source.taps[0]) between = std::gcd(between, tap.offset);
  const int64_t image =
      source.height * source.width * channels * static_cast<int64_t>(sizeof(T));
  if (phases.list.size() > 1 || between < 2 || image <= bytes_.band) return;
  views = std::min(between, rows.size);
  if (views < between) return void(views = 1);
  rows.size = ceil_div(rows.size, views);
  rows.span /= views;
  rows.high = ceil_div(source.height, views);
  for (Tap& tap : phases.list[0].source.taps[0]) tap.offset /= views;
}

template <class S>
void BandPlan<S>::plan_segments() {
  const int64_t vectors =
      std::min<int64_t>(RowTile<T>::vectors, ceil_div(any().destination.channels, kLanes<T>));
  const TileCost cost{ceil_div(kLeastSums, vectors), RowTile<T>::pixels_of(vectors)};
  columns.low = INT64_MAX, columns.high = INT64_MIN;
  for (const Gather<S>& phase : phases.list) {
    const auto& taps = phase.source.taps[1];
    const auto count = static_cast<int64_t>(taps.size());
    const int64_t size = phase.source.grid[1];
    bool apart = count > 1 && count <= kMostCutTaps;
    for (int64_t t = 1; t < count; ++t) apart &= taps[t].offset > taps[t - 1].offset + 1;
    segments.push_back(apart ? column_segments(taps, columns.step, phase.source.width, size, cost)
                             : std::vector<ColumnSegment>{{0, size, {0, count}}});
    for (const auto& [begin, end, range] : segments.back()) {
      if (range.size() == 0) continue;
      columns.low = std::min(columns.low, begin * columns.step + taps[range.first].offset);
      columns.high =
          std::max(columns.high, (end - 1) * columns.step + taps[range.last - 1].offset + 1);
    }
  }
}

template <class S>
void BandPlan<S>::plan_slices(int64_t most_taps) {
  const int64_t length = channels * most_taps;
  // Long panels are narrow, and a band is packed again for each of them: where it must be
  // transposed, wide ones are better.
  const bool planar = any().source.stride[1] != 1 && channels > RowTile<T>::strip;
  slices = length <= (planar ? kSliceLength : kPanelLength) ? 1 : ceil_div(length, kSliceLength);
  slice = ceil_div(channels, std::min(slices, channels));
  // A band of a dilated or large kernel must hold the rows between its taps too.
  auto least_band = [&] {
    return rows.band(1) * columns.band(RowTile<T>::pixels * columns.phase_step) * slice *
           static_cast<int64_t>(sizeof(T));
  };
  while (slice > 16 && least_band() > kMostBandBytes / 2) slice = ceil_div(slice, 2);
  if (slice < channels) slice = std::min(channels, slice > 16 ? round_up(slice, 16) : slice);
  slices = ceil_div(channels, slice);
}

// The fold with the fewest rows of weights, and the fewest idle lanes among equals.
template <class S>
void BandPlan<S>::plan_fold() {
  int64_t best = INT64_MAX;
  const int64_t most = kLanes<T> / any().destination.channels;
  fold = 1;
  if (most < 2) return;
  for (int64_t candidate = 1; candidate <= most; candidate *= 2) {
    int64_t length = 0;
    for (const Gather<S>& phase : phases.list) {
      const auto& of = phase.source.taps;
      length += of[0].size() * weight_rows(of[1], pitch(slice), slice, candidate);
    }
    if (length <= best) best = length, fold = candidate;
  }
}

template <class S>
bool BandPlan<S>::reads_in_place() const {
  const PatchSource<S>& source = any().source;
  const int64_t pitch_bytes = source.stride[3] * columns.step * static_cast<int64_t>(sizeof(S));
  return std::is_same_v<S, T> && taps == 1 && source.stride[1] == 1 && width <= 2 * RowTile<T>::strip &&
         columns.low >= 0 && columns.high <= source.width &&
         channels % fold == 0 && slice % fold == 0 &&  // else a run is read beyond its end
         pitch_bytes % 2048 != 0;  // pixels that would share few cache lines
}

// Boxes as large as band and sums may be, cut into equal parts.
template <class S>
void BandPlan<S>::plan_boxes() {
  const int64_t element = sizeof(T);
  const bool keeps_sums = !direct || slices > 1;
  auto fits = [&](int64_t r, int64_t c) {
    const int64_t band = rows.band(r) * columns.band(c) * pitch(slice) * element;
    const int64_t sums = r * c * padded_width() * element;
    return band <= bytes_.band && (!keeps_sums || sums <= bytes_.sums);
  };
  auto rows_that_fit = [&] {
    int64_t r = 0;
    while (r < rows.size && fits(r + rows.phase_step, columns.extent)) r += rows.phase_step;
    return r;
  };
  const int64_t wanted = std::min(rows.size, 4 * rows.phase_step);
  const int64_t narrowest = 56 * columns.phase_step;
  columns.cut(1);
  for (int64_t parts = 2; rows_that_fit() < wanted && columns.extent > narrowest;
       parts += ceil_div(parts, 4))
    columns.cut(parts);
  rows.cut(ceil_div(rows.size, std::max(rows.phase_step, rows_that_fit())));
  boxes_per_task = 1;
  count_boxes();
}

// Tasks large enough to repay the packing of their weights, and enough of them for the threads.
template <class S>
void BandPlan<S>::plan_tasks() {
  const int64_t wanted = 2 * thread_count();
  auto cut_channels = [&] {
    while (tasks() < wanted && width > RowTile<T>::strip) {
      width = round_up(ceil_div(width, 2), RowTile<T>::strip);
      blocks = ceil_div(any().destination.channels, width);
    }
  };
  auto cut_axis = [&](BandAxis& axis, int64_t least) {
    while (tasks() < wanted && axis.extent >= 2 * least) {
      axis.cut(2 * axis.boxes());
      count_boxes();
    }
  };
  // Threads with different pixels pack the same weights, with different channels the same pixels.
  const int64_t weights = taps * any().destination.channels;
  const bool many_weights = weights > any().batch * phases.size[0] * columns.size;
  if (many_weights) cut_channels();
  cut_axis(rows, rows.phase_step);
  cut_axis(columns, 28 * columns.phase_step);
  if (!many_weights) cut_channels();
  if (slices == 1) return;  // a thread packs weights once and keeps them from task to task
  const int64_t bytes = box_pixels() * padded_width() * static_cast<int64_t>(sizeof(T));
  const int64_t parts = ceil_div(boxes, std::max<int64_t>(1, bytes_.sums / bytes));
  boxes_per_task = ceil_div(boxes, parts);
  while (boxes_per_task > 1 && tasks() < wanted) boxes_per_task = ceil_div(boxes_per_task, 2);
}

}  // namespace pyvit
