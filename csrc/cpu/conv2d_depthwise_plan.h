// How a convolution of groups with few channels is cut into tasks (conv2d_depthwise.cpp).
#pragma once

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "conv2d_depthwise_band.h"
#include "conv2d_depthwise_kernel.h"
#include "parallel.h"

namespace pyvit {

constexpr int64_t kLaneChain = 384;               // longest sum in registers, about
constexpr int64_t kLaneBandBytes = 256 << 10;      // where the rows of a box share little
constexpr int64_t kMostLaneBandBytes = 384 << 10;
constexpr int64_t kLanePanelBytes = 384 << 10;     // packed weights of one task
constexpr int64_t kMostLaneBlocks = 8;             // vectors of lanes of one task
constexpr int64_t kMostPairs = 8;  // of a source and a destination channel of one group
constexpr int64_t kColumnsOfSpan = 6;  // columns of a layer in place for each that a kernel spans
constexpr int64_t kRowsOfSpan = 4;  // rows of a box for each row that its neighbour repeats

// What the ways that groups may take cost, in nanoseconds about, for a vector of lanes or a group:
// a product, a pixel of the destination, a pixel of the source, a source brought to its lanes, a
// product that waits for the one before, a weight packed (a thirtieth, as if for some images).
// Measured with AVX2 and AVX-512 alike.
struct InPlaceCost {
  static constexpr double one = 0.22, few = 0.35, pair = 0.44, pixel = 1.2, wait = 0.7, weight = 0.03;
};
struct LaneBandCost {
  static constexpr double product = 0.22, pixel = 1.8, read = 2.4, spread = 2.5;
};
struct GroupCost {
  static constexpr double product = 0.15, pixel = 3.3, read = 1.8;
};

// The taps of one phase on one axis, in ascending order of their offsets, which are equally spaced.
struct TapAxis {
  int64_t count, first, spacing;

  explicit TapAxis(const std::vector<Tap>& taps) : count(taps.size()), first(0), spacing(1) {
    if (count == 0) return;
    first = std::min(taps.front().offset, taps.back().offset);
    if (count > 1) spacing = std::abs(taps[1].offset - taps[0].offset);
  }
  int64_t place(const Tap& tap) const { return (tap.offset - first) / spacing; }
  // The taps that lead from one of the source positions [low, high] into [0, size).
  Span reaching(int64_t low, int64_t high, int64_t size) const {
    const int64_t begin = high + first >= 0 ? 0 : ceil_div(-high - first, spacing);
    const int64_t end = low + first >= size ? 0 : (size - 1 - low - first) / spacing + 1;
    return {begin, std::max(begin, std::min(count, end))};
  }
};

// One axis of a box of the destination, and of the band under it.
struct LaneAxis {
  int64_t extent;  // destination pixels of a box, a multiple of phase_step
  int64_t size, source_size, phase_step, step;
  int64_t first, last;  // least and greatest offset

  int64_t boxes() const { return ceil_div(size, extent); }
  int64_t count(int64_t begin) const { return std::min(extent, size - begin); }
  void cut(int64_t parts) { extent = round_up(ceil_div(size, parts), phase_step); }
  // Source positions under the destination pixels [begin, begin + pixels), before any tap.
  Span positions(int64_t begin, int64_t pixels) const {
    const int64_t low = begin / phase_step;
    return {low * step, (low + ceil_div(pixels, phase_step) - 1) * step};
  }
};

template <class S>
struct LanePlan {
  using T = Compute<S>;
  static constexpr int64_t L = kLanes<T>;
  const Phases<S>& phases;
  const int64_t kernel_taps;     // some of which no destination pixel may use
  std::vector<TapAxis> taps[2];  // of each phase
  LaneAxis rows, columns;
  int64_t channels, per_group, slots, taps_in_all = 0;
  int64_t lanes = L;         // of a block, but for the last
  bool two_vectors = false;  // which a block in place finds its sources in
  int64_t blocks, blocks_per_task = 1;
  bool in_place = false;  // no band: the lanes lie side by side in the images themselves
  bool possible = false;

  LanePlan(const Phases<S>& phases_, const int64_t kernel[2]);

