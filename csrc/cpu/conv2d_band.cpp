// Convolution (forward, or the phases of an input gradient) whose operand is never unfolded.
//
// A task owns a box of the destination: some rows and columns, up to a few hundred channels. It
// copies the source's part under it into a band (band.h), zeros around the image included, packs
// the weights as strips, and multiplies windows of the band with the strips (row_kernel.h). The
// memory layouts of source and destination matter to the copies alone.
//
// Sums run over slices of source channels, and inside a slice over (row tap, column tap, channel)
// in chains short enough to round as little as PyTorch. Both depend on the convolution's channels
// and kernel only, so a result depends neither on the number of threads nor on the batch.
#include "conv2d_band.h"

#include <algorithm>
#include <memory>

#include "band.h"
#include "parallel.h"
#include "row_kernel.h"
#include "weight_strips.h"

namespace pyvit {
namespace {

constexpr int64_t kChainLength = 384;         // longest sum in registers
constexpr int64_t kPanelLength = 1152;        // longest operand that is packed whole
constexpr int64_t kSliceLength = 640;         // a part of one that is not, about
constexpr int64_t kPanelBytes = 384 << 10;    // packed weights of one task
constexpr int64_t kBandBytes = 128 << 10;
constexpr int64_t kMostBandBytes = 512 << 10;
constexpr int64_t kSumBytes = 448 << 10;      // sums waiting for their next slice

// One axis of a box of destination pixels, and of the band under it.
struct AxisPlan {
  int64_t extent;     // destination pixels of a box, a multiple of phase_step
  int64_t size;       // of the destination
  int64_t phase_step, step, first_offset, span;

  int64_t band(int64_t pixels) const {
    return (ceil_div(pixels, phase_step) - 1) * step + span + 1;
  }
  int64_t boxes() const { return ceil_div(size, extent); }
  int64_t count(int64_t begin) const { return std::min(extent, size - begin); }
  void cut(int64_t parts) { extent = round_up(ceil_div(size, parts), phase_step); }
};

template <class S>
struct Plan {
  using T = Compute<S>;
  const Phases<S>& phases;
  AxisPlan rows, columns;
  int64_t channels, slice, slices;  // source channels
  int64_t taps = 0;                 // of all phases together
  int64_t width, blocks;            // destination channels of a task
  int64_t boxes_per_task, boxes;
  bool direct;  // sums go straight to the destination
  bool possible = false;

  Plan(const Phases<S>& phases_);

  const Gather<S>& any() const { return phases.list[0]; }
  int64_t pitch(int64_t count) const {
    // Windows that lie a multiple of a page's half apart would share few cache lines.
    return only_column() && count % 128 == 0 ? count + 16 : count;
  }
  bool only_column() const { return columns.span == 0; }
  int64_t band_elements() const {
    return rows.band(rows.extent) * columns.band(columns.extent) * pitch(slice);
  }
  int64_t box_pixels() const { return rows.extent * columns.extent; }
  int64_t padded_width() const { return round_up(width, kLanes<T>); }
  int64_t sum_elements() const {
    return direct ? 0 : boxes_per_task * box_pixels() * padded_width();
  }
  int64_t tasks() const { return any().groups * blocks * ceil_div(boxes, boxes_per_task); }
  int64_t scratch_bytes() const {
    return Scratch::bytes_for<T>(taps * slice * padded_width()) +
           Scratch::bytes_for<T>(band_elements()) + Scratch::bytes_for<T>(sum_elements()) +
           Scratch::bytes_for<T>(padded_width());
  }

