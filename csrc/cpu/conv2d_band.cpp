// Convolution (forward, or the phases of an input gradient) whose operand is never unfolded.
//
// A task owns a box of the destination: some rows and columns, up to a few hundred channels. It
// copies the source's part under it into a band (conv2d_band_copy.h), with zeros left and right,
// packs the weights as strips, and multiplies windows of the band with the strips (row_kernel.h).
// The memory layouts of source and destination matter to the copies alone; a 1×1 kernel reads the
// pixels of a channels-last source where they lie. Where channels are too few to fill a vector, its
// lanes take terms of the sum too (conv2d_band_fold.h).
//
// Under a dilated kernel, the box's rows are those that read the same residue of source rows, for
// which the kernel is dense; and taps that miss the image are left out, for whole rows and for runs
// of columns (conv2d_band_columns.h).
//
// Sums run over slices of source channels, and inside a slice over (row tap, column tap, channel)
// in chains short enough to round as little as PyTorch. Both depend on the layer and the size of
// its images only, so a result depends neither on the number of threads nor on the batch.
#include "conv2d_band.h"

#include <algorithm>

#include "conv2d_band_copy.h"
#include "conv2d_band_plan.h"
#include "conv2d_band_weights.h"
#include "conv2d_band_windows.h"

namespace pyvit {
namespace {

// What one thread needs for its tasks.
template <class S>
class Worker {
  using T = Compute<S>;
  static constexpr int64_t L = kLanes<T>;
  static constexpr int64_t strip = RowTile<T>::strip;