  const Gather<S>& any() const { return phases.list[0]; }
  LaneBlock<T> block(int64_t index) const {
    int64_t first = index * lanes, end = channels;
    if (in_place && from() == LaneSource::one) {
      const int64_t parts = ceil_div(per_group, L), group = index / parts;
      first = group * per_group + index % parts * lanes, end = (group + 1) * per_group;
    } else if (in_place && from() < LaneSource::few) {
      first = std::min(first, channels - L);  // a whole one, which repeats its neighbour's channels
    }
    return LaneBlock<T>(first, std::min(lanes, end - first), per_group, slots);
  }
  int64_t all_sources() const { return any().groups * slots; }
  LaneSource from() const {  // of a layer in place; each block may find its sources in one vector
    if (channels < L || slots > 1 || per_group > 2)
      return 2 * per_group >= L ? LaneSource::one : LaneSource::pair;
    return per_group == 1 ? LaneSource::straight : LaneSource::twice;
  }
  int64_t band_rows(int64_t pixels) const {
    const int64_t reach = rows.positions(0, pixels).end + rows.last - rows.first + 1;
    return std::min(rows.source_size, reach);
  }
  // Columns outside the image are in the band, but for taps that only meet such columns.
  int64_t band_columns(int64_t pixels) const {
    const int64_t last = columns.positions(0, pixels).end;
    return std::min(last + columns.last - columns.first + 1, 2 * last + columns.source_size);
  }
  int64_t band_elements() const {
    if (in_place) return 0;
    return blocks_per_task * slots * band_rows(rows.extent) * band_columns(columns.extent) * L;
  }
  int64_t panel_elements() const { return slots * taps_in_all * L; }  // of one block
  int64_t kernel_elements() const { return slots * kernel_taps * L; }
  int64_t box_pixels() const { return rows.extent * columns.extent; }
  // K where a phase's K×K windows overlap as conv2d_depthwise_patch.h has them, else 0.
  int64_t patch_kernel(size_t p) const {
    const TapAxis &down = taps[0][p], &across = taps[1][p];
    const bool dense = from() == LaneSource::straight && rows.step == 1 && columns.step == 1 &&
                       down.count == across.count && down.spacing == 1 && across.spacing == 1;
    return dense && (down.count == 3 || down.count == 5) ? down.count : 0;
  }
  int64_t sum_elements() const { return in_place ? 0 : box_pixels() * L; }
  int64_t boxes() const { return any().batch * rows.boxes() * columns.boxes(); }
  int64_t tasks() const { return ceil_div(blocks, blocks_per_task) * boxes(); }
  int64_t scratch_bytes() const {
    return Scratch::bytes_for<T>(kernel_elements()) +
           Scratch::bytes_for<T>(blocks_per_task * panel_elements()) +
           Scratch::bytes_for<T>(band_elements()) +
           Scratch::bytes_for<T>(sum_elements()) +
           Scratch::bytes_for<T>(blocks_per_task * L);
  }

