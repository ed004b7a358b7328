// Convolution (forward, or the phases of an input gradient) of groups with few channels: depth-wise
// layers, their multipliers, ResNeXt's groups of four.
//
// A vector's lanes are destination channels of several groups, and each lane meets the source
// channels of its own group, one slot after the other. A task owns such a vector and a box of the
// destination. It copies the source's part under the box into a band that has the slots in their
// lanes (conv2d_depthwise_band.h) and multiplies windows of it (conv2d_depthwise_kernel.h). The
// memory layouts of source and destination matter to the copies alone. With channels last nothing
// is copied where bringing them to their lanes for each product costs less
// (conv2d_depthwise_in_place.h), nor for 3×3 layers on planar images, or of few channels side by
// side (conv2d_depthwise_planes.h).
//
// Rows outside the image are skipped, columns outside are zeros in the band. Sums run over (slot,
// row tap, column tap) in chains whose length depends on the kernel and the image alone.
#include "conv2d_depthwise.h"

#include <algorithm>
#include <vector>

#include "conv2d_depthwise_in_place.h"
#include "conv2d_depthwise_plan.h"
#include "conv2d_depthwise_planes.h"
#include "conv2d_depthwise_weights.h"

namespace pyvit {
namespace {

// What one thread needs for its tasks.
template <class S>
class LaneWorker {
  using T = Compute<S>;
  static constexpr int64_t L = kLanes<T>;

 public:
  LaneWorker(const LanePlan<S>& plan, const int64_t kernel[2])
      : plan_(plan),
        weights_(plan, kernel),
        most_rows_(std::max<int64_t>(1, kLaneChain / kernel[1])) {
    Scratch scratch(plan.scratch_bytes());
    panel_ = scratch.take<T>(plan.blocks_per_task * plan.panel_elements());
    kernels_ = scratch.take<T>(plan.kernel_elements());
    band_ = scratch.take<T>(plan.band_elements());
    sums_ = scratch.take<T>(plan.sum_elements());
    bias_ = scratch.take<T>(plan.blocks_per_task * L);
  }

  void run(int64_t task) {
    const int64_t group = task / plan_.boxes(), box = task % plan_.boxes();
    if (group != group_) enter(group);
    const LaneAxis &down = plan_.rows, &across = plan_.columns;
    const int64_t column = box % across.boxes() * across.extent;
    const int64_t row = box / across.boxes() % down.boxes() * down.extent;
    const bool same_columns = column == box_.column;
    box_ = {box / across.boxes() / down.boxes(), row, down.count(row), column,
            across.count(column)};
    if (!same_columns) enter_columns();
    pack();
    for (block_ = 0; block_ < static_cast<int64_t>(blocks_.size()); ++block_) {
      for (size_t p = 0; p < plan_.phases.list.size(); ++p) multiply(p);
      if (!direct()) finish();
    }
  }

 private:
  void enter(int64_t group) {
    group_ = group;
    const int64_t first = group * plan_.blocks_per_task;
    const int64_t last = std::min(plan_.blocks, first + plan_.blocks_per_task);
    blocks_.clear();
    std::fill(bias_, bias_ + plan_.blocks_per_task * L, T(0));
    for (int64_t b = first; b < last; ++b) {
      blocks_.push_back(plan_.block(b));
      const LaneBlock<T>& block = blocks_.back();
      if (plan_.any().bias != nullptr)
        widen_run(bias_ + (b - first) * L, plan_.any().bias + block.first, block.count);
      weights_.pack(panel_ + (b - first) * plan_.panel_elements(), kernels_, block);
    }
  }

  // Whether sums go straight to the destination.
  bool direct() const {
    return std::is_same_v<S, T> && plan_.any().destination.stride[1] == 1 &&
           blocks_[block_].count == L;
  }

  // Runs of a box's columns: what each reads and which taps reach the image from it.
  struct Segment {
    int64_t at, count;
    int64_t window;  // of its first tap from the band's row
    Span taps;
  };

  void enter_columns() {
    const LaneAxis& across = plan_.columns;
    const Span positions = across.positions(box_.column, box_.columns);
    // Neither end needs columns that only taps beside the image would meet.
    const int64_t spread = positions.end - positions.begin;
    first_column_ = std::max(positions.begin + across.first, -spread);
    const int64_t end = std::min(positions.end + across.last + 1, across.source_size + spread);
    band_columns_ = std::max<int64_t>(1, end - first_column_);
    const int64_t phases_across = std::min(across.phase_step, across.size);
    segments_.resize(phases_across);
    for (int64_t p = 0; p < phases_across; ++p) {
      const TapAxis& taps = plan_.taps[1][p];
      const int64_t columns = ceil_div(box_.columns - p, across.phase_step);
      const int64_t parts = ceil_div(columns, LaneTile<T>::pixels);
      segments_[p].clear();
      for (int64_t part = 0, at = 0; part < parts; ++part) {
        const int64_t count = (columns - at) / (parts - part);
        const int64_t w = positions.begin + at * across.step;
        const Span reaching =
            taps.reaching(w, w + (count - 1) * across.step, across.source_size);
        const int64_t window = w + taps.first + reaching.begin * taps.spacing - first_column_;
        segments_[p].push_back({at, count, window * L, reaching});
        at += count;
      }
    }
  }