 public:
  Worker(const BandPlan<S>& plan, const int64_t kernel[2])
      : plan_(plan),
        kernel_columns_(kernel[1]),
        phases_(plan.phases.list),
        source_(phases_[0].source),
        places_(kernel[0] * kernel[1], TapPlace{-1, 0}) {
    source_.stride[2] *= plan.views;
    Scratch scratch(plan.scratch_bytes());
    panel_ = scratch.take<T>(plan.panel_elements());
    unfolded_ = scratch.take<T>(plan.unfolded_elements());
    band_ = scratch.take<T>(plan.band_elements());
    sums_ = scratch.take<T>(plan.sum_elements());
    bias_ = scratch.take<T>(plan.bias_elements());
    for (size_t p = 0; p < phases_.size(); ++p)
      add_tap_places(places_, p, phases_[p].source.taps, kernel[1]);
    windows_.resize(phases_.size());
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
  struct Box {
    int64_t image, view, row, column, rows, columns;
  };
  // Of the rows of its view; the last one may have none.
  Box box_of(int64_t index) const {
    const int64_t across = plan_.columns.boxes(), down = plan_.rows.boxes();
    const int64_t row = index / across % down * plan_.rows.extent;
    const int64_t column = index % across * plan_.columns.extent;
    const int64_t view = index / across / down % plan_.views;
    return {index / across / down / plan_.views, view, row, column,
            std::min(plan_.rows.extent, plan_.view(view).size - row),
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
    std::fill(bias_, bias_ + plan_.bias_elements(), T(0));
    if (bias == nullptr) return;
    for (int64_t at = 0; at < plan_.bias_elements(); at += plan_.padded_width())
      widen_run(bias_ + at, bias + first_channel_, width_);
  }

  int64_t vectors(int64_t from) const { return std::min(strip, round_up(width_ - from, L)) / L; }

  void pack_panel() {
    T* to = plan_.fold == 1 ? panel_ : unfolded_;
    std::vector<WeightBlock<T>> blocks;
    for (const Gather<S>& phase : phases_) {
      const auto& taps = phase.source.taps;
      const int64_t rows = taps[0].size() * taps[1].size() * channel_count_;
      blocks.push_back(
          {{to, rows, width_, L / plan_.fold}, first_channel_, channel_, channel_count_});
      to += rows * round_up(width_, L / plan_.fold);
    }
    pack_weights<T>(blocks, phases_, places_, kernel_columns_);
    if (plan_.fold > 1) fold_panel();
    packed_ = true;
  }

  void fold_panel() const {
    T* to = panel_;
    const T* from = unfolded_;
    for (const Gather<S>& phase : phases_) {
      const auto& taps = phase.source.taps;
      const auto runs = tap_runs(taps[1], plan_.pitch(channel_count_), channel_count_);
      for (size_t i = 0; i < taps[0].size(); ++i) {
        for (const TapRun& run : runs) {
          fold_kernels<T>(plan_.fold).weights(to, from, run.length);
          from += run.length * plan_.padded_width();
          to += ceil_div(run.length, plan_.fold) * L;
        }
      }
    }
  }

  T* sums_of(int64_t slot) const {
    return sums_ + slot * plan_.box_pixels() * plan_.padded_width();
  }

  // Copies the rows of the source under a box; returns the first one.
  int64_t pack(const Box& box, const RowView& view, int64_t pitch) {
    const BandAxis &down = plan_.rows, &across = plan_.columns;
    PatchSource<S>& source = source_;
    source.data = phases_[0].source.data + view.first_row * phases_[0].source.stride[2];
    source.height = view.height;
    const int64_t reached = box.row / down.phase_step * down.step + view.first_offset;
    const int64_t end = reached + (ceil_div(box.rows, down.phase_step) - 1) * down.step +
                        down.span + 1;
    const int64_t begin = std::max<int64_t>(0, reached);
    const int64_t columns = across.band(across.extent), rows = std::min(end, view.height) - begin;
    const auto read = rows_read(box, begin - reached, rows);
    for (int64_t r = 0, run; r < rows; r += run) {
      for (run = 1; r + run < rows && read[r + run] == read[r];) ++run;
      if (read[r])
        pack_band(band_ + r * columns * pitch, pitch, source,
                  {box.image, begin + r, across.first(box.column), channel_, run, columns,
                   channel_count_});
    }
    return begin;
  }

  // The first pixel of a view's rows, where it lies.
  const T* source_of(int64_t image, const RowView& view) const {
    const PatchSource<S>& source = phases_[0].source;
    return reinterpret_cast<const T*>(source.data + image * source.stride[0] +
                                      channel_ * source.stride[1] +
                                      view.first_row * source.stride[2]);
  }

  // Which of `rows` rows a tap reads from the box; row 0 lies `first` behind the first one reached.
  std::vector<char> rows_read(const Box& box, int64_t first, int64_t rows) const {
    const auto& taps = phases_[0].source.taps[0];
    const bool gaps = phases_.size() == 1 && plan_.rows.span >= static_cast<int64_t>(taps.size());
    std::vector<char> read(std::max<int64_t>(0, rows), !gaps);
    for (int64_t r = 0; gaps && r < box.rows; ++r) {
      for (const Tap& tap : taps) {
        const int64_t at = r * plan_.rows.step + tap.offset - first;
        if (at >= 0 && at < rows) read[at] = true;
      }
    }
    return read;
  }

  void multiply(int64_t index, int64_t slot, bool accumulate) {
    const Box box = box_of(index);
    if (box.rows <= 0) return;
    const BandAxis &down = plan_.rows, &across = plan_.columns;
    const RowView view = plan_.view(box.view);
    const bool in_place = plan_.in_place;
    const int64_t pitch = in_place ? source_.stride[3] : plan_.pitch(channel_count_);
    const int64_t first_row = in_place ? 0 : pack(box, view, pitch);
    const int64_t first_column = in_place ? 0 : across.first(box.column);
    const T* band = in_place ? source_of(box.image, view) : band_;
    const int64_t line = in_place ? source_.stride[2] : across.band(across.extent) * pitch;
    const BandLayout layout{line, pitch, channel_count_, plan_.fold};
    const T* panel = panel_;
    for (size_t p = 0; p < phases_.size(); ++p) {
      const Gather<S>& phase = phases_[p];
      const int64_t residue[2] = {static_cast<int64_t>(p) / phases_across(),
                                  static_cast<int64_t>(p) % phases_across()};
      const int64_t rows = ceil_div(box.rows - residue[0], down.phase_step);
      const int64_t row = box.row / down.phase_step, column = box.column / across.phase_step;
      const int64_t columns = ceil_div(box.columns - residue[1], across.phase_step);
      BandWindows& windows = windows_[p];
      windows.set_layout(layout);
      const int64_t length = plan_.panel_rows(phase, channel_count_);
      typename RowTile<T>::Arguments tile;
      tile.pitch = across.step * pitch;
      T* corner;  // of the sums, or of the destination itself
      int64_t row_pitch;
      if (plan_.direct) {
        const Destination<S>& d = phase.destination;
        corner = reinterpret_cast<T*>(d.data) + box.image * d.stride[0] + first_channel_ +
                 (row * plan_.views + box.view) * d.stride[2] + column * d.stride[3];
        row_pitch = plan_.views * d.stride[2];
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
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t h = (row + r) * down.step + view.first_offset;
          const TapRange of_rows = taps_inside(phase.source.taps[0], h, view.height);
          for (const ColumnSegment& segment : plan_.segments[p]) {
            const int64_t begin = std::max(segment.begin, column);
            const int64_t end = std::min(segment.end, column + columns);
            if (begin >= end) continue;
            const T* first = band;
            if (of_rows.size() > 0 && segment.taps.size() > 0)
              first += (h + phase.source.taps[0][of_rows.first].offset - first_row) * layout.line +
                       (begin * across.step + phase.source.taps[1][segment.taps.first].offset -
                        first_column) * pitch;
            multiply_row(tile, windows, windows.window(phase.source.taps, of_rows, segment.taps),
                         first, corner + r * row_pitch + (begin - column) * tile.c_pitch + from,
                         end - begin, from, accumulate);
          }
        }
      }
    }
  }

  void multiply_row(typename RowTile<T>::Arguments& tile, const BandWindows& windows,
                    const BandWindows::Window& window, const T* first, T* to, int64_t columns,
                    int64_t from, bool accumulate) const {
    const int64_t parts = ceil_div(columns, plan_.tile_pixels(vectors(from)));
    for (int64_t part = 0, at = 0; part < parts; ++part) {
      const int64_t count = (columns - at) / (parts - part);
      tile.a = first + at * tile.pitch;
      tile.c = to + at * tile.c_pitch;
      tile.base = accumulate ? tile.c : bias_ + from;
      tile.base_pitch = accumulate ? tile.c_pitch : 0;
      for (int64_t c = 0; c < window.chain_count; ++c) {
        const BandWindows::Chain& chain = windows.chains[window.first_chain + c];
        tile.runs = windows.runs.data() + chain.first_run;
        tile.run_count = chain.run_count;
        if (plan_.fold == 1) {
          run_row_kernel<T>(count, vectors(from), tile);
        } else {
          fold_kernels<T>(plan_.fold).rows[count - 1](tile);
        }
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
    if (box.rows <= 0) return;
    const Destination<S>& phase = phases_[0].destination;
    const int64_t row_stride = plan_.views * phase.stride[2] / plan_.rows.phase_step;
    const int64_t column_stride = phase.stride[3] / plan_.columns.phase_step;
    S* out = phase.data + box.image * phase.stride[0] + first_channel_ * phase.stride[1] +
             box.view * phase.stride[2] + box.row * row_stride + box.column * column_stride;
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

  const BandPlan<S>& plan_;
  const int64_t kernel_columns_;
  std::vector<Gather<S>> phases_;  // of the present group, with taps in order of their offsets
  PatchSource<S> source_;          // the rows of the present box's view
  std::vector<TapPlace> places_;
  std::vector<BandWindows> windows_;  // of each phase
  T *panel_, *unfolded_, *band_, *sums_, *bias_;
  int64_t group_ = -1, block_ = -1, first_channel_ = 0, width_ = 0;
  int64_t channel_ = 0, channel_count_ = 0;
  bool packed_ = false;
};

}  // namespace

template <class S>
bool conv2d_band(const Phases<S>& phases, const int64_t kernel[2]) {
  const BandPlan<S> plan(phases);
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
