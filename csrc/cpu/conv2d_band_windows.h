// Which runs of a band (conv2d_band_copy.h) the window of a destination pixel has, and in which
// chains their products are summed.
#pragma once

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "patches.h"
#include "row_kernel.h"

namespace pyvit {

// Taps of one axis, in order of their offsets: those from `first` to before `last`.
struct TapRange {
  int64_t first, last;
  int64_t size() const { return last - first; }
  bool operator==(const TapRange& other) const {
    return first == other.first && last == other.last;
  }
};

// The taps that meet an image of `size` rows from position `at` on.
inline TapRange taps_inside(const std::vector<Tap>& taps, int64_t at, int64_t size) {
  const auto count = static_cast<int64_t>(taps.size());
  int64_t first = 0, last = count;
  while (first < count && at + taps[first].offset < 0) ++first;
  while (last > first && at + taps[last - 1].offset >= size) --last;
  return first < last ? TapRange{first, last} : TapRange{0, 0};
}

// How a band lies: elements from one row, one column to the next, and channels of a pixel.
struct BandLayout {
  int64_t line, pitch, channels;
  int64_t fold;  // elements of a run that meet one row of the weights (conv2d_band_fold.h)
  bool operator==(const BandLayout& other) const {
    return line == other.line && pitch == other.pitch && channels == other.channels &&
           fold == other.fold;
  }
};

// Taps of one kernel row that lie side by side in the band: one run of memory.
struct TapRun {
  int64_t first_tap, length;  // elements
};
inline std::vector<TapRun> tap_runs(const std::vector<Tap>& across, int64_t pitch,
                                    int64_t channels) {
  std::vector<TapRun> runs;
  runs.reserve(across.size());
  for (size_t j = 0; j < across.size(); ++j) {
    const bool joined = j > 0 && pitch == channels && across[j].offset == across[j - 1].offset + 1;
    if (!joined) runs.push_back({static_cast<int64_t>(j), 0});
    runs.back().length += channels;
  }
  return runs;
}
// The rows of weights that they meet.
inline int64_t weight_rows(const std::vector<TapRun>& runs, int64_t fold) {
  int64_t rows = 0;
  for (const TapRun& run : runs) rows += ceil_div(run.length, fold);
  return rows;
}
// The same without a list of the runs, whose memory would be a good part of planning a small layer.
inline int64_t weight_rows(const std::vector<Tap>& across, int64_t pitch, int64_t channels,
                           int64_t fold) {
  int64_t rows = 0, length = 0;
  for (size_t j = 0; j < across.size(); ++j) {
    const bool joined = j > 0 && pitch == channels && across[j].offset == across[j - 1].offset + 1;
    if (!joined) rows += ceil_div(length, fold), length = 0;
    length += channels;
  }
  return rows + ceil_div(length, fold);
}

// The windows of one phase by the taps that they have, each found once for all boxes.
class BandWindows {
 public:
  struct Chain {
    int64_t first_run, run_count;
  };
  struct Window {
    TapRange rows, columns;
    int64_t first_chain, chain_count;
  };
  std::vector<BandRun> runs;  // offsets count from the window's first tap
  std::vector<Chain> chains;

  void set_layout(const BandLayout& layout) {
    if (layout == layout_) return;
    layout_ = layout;
    runs.clear();
    chains.clear();
    windows_.clear();
  }

  // A range of columns begins and ends between runs of side-by-side taps.
  Window window(const std::vector<Tap> taps[2], const TapRange& rows, const TapRange& columns) {
    for (const Window& known : windows_)
      if (known.rows == rows && known.columns == columns) return known;
    const int64_t first = chains.size();
    add_chains(taps, rows, columns);
    windows_.push_back({rows, columns, first, static_cast<int64_t>(chains.size()) - first});
    return windows_.back();
  }

 private:
  // Chains over the taps of a window, in the order of the weights.
  void add_chains(const std::vector<Tap> taps[2], const TapRange& down, const TapRange& across) {
    const auto [line, pitch, channels, fold] = layout_;
    const std::vector<TapRun> row_runs = tap_runs(taps[1], pitch, channels);
    auto left_out = [&](const TapRun& run) {
      return run.first_tap < across.first || run.first_tap >= across.last;
    };
    int64_t of_row = 0;
    for (const TapRun& run : row_runs)
      if (!left_out(run)) of_row += ceil_div(run.length, fold);
    const int64_t total = down.size() * of_row;
    const int64_t longest = ceil_div(total, std::max<int64_t>(1, ceil_div(total, kChainLength)));
    int64_t k = down.first * weight_rows(row_runs, fold), room = longest;
    start_chain();
    for (int64_t i = down.first; i < down.last; ++i) {
      const int64_t row = (taps[0][i].offset - taps[0][down.first].offset) * line;
      for (const TapRun& run : row_runs) {
        if (left_out(run)) {
          k += ceil_div(run.length, fold);
          continue;
        }
        const int64_t column = taps[1][run.first_tap].offset - taps[1][across.first].offset;
        for (int64_t done = 0; done < run.length;) {
          if (room == 0) start_chain(), room = longest;
          const int64_t part = std::min(run.length - done, room * fold);
          const int64_t rows = ceil_div(part, fold);
          runs.push_back({row + column * pitch + done, part, k});
          ++chains.back().run_count;
          done += part, k += rows, room -= rows;
        }
      }
    }
  }
  void start_chain() { chains.push_back({static_cast<int64_t>(runs.size()), 0}); }

  BandLayout layout_{0, 0, 0, 0};
  std::vector<Window> windows_;
};

}  // namespace pyvit