 private:
  bool few_channels() const;
  void plan_lanes();
  void plan_axis(LaneAxis& axis, int index);
  void plan_boxes();
  bool few_pay() const;
  bool plan_in_place();
};

template <class S>
LanePlan<S>::LanePlan(const Phases<S>& phases_, const int64_t kernel[2])
    : phases(phases_), kernel_taps(kernel[0] * kernel[1]) {
  per_group = any().destination.channels;
  channels = any().groups * per_group;
  slots = any().source.channels;
  blocks = ceil_div(channels, L);
  if (any().groups == 1) return;
  for (const Gather<S>& phase : phases.list) {
    for (int axis = 0; axis < 2; ++axis) taps[axis].emplace_back(phase.source.taps[axis]);
    taps_in_all += taps[0].back().count * taps[1].back().count;
  }
  if (kernel_elements() * static_cast<int64_t>(sizeof(T)) > kLanePanelBytes) return;
  plan_axis(rows, 0);
  plan_axis(columns, 1);
  if (plan_in_place()) return;
  lanes = L, blocks = ceil_div(channels, L);
  if (few_channels()) plan_boxes();
}

// Whether lanes of several groups pay: their sources must be brought to them slot by slot, while a
// band (conv2d_band.cpp) takes one group at a time, however few sums that is. Planes of very few
// channels leave most lanes empty; in place that is no matter, nor where a band takes many phases.
template <class S>
bool LanePlan<S>::few_channels() const {
  const int64_t groups_of_block =
      std::min(any().groups, L / per_group + (L % per_group == 0 ? 0 : 2));
  const int64_t sources = groups_of_block * slots;  // of a vector of lanes
  const int64_t most_pairs = sources <= L ? std::max(kMostPairs, L) : kMostPairs;
  return any().groups > 1 && 2 * per_group <= L &&
         (std::min(channels, all_sources()) >= L / 4 || phases.list.size() > 1 ||
          (kHasFewLanes<S> && slots * per_group <= 4 && any().source.stride[1] == 1 &&
           any().destination.stride[1] == 1)) &&
         sources <= kMostLaneSources * L &&
         slots * per_group <= most_pairs * phases.stride[0] * phases.stride[1];
}

template <class S>
void LanePlan<S>::plan_axis(LaneAxis& axis, int index) {
  const PatchSource<S>& source = any().source;
  axis = {0,
          phases.size[index],
          index == 0 ? source.height : source.width,
          phases.stride[index],
          source.step[index],
          INT64_MAX,
          INT64_MIN};
  for (const TapAxis& of_phase : taps[index]) {
    if (of_phase.count == 0) continue;
    axis.first = std::min(axis.first, of_phase.first);
    axis.last = std::max(axis.last, of_phase.first + (of_phase.count - 1) * of_phase.spacing);
  }
  if (axis.first > axis.last) axis.first = axis.last = 0;
  axis.cut(1);
}

// The lanes of a block: whole vectors if their sources are at most two, else whole groups.
template <class S>
void LanePlan<S>::plan_lanes() {
  if (from() < LaneSource::few) return;
  if (from() == LaneSource::one) {
    blocks = any().groups * ceil_div(per_group, L);
    lanes = ceil_div(per_group, ceil_div(per_group, L));
    return;
  }
  const int64_t whole = std::min(L / per_group, 2 * L / slots);  // groups
  auto cost = [&](int64_t width, int64_t groups) {
    return ceil_div(channels, width) *
           (std::min(groups, any().groups) * slots > L ? InPlaceCost::pair : InPlaceCost::few);
  };
  const int64_t spanned = L % per_group == 0 ? L / per_group : (L - 2) / per_group + 2;
  const bool fits = std::min(spanned, any().groups) * slots <= 2 * L;
  lanes = 0;
  int64_t groups = spanned;
  if (fits) lanes = std::min(L, channels);
  if (whole > 0 && (!fits || cost(whole * per_group, whole) < cost(L, spanned)))
    lanes = std::min(channels, whole * per_group), groups = whole;
  two_vectors = std::min(groups, any().groups) * slots > L;
  if (lanes > 0) blocks = ceil_div(channels, lanes);
}

// Whether bringing channels to their lanes for each product costs less than a band that has them
// there (LanesInPlace and LaneWorker), or than one group at a time (conv2d_band.cpp). Costs are of
// one image, since a batch must not decide.
template <class S>
bool LanePlan<S>::few_pay() const {
  const PatchSource<S>& source = any().source;
  double inside_image = 0, in_band = 0;  // products of a lane and a slot
  double lone = 0;                       // pixels that have a kernel's call to themselves
  for (const Gather<S>& phase : phases.list) {
    double met[2] = {0, 0}, edges[2];  // positions whose taps are not all inside
    for (int axis = 0; axis < 2; ++axis) {
      const int64_t grid = phase.source.grid[axis];
      Span whole{0, grid};
      for (const Tap& tap : phase.source.taps[axis]) {
        const Span span = inside(tap.offset, source.step[axis],
                                 axis == 0 ? source.height : source.width, grid);
        met[axis] += span.end - span.begin;
        whole = {std::max(whole.begin, span.begin), std::min(whole.end, span.end)};
      }
      edges[axis] = grid - std::max<int64_t>(0, whole.end - whole.begin);
    }
    inside_image += met[0] * met[1];
    in_band += met[0] * phase.source.taps[1].size() * phase.source.grid[1];
    lone += edges[0] * edges[1];
  }
  const double pixels = phases.size[0] * phases.size[1], read = source.height * source.width;
  const double weights = InPlaceCost::weight * L * slots * kernel_taps;
  const double product = from() == LaneSource::one ? InPlaceCost::one
                         : two_vectors             ? InPlaceCost::pair
                                                   : InPlaceCost::few;
  const double wait = InPlaceCost::wait * lone / pixels;
  const double cost = blocks * (slots * (product + wait) * inside_image +
                                InPlaceCost::pixel * pixels + weights);
  if (few_channels()) {
    const double spread = LaneBandCost::product * in_band + LaneBandCost::spread * read;
    return cost < ceil_div(channels, L) * (slots * spread + LaneBandCost::pixel * pixels +
                                           LaneBandCost::read * read + weights);
  }
  int64_t fold = 1;
  while (2 * fold * per_group <= L) fold *= 2;
  const int64_t pitch_bytes = source.stride[3] * source.step[1] * static_cast<int64_t>(sizeof(S));
  const bool copies = taps_in_all > 1 || pitch_bytes % 2048 == 0;  // else it reads in place too
  const double of_group = ceil_div(per_group, L) * slots * GroupCost::product * in_band / fold;
  return cost < any().groups * (of_group + GroupCost::pixel * pixels +
                                (copies ? GroupCost::read * read : 0));
}

// Depth-wise on channels last. Boxes are whole rows of all channels: memory is walked as it lies.
template <class S>
bool LanePlan<S>::plan_in_place() {
  if (!std::is_same_v<S, T> || any().source.stride[1] != 1 || any().destination.stride[1] != 1)
    return false;
  if (from() >= LaneSource::few && !kHasFewLanes<T>) return false;
  plan_lanes();
  in_place = lanes > 0 &&
             (from() < LaneSource::few ? few_channels() && per_group <= 2 : few_pay()) &&
             slots * taps_in_all <= kLaneChain &&
             blocks * panel_elements() * static_cast<int64_t>(sizeof(T)) <= kLanePanelBytes;
  // A column at an image's side is summed by itself, with the taps that reach the image from it.
  const int64_t span = columns.last - columns.first, covered = columns.size * columns.step;
  in_place = in_place && (span <= 2 || from() >= LaneSource::few ||
                          kColumnsOfSpan * span * columns.phase_step <= covered);
  if (!in_place) return false;
  blocks_per_task = blocks;
  const int64_t row_bytes = columns.size * channels * static_cast<int64_t>(sizeof(T));
  rows.cut(1);
  while (rows.extent > rows.phase_step &&
         (rows.extent * row_bytes > kLaneBandBytes || tasks() < 2 * thread_count()))
    rows.cut(2 * rows.boxes());
  return possible = scratch_bytes() <= kScratchLimit;
}

template <class S>
void LanePlan<S>::plan_boxes() {
  const int64_t element = sizeof(T), least_rows = rows.phase_step;
  auto bytes = [&](int64_t r) {
    const int64_t band = blocks_per_task * slots * band_rows(r) * band_columns(columns.extent);
    return (band + r * columns.extent) * L * element;
  };
  // With channels side by side, what several vectors of lanes read and write is one run.
  if (any().source.stride[1] == 1 || any().destination.stride[1] == 1) {
    const int64_t panel_bytes = std::max<int64_t>(1, panel_elements()) * element;
    const int64_t most =
        std::min(kMostLaneBlocks, std::max<int64_t>(1, kLanePanelBytes / panel_bytes));
    blocks_per_task = ceil_div(blocks, ceil_div(blocks, most));
    while (blocks_per_task > 1 && bytes(4 * least_rows) > kMostLaneBandBytes)
      blocks_per_task = ceil_div(blocks_per_task, 2);
  }
  const int64_t narrowest = 2 * LaneTile<T>::pixels * columns.phase_step;
  for (int64_t parts = 2; bytes(4 * least_rows) > kMostLaneBandBytes && columns.extent > narrowest;
       ++parts)
    columns.cut(parts);
  if (bytes(least_rows) > kMostLaneBandBytes) return;
  // Rows enough that few of the band are packed a second time for the next box.
  const int64_t wanted = kRowsOfSpan * (rows.last - rows.first) * rows.phase_step / rows.step;
  int64_t r = least_rows;
  auto room = [&] { return r < wanted ? kMostLaneBandBytes : kLaneBandBytes; };
  while (r < rows.size && bytes(r + least_rows) <= room()) r += least_rows;
  rows.cut(ceil_div(rows.size, r));
  while (tasks() < 2 * thread_count() && rows.extent > 4 * least_rows) rows.cut(2 * rows.boxes());
  while (tasks() < 2 * thread_count() && blocks_per_task > 1)
    blocks_per_task = ceil_div(blocks_per_task, 2);
  possible = scratch_bytes() <= kScratchLimit;
}

}  // namespace pyvit