  // The band of the present box: its rows inside the image, its columns with zeros around them.
  void pack() {
    const PatchSource<S>& source = plan_.any().source;
    const LaneAxis& down = plan_.rows;
    const Span rows = down.positions(box_.row, box_.rows);
    first_row_ = std::max<int64_t>(0, rows.begin + down.first);
    const int64_t row_count = std::min(source.height, rows.end + down.last + 1) - first_row_;
    const int64_t left = std::max<int64_t>(0, -first_column_);
    const int64_t right = std::min(band_columns_, source.width - first_column_);
    row_stride_ = band_columns_ * L;
    slot_stride_ = std::max<int64_t>(0, row_count) * row_stride_;
    block_stride_ = plan_.slots * slot_stride_;
    T* const end = band_ + blocks_.size() * block_stride_;
    if (left > 0 || right < band_columns_) {
      for (T* row = band_; row < end; row += row_stride_) {
        std::fill(row, row + std::min(left, band_columns_) * L, T(0));
        if (right < band_columns_)
          std::fill(row + std::max<int64_t>(0, right) * L, row + row_stride_, T(0));
      }
    }
    if (right <= left || row_count <= 0) return;
    const LaneBox box{box_.image, first_row_, row_count, first_column_ + left, right - left};
    const LaneBand<T> band{band_ + left * L, block_stride_, slot_stride_, row_stride_};
    if (source.stride[1] == 1)
      return pack_lanes_last(band, source, blocks_.data(), blocks_.size(), box);
    for (size_t b = 0; b < blocks_.size(); ++b)
      pack_lanes_planar({band.data + b * block_stride_, 0, slot_stride_, row_stride_}, source,
                        blocks_[b], box);
  }

  void multiply(size_t p) {
    const Gather<S>& phase = plan_.phases.list[p];
    const LaneAxis &down = plan_.rows, &across = plan_.columns;
    const TapAxis &tap_rows = plan_.taps[0][p], &tap_columns = plan_.taps[1][p];
    const int64_t phases_across = segments_.size();
    const int64_t residue[2] = {static_cast<int64_t>(p) / phases_across,
                                static_cast<int64_t>(p) % phases_across};
    const int64_t rows = ceil_div(box_.rows - residue[0], down.phase_step);
    typename LaneTile<T>::Arguments tile;
    tile.pitch = across.step * L;
    tile.slot_stride = slot_stride_;
    tile.row_stride = tap_rows.spacing * row_stride_;
    tile.tap_stride = tap_columns.spacing * L;
    tile.weight_row_stride = tap_columns.count * L;
    tile.weight_slot_stride = tap_rows.count * tile.weight_row_stride;
    T* corner;
    int64_t row_pitch;
    if (direct()) {
      const Destination<S>& d = phase.destination;
      corner = reinterpret_cast<T*>(d.data) + box_.image * d.stride[0] + blocks_[block_].first +
               box_.row / down.phase_step * d.stride[2] +
               box_.column / across.phase_step * d.stride[3];
      row_pitch = d.stride[2];
      tile.c_pitch = d.stride[3];
    } else {
      corner = sums_ + (residue[0] * box_.columns + residue[1]) * L;
      row_pitch = down.phase_step * box_.columns * L;
      tile.c_pitch = across.phase_step * L;
    }
    const bool fetches = direct();  // pixels are far apart in the destination
    const T* band = band_ + block_ * block_stride_;
    const T* weights = panel_ + block_ * plan_.panel_elements() + weights_.phase(p);
    int64_t h = down.positions(box_.row, 1).begin;
    for (int64_t r = 0; r < rows; ++r, h += down.step, corner += row_pitch) {
      const Span i = tap_rows.reaching(h, h, down.source_size);
      const int64_t row = h + tap_rows.first + i.begin * tap_rows.spacing - first_row_;
      for (const Segment& segment : segments_[residue[1]]) {
        tile.taps = segment.taps.end - segment.taps.begin;
        tile.a = band + row * row_stride_ + segment.window;
        tile.weights = weights + i.begin * tile.weight_row_stride + segment.taps.begin * L;
        tile.c = corner + segment.at * tile.c_pitch;
        if (fetches)
          for (int64_t q = segment.count; q < 2 * segment.count; ++q)
            __builtin_prefetch(tile.c + q * tile.c_pitch, 1);
        sum_chains(segment.count, i.end - i.begin, tile);
      }
    }
  }

