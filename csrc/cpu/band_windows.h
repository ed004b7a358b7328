// Which runs of a band (band.h) the window of a destination pixel has, and in which chains their
// products are summed.
#pragma once

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "patches.h"
#include "row_kernel.h"

namespace pyvit {

constexpr int64_t kChainLength = 384;  // longest sum in registers

// Where a band lies and how: offsets count from the first tap of any phase.
struct BandLayout {
  int64_t first_offset[2];  // of the taps: rows, columns
  int64_t columns, pitch, channels;
  int64_t fold;  // elements of a run that meet one row of the weights (fold_kernel.h)
};

// Taps of one kernel row that lie side by side in the band: one run of memory.
struct TapRun {
  int64_t first_tap, length;  // elements
};
inline std::vector<TapRun> tap_runs(const std::vector<Tap>& across, int64_t pitch,
                                    int64_t channels) {
  std::vector<TapRun> runs;
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

class BandWindows {
 public:
  struct Chain {
    int64_t first_run, run_count;
  };
  // Destination rows whose windows meet the same tap rows; those outside the image are left out.
  struct Rows {
    int64_t begin, end, first_chain, chain_count;
  };
  std::vector<BandRun> runs;
  std::vector<Chain> chains;
  std::vector<Rows> groups;

  // The windows of `rows` destination rows; row 0 reads source row `first_row` with offset 0. Taps
  // are in order of their offsets.
  void find(const std::vector<Tap> taps[2], const BandLayout& band, int64_t rows,
            int64_t first_row, int64_t step, int64_t height) {
    runs.clear();
    chains.clear();
    groups.clear();
    int64_t begin = -1, end = -1;
    for (int64_t r = 0; r < rows; ++r) {
      auto inside = [&, h = first_row + r * step](const Tap& tap) {
        return h + tap.offset >= 0 && h + tap.offset < height;
      };
      const auto first = std::find_if(taps[0].begin(), taps[0].end(), inside);
      const int64_t from = first - taps[0].begin();
      const int64_t to = std::find_if_not(first, taps[0].end(), inside) - taps[0].begin();
      if (groups.empty() || from != begin || to != end) {
        begin = from, end = to;
        const int64_t chain = chains.size();
        add_chains(taps, band, begin, end);
        groups.push_back({r, r, chain, static_cast<int64_t>(chains.size()) - chain});
      }
      groups.back().end = r + 1;
    }
  }

 private:
  // Chains over the tap rows [begin, end), in the order of the weights.
  void add_chains(const std::vector<Tap> taps[2], const BandLayout& band, int64_t begin,
                  int64_t end) {
    const std::vector<TapRun> row_runs = tap_runs(taps[1], band.pitch, band.channels);
    const int64_t row_length = weight_rows(row_runs, band.fold), total = (end - begin) * row_length;
    const int64_t longest = ceil_div(total, std::max<int64_t>(1, ceil_div(total, kChainLength)));
    int64_t k = begin * row_length, room = longest;
    start_chain();
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = (taps[0][i].offset - band.first_offset[0]) * band.columns;
      for (const TapRun& run : row_runs) {
        const int64_t column = taps[1][run.first_tap].offset - band.first_offset[1];
        const int64_t offset = (row + column) * band.pitch;
        for (int64_t done = 0; done < run.length;) {
          if (room == 0) start_chain(), room = longest;
          const int64_t part = std::min(run.length - done, room * band.fold);
          const int64_t rows = ceil_div(part, band.fold);
          runs.push_back({offset + done, part, k});
          ++chains.back().run_count;
          done += part, k += rows, room -= rows;
        }
      }
    }
  }
  void start_chain() { chains.push_back({static_cast<int64_t>(runs.size()), 0}); }
};

}  // namespace pyvit