 private:
  void plan_axis(AxisPlan& axis, int index);
  void plan_slices(int64_t most_taps);
  void plan_boxes();
  void plan_tasks();
  void count_boxes() { boxes = any().batch * rows.boxes() * columns.boxes(); }
};

template <class S>
Plan<S>::Plan(const Phases<S>& phases_) : phases(phases_) {
  const Gather<S>& g = any();
  channels = g.source.channels;
  int64_t most_taps = 1;
  for (const Gather<S>& phase : phases.list) {
    const int64_t of_phase = phase.source.taps[0].size() * phase.source.taps[1].size();
    taps += of_phase;
    most_taps = std::max(most_taps, of_phase);
  }
  if (taps == 0) return;
  plan_axis(rows, 0);
  plan_axis(columns, 1);
  plan_slices(most_taps);
  // Fewer lanes or pixels than this would leave most of the kernel's registers idle. The columns of
  // a 1×1 layer may be pixels of the whole batch, and a batch must not change how an image is summed.
  const bool few_pixels = taps > 1 && columns.size < 4 * columns.phase_step;
  if (g.destination.channels < 3 * kLanes<T> / 4 || few_pixels) return;
  direct = std::is_same_v<S, T> && g.destination.stride[1] == 1 &&
           g.destination.channels % kLanes<T> == 0;
  const int64_t strip = RowTile<T>::strip, D = g.destination.channels;
  const int64_t row_bytes = taps * slice * static_cast<int64_t>(sizeof(T));
  width = std::max(strip, kPanelBytes / row_bytes / strip * strip);
  blocks = ceil_div(D, width);
  width = std::min(D, round_up(ceil_div(D, blocks), strip));
  plan_boxes();
  possible = scratch_bytes() <= kScratchLimit && rows.extent > 0;
  if (possible) plan_tasks();
}

template <class S>
void Plan<S>::plan_axis(AxisPlan& axis, int index) {
  int64_t least = INT64_MAX, most = INT64_MIN;
  for (const Gather<S>& phase : phases.list) {
    for (const Tap& tap : phase.source.taps[index]) {
      least = std::min(least, tap.offset);
      most = std::max(most, tap.offset);
    }
  }
  axis = {0, phases.size[index], phases.stride[index], any().source.step[index], least,
          most - least};
}

template <class S>
void Plan<S>::plan_slices(int64_t most_taps) {
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

// Boxes as large as band and sums may be, cut into equal parts.
template <class S>
void Plan<S>::plan_boxes() {
  const int64_t element = sizeof(T);
  const bool keeps_sums = !direct || slices > 1;
  auto fits = [&](int64_t r, int64_t c) {
    const int64_t band = rows.band(r) * columns.band(c) * pitch(slice) * element;
    const int64_t sums = r * c * padded_width() * element;
    return band <= kBandBytes && (!keeps_sums || sums <= kSumBytes);
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
void Plan<S>::plan_tasks() {
  const int64_t wanted = 2 * thread_count();
  auto cut_channels = [&] {
    while (tasks() < wanted && width > RowTile<T>::strip) {
      width = round_up(ceil_div(width, 2), RowTile<T>::strip);
      blocks = ceil_div(any().destination.channels, width);
    }
  };
  auto cut_axis = [&](AxisPlan& axis, int64_t least) {
    while (tasks() < wanted && axis.extent >= 2 * least) {
      axis.cut(2 * axis.boxes());
      count_boxes();
    }
  };
  // Threads with different pixels pack the same weights, with different channels the same pixels.
  const int64_t weights = taps * any().destination.channels;
  const bool many_weights = weights > any().batch * rows.size * columns.size;
  if (many_weights) cut_channels();
  cut_axis(rows, rows.phase_step);
  cut_axis(columns, 28 * columns.phase_step);
  if (!many_weights) cut_channels();
  if (slices == 1) return;  // a thread packs weights once and keeps them from task to task
  const int64_t bytes = box_pixels() * padded_width() * static_cast<int64_t>(sizeof(T));
  const int64_t parts = ceil_div(boxes, std::max<int64_t>(1, kSumBytes / bytes));
  boxes_per_task = ceil_div(boxes, parts);
  while (boxes_per_task > 1 && tasks() < wanted) boxes_per_task = ceil_div(boxes_per_task, 2);
}

// What one thread needs for its tasks.
template <class S>
class Worker {
  using T = Compute<S>;
  static constexpr int64_t L = kLanes<T>;
  static constexpr int64_t strip = RowTile<T>::strip;

 public:
  Worker(const Plan<S>& plan, const int64_t kernel[2])
      : plan_(plan), kernel_columns_(kernel[1]), phases_(plan.phases.list) {
    Scratch scratch(plan.scratch_bytes());
    panel_ = scratch.take<T>(plan.taps * plan.slice * plan.padded_width());
    band_ = scratch.take<T>(plan.band_elements());
    sums_ = scratch.take<T>(plan.sum_elements());
    bias_ = scratch.take<T>(plan.padded_width());
    for (Gather<S>& phase : phases_) {
      auto& taps = phase.source.taps;
      for (auto& axis : taps)
        std::sort(axis.begin(), axis.end(),
                  [](const Tap& a, const Tap& b) { return a.offset < b.offset; });
      places_.push_back(tap_places(taps, kernel[0], kernel[1]));
    }
  }

  void run(int64_t task) {
    const int64_t per_block = ceil_div(plan_.boxes, plan_.boxes_per_task);
    const int64_t block = task / per_block % plan_.blocks, g = task / per_block / plan_.blocks;
    enter(g, block);
    const int64_t first = task % per_block * plan_.boxes_per_task;
    const int64_t last = std::min(plan_.boxes, first + plan_.boxes_per_task);
    for (int64_t s = 0; s < plan_.slices; ++s) {
      channel_ = s * plan_.slice;
      channel_count_ = std::min(plan_.slice, plan_.channels - channel_);
      if (plan_.slices > 1 || !packed_) pack_panel();
      for (int64_t box = first; box < last; ++box) multiply(box, box - first, s > 0);
    }
    if (!plan_.direct)
      for (int64_t box = first; box < last; ++box) finish(box, box - first);
  }

 private:
  struct Chain {
    int64_t first_run, run_count;
  };
  struct Box {
    int64_t image, row, column, rows, columns;
  };
  Box box_of(int64_t index) const {
    const int64_t across = plan_.columns.boxes(), down = plan_.rows.boxes();
    const int64_t row = index / across % down * plan_.rows.extent;
    const int64_t column = index % across * plan_.columns.extent;
    return {index / across / down, row, column, plan_.rows.count(row),
            plan_.columns.count(column)};
  }

  void enter(int64_t g, int64_t block) {
    if (g == group_ && block == block_) return;
    group_ = g;
    block_ = block;
    packed_ = false;
    for (size_t p = 0; p < phases_.size(); ++p) {
      phases_[p].source.data = plan_.phases.list[p].group(g).source.data;
      phases_[p].destination.data = plan_.phases.list[p].group(g).destination.data;
      phases_[p].weights.data = plan_.phases.list[p].group(g).weights.data;
      phases_[p].bias = plan_.phases.list[p].group(g).bias;
    }
    first_channel_ = block * plan_.width;
    width_ = std::min(plan_.width, phases_[0].destination.channels - first_channel_);
    const S* bias = phases_[0].bias;
    std::fill(bias_, bias_ + plan_.padded_width(), T(0));
    if (bias != nullptr) widen_run(bias_, bias + first_channel_, width_);
  }

  int64_t vectors(int64_t from) const { return std::min(strip, round_up(width_ - from, L)) / L; }

  void pack_panel() {
    T* to = panel_;
    for (size_t p = 0; p < phases_.size(); ++p) {
      const auto& taps = phases_[p].source.taps;
      const int64_t rows = taps[0].size() * taps[1].size() * channel_count_;
      if (rows == 0) continue;
      pack_weights<T>({to, first_channel_, width_, channel_, channel_count_, rows},
                      phases_[p].weights, taps, places_[p], kernel_columns_);
      to += rows * round_up(width_, L);
    }
    packed_ = true;
  }

  // Destination rows of a phase whose windows meet the same rows of the image, and the chains of
  // their sums: tap rows outside the image are left out.
  struct RowGroup {
    int64_t begin, end, first_chain, chain_count;
  };

  // `first_row` is the source row that destination row 0 of the phase reads with offset 0.
  void group_rows(const Gather<S>& phase, int64_t rows, int64_t first_row, int64_t band_columns,
                  int64_t pitch) {
    const auto& taps = phase.source.taps[0];
    groups_.clear();
    chains_.clear();
    runs_.clear();
    int64_t begin = -1, end = -1;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t h = first_row + r * plan_.rows.step;
      auto inside = [&](const Tap& tap) {
        return h + tap.offset >= 0 && h + tap.offset < phase.source.height;
      };
      const int64_t first = std::find_if(taps.begin(), taps.end(), inside) - taps.begin();
      int64_t last = first;
      while (last < static_cast<int64_t>(taps.size()) && inside(taps[last])) ++last;
      if (groups_.empty() || first != begin || last != end) {
        begin = first, end = last;
        groups_.push_back({r, r, static_cast<int64_t>(chains_.size()), 0});
        add_chains(phase, begin, end, band_columns, pitch);
        groups_.back().chain_count = chains_.size() - groups_.back().first_chain;
      }
      groups_.back().end = r + 1;
    }
  }

  // Chains over the tap rows [begin, end) of a window, in the order of the weights.
  void add_chains(const Gather<S>& phase, int64_t begin, int64_t end, int64_t band_columns,
                  int64_t pitch) {
    const auto& across = phase.source.taps[1];
    const int64_t total = (end - begin) * across.size() * channel_count_;
    const int64_t longest = ceil_div(total, std::max<int64_t>(1, ceil_div(total, kChainLength)));
    chains_.push_back({static_cast<int64_t>(runs_.size()), 0});
    int64_t k = begin * across.size() * channel_count_, room = longest;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = (phase.source.taps[0][i].offset - plan_.rows.first_offset) * band_columns;
      for (size_t j = 0; j < across.size();) {
        const int64_t offset = (row + across[j].offset - plan_.columns.first_offset) * pitch;
        // Taps side by side make one run.
        int64_t left = 0;
        do {
          left += channel_count_, ++j;
        } while (pitch == channel_count_ && j < across.size() &&
                 across[j].offset == across[j - 1].offset + 1);
        for (int64_t done = 0; done < left;) {
          if (room == 0) {
            chains_.push_back({static_cast<int64_t>(runs_.size()), 0});
            room = longest;
          }
          const int64_t length = std::min(left - done, room);
          runs_.push_back({offset + done, length, k});
          ++chains_.back().run_count;
          done += length, k += length, room -= length;
        }
      }
    }
  }

  T* sums_of(int64_t slot) const {
    return sums_ + slot * plan_.box_pixels() * plan_.padded_width();
  }

  void multiply(int64_t index, int64_t slot, bool accumulate) {
    const Box box = box_of(index);
    const AxisPlan &down = plan_.rows, &across = plan_.columns;
    const int64_t pitch = plan_.pitch(channel_count_);
    const int64_t band_columns = across.band(box.columns);
    pack_band(band_, pitch, phases_[0].source,
              {box.image, box.row / down.phase_step * down.step + down.first_offset,
               box.column / across.phase_step * across.step + across.first_offset, channel_,
               down.band(box.rows), band_columns, channel_count_});
    const T* panel = panel_;
    for (size_t p = 0; p < phases_.size(); ++p) {
      const Gather<S>& phase = phases_[p];
      const int64_t residue[2] = {static_cast<int64_t>(p) / phases_across(),
                                  static_cast<int64_t>(p) % phases_across()};
      const int64_t rows = ceil_div(box.rows - residue[0], down.phase_step);
      const int64_t columns = ceil_div(box.columns - residue[1], across.phase_step);
      group_rows(phase, rows, box.row / down.phase_step * down.step, band_columns, pitch);
      const int64_t length = phase.source.taps[0].size() * phase.source.taps[1].size() *
                             channel_count_;
      typename RowTile<T>::Arguments tile;
      tile.pitch = across.step * pitch;
      T* corner;  // of the sums, or of the destination itself
      int64_t row_pitch;
      if (plan_.direct) {
        const Destination<S>& d = phase.destination;
        corner = reinterpret_cast<T*>(d.data) + box.image * d.stride[0] + first_channel_ +
                 box.row / down.phase_step * d.stride[2] +
                 box.column / across.phase_step * d.stride[3];
        row_pitch = d.stride[2];
        tile.c_pitch = d.stride[3];
      } else {
        const int64_t width = plan_.padded_width();
        corner = sums_of(slot) + (residue[0] * box.columns + residue[1]) * width;
        row_pitch = down.phase_step * box.columns * width;
        tile.c_pitch = across.phase_step * width;
      }
      for (int64_t from = 0; from < width_; from += strip) {
        tile.b = panel;
        panel += length * vectors(from) * L;
        for (const RowGroup& group : groups_)
          for (int64_t r = group.begin; r < group.end; ++r)
            multiply_row(tile, group, band_ + r * down.step * band_columns * pitch,
                         corner + r * row_pitch + from, columns, from, accumulate);
      }
    }
  }

  void multiply_row(typename RowTile<T>::Arguments& tile, const RowGroup& group, const T* windows,
                    T* to, int64_t columns, int64_t from, bool accumulate) const {
    const int64_t parts = ceil_div(columns, RowTile<T>::pixels);
    for (int64_t part = 0, at = 0; part < parts; ++part) {
      const int64_t count = (columns - at) / (parts - part);
      tile.a = windows + at * tile.pitch;
      tile.c = to + at * tile.c_pitch;
      tile.base = accumulate ? tile.c : bias_ + from;
      tile.base_pitch = accumulate ? tile.c_pitch : 0;
      for (int64_t c = 0; c < group.chain_count; ++c) {
        const Chain& chain = chains_[group.first_chain + c];
        tile.runs = runs_.data() + chain.first_run;
        tile.run_count = chain.run_count;
        run_row_kernel<T>(count, vectors(from), tile);
        tile.base = tile.c;
        tile.base_pitch = tile.c_pitch;
      }
      at += count;
    }
  }

  int64_t phases_across() const { return std::min(plan_.columns.phase_step, plan_.columns.size); }

  // Finished sums of a box to the destination.
  void finish(int64_t index, int64_t slot) const {
    Box box = box_of(index);
    const Destination<S>& phase = phases_[0].destination;
    const int64_t row_stride = phase.stride[2] / plan_.rows.phase_step;
    const int64_t column_stride = phase.stride[3] / plan_.columns.phase_step;
    S* out = phase.data + box.image * phase.stride[0] + first_channel_ * phase.stride[1] +
             box.row * row_stride + box.column * column_stride;
    if (row_stride == box.columns * column_stride) box.columns *= box.rows, box.rows = 1;
    const T* from = sums_of(slot);
    const int64_t pitch = plan_.padded_width();
    for (int64_t r = 0; r < box.rows; ++r, out += row_stride, from += box.columns * pitch) {
      if (phase.stride[1] == 1) {
        for (int64_t w = 0; w < box.columns; ++w)
          narrow_run(out + w * column_stride, from + w * pitch, width_);
      } else {
        store_planar(out, phase.stride[1], column_stride, from, pitch, box.columns);
      }
    }
  }

  void store_planar(S* out, int64_t channel_stride, int64_t column_stride, const T* from,
                    int64_t pitch, int64_t columns) const {
    if constexpr (std::is_same_v<S, T>) {
      if (column_stride == 1) {
        // Few channels at a time: each is a stream of its own to memory.
        for (int64_t c = 0; c < width_; c += L)
          transpose(out + c * channel_stride, channel_stride, from + c, pitch, 1, columns,
                    std::min(L, width_ - c));
        return;
      }
    }
    constexpr int64_t kColumns = 128;
    T block[L * kColumns];
    for (int64_t c0 = 0; c0 < width_; c0 += L) {
      const int64_t count = std::min(L, width_ - c0);
      for (int64_t w0 = 0; w0 < columns; w0 += kColumns) {
        const int64_t run = std::min(kColumns, columns - w0);
        transpose(block, kColumns, from + w0 * pitch + c0, pitch, 1, run, count);
        for (int64_t c = 0; c < count; ++c) {
          S* to = out + (c0 + c) * channel_stride + w0 * column_stride;
          if (column_stride == 1) {
            narrow_run(to, block + c * kColumns, run);
          } else {
            for (int64_t w = 0; w < run; ++w)
              to[w * column_stride] = narrow<S>(block[c * kColumns + w]);
          }
        }
      }
    }
  }

  const Plan<S>& plan_;
  const int64_t kernel_columns_;
  std::vector<Gather<S>> phases_;  // of the present group, with taps in order of their offsets
  std::vector<std::vector<int64_t>> places_;
  std::vector<BandRun> runs_;
  std::vector<Chain> chains_;
  std::vector<RowGroup> groups_;
  T *panel_, *band_, *sums_, *bias_;
  int64_t group_ = -1, block_ = -1, first_channel_ = 0, width_ = 0;
  int64_t channel_ = 0, channel_count_ = 0;
  bool packed_ = false;
};

}  // namespace

template <class S>
bool conv2d_band(const Phases<S>& phases, const int64_t kernel[2]) {
  const Plan<S> plan(phases);
  if (!plan.possible) return false;
  parallel_ranges(plan.tasks(), [&](int64_t begin, int64_t end) {
    Worker<S> worker(plan, kernel);
    for (int64_t task = begin; task < end; ++task) worker.run(task);
  });
  return true;
}

template bool conv2d_band(const Phases<double>&, const int64_t[2]);
template bool conv2d_band(const Phases<float>&, const int64_t[2]);
template bool conv2d_band(const Phases<bfloat16>&, const int64_t[2]);
template bool conv2d_band(const Phases<float16>&, const int64_t[2]);

}  // namespace pyvit