  void sum_chains(int64_t pixels, int64_t rows, typename LaneTile<T>::Arguments& tile) const {
    tile.base = bias_ + block_ * L;
    tile.base_pitch = 0;
    if (rows * plan_.slots <= most_rows_) {
      tile.slots = plan_.slots, tile.rows = rows;
      return run_lane_kernel<T>(pixels, tile);
    }
    const T *a = tile.a, *weights = tile.weights;
    const int64_t row_chain = std::min(rows, most_rows_);
    const int64_t slot_chain = row_chain < rows ? 1 : most_rows_ / row_chain;
    for (int64_t s = 0; s < plan_.slots; s += slot_chain) {
      tile.slots = std::min(slot_chain, plan_.slots - s);
      for (int64_t i = 0; i < rows; i += row_chain) {
        tile.rows = std::min(row_chain, rows - i);
        tile.a = a + s * tile.slot_stride + i * tile.row_stride;
        tile.weights = weights + s * tile.weight_slot_stride + i * tile.weight_row_stride;
        run_lane_kernel<T>(pixels, tile);
        tile.base = tile.c;
        tile.base_pitch = tile.c_pitch;
      }
    }
  }

  // Finished sums of the box to the destination.
  void finish() const {
    const LaneBlock<T>& block = blocks_[block_];
    const Destination<S>& phase = plan_.any().destination;
    const int64_t row_stride = phase.stride[2] / plan_.rows.phase_step;
    const int64_t column_stride = phase.stride[3] / plan_.columns.phase_step;
    S* out = phase.data + box_.image * phase.stride[0] + block.first * phase.stride[1] +
             box_.row * row_stride + box_.column * column_stride;
    int64_t rows = box_.rows, columns = box_.columns;
    if (row_stride == columns * column_stride) columns *= rows, rows = 1;
    const T* from = sums_;
    for (int64_t r = 0; r < rows; ++r, out += row_stride, from += columns * L) {
      if (phase.stride[1] == 1) {
        for (int64_t w = 0; w < columns; ++w)
          narrow_run(out + w * column_stride, from + w * L, block.count);
      } else {
        store_lanes_planar(out, phase.stride[1], column_stride, from, columns, block.count);
      }
    }
  }

  const LanePlan<S>& plan_;
  const LaneWeights<S> weights_;
  const int64_t most_rows_;  // of the kernel in one chain
  T *panel_, *kernels_, *band_, *sums_, *bias_;
  int64_t group_ = -1, block_ = 0;
  std::vector<LaneBlock<T>> blocks_;
  std::vector<std::vector<Segment>> segments_;  // of each column residue
  LaneBox box_{0, 0, 0, -1, 0};                 // of the destination
  int64_t first_row_ = 0, first_column_ = 0, band_columns_ = 0;  // of the band
  int64_t row_stride_ = 0, slot_stride_ = 0, block_stride_ = 0;
};

}  // namespace

template <class Plan, class Make>
void run_tasks(const Plan& plan, const Make& make_worker) {
  parallel_ranges(plan.tasks(), [&](int64_t begin, int64_t end) {
    auto worker = make_worker();
    for (int64_t task = begin; task < end; ++task) worker.run(task);
  });
}

template <class S>
bool conv2d_depthwise(const Phases<S>& phases, const int64_t kernel[2]) {
#if defined(PYVIT_HAS_LANE_MASKS)
  if constexpr (std::is_same_v<S, float>) {
    const DepthwisePlan planes(phases);
    if (planes.possible) {
      run_tasks(planes, [&] { return DepthwiseWorker(planes); });
      return true;
    }
  }
#endif
  const LanePlan<S> plan(phases, kernel);
  if (!plan.possible) return false;
  if constexpr (std::is_same_v<S, Compute<S>>) {
    if (plan.in_place) {
      run_tasks(plan, [&] { return LanesInPlace<S>(plan, kernel); });
      return true;
    }
  }
  run_tasks(plan, [&] { return LaneWorker<S>(plan, kernel); });
  return true;
}

template bool conv2d_depthwise(const Phases<double>&, const int64_t[2]);
template bool conv2d_depthwise(const Phases<float>&, const int64_t[2]);
template bool conv2d_depthwise(const Phases<bfloat16>&, const int64_t[2]);
template bool conv2d_depthwise(const Phases<float16>&, const int64_t[2]);

}  // namespace pyvit
