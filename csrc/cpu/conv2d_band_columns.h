// Where the columns of a destination are cut because taps of a dilated kernel miss the image.
#pragma once

#include <algorithm>
#include <vector>

#include "conv2d_band_windows.h"
#include "patches.h"

namespace pyvit {

// Destination columns [begin, end) whose windows have the same taps.
struct ColumnSegment {
  int64_t begin, end;
  TapRange taps;
};

// What products of a segment cost: a tile has `most` pixels at most, and one of few pixels takes
// as long as one of `least`.
struct TileCost {
  int64_t least, most;
  int64_t of(int64_t pixels, const TapRange& taps) const {
    const int64_t tiles = ceil_div(pixels, most);
    return taps.size() * std::max(pixels, least * tiles) + tiles;
  }
};

// Cuts `columns` destination columns where a tap enters or leaves an image of `width`. Between
// cuts, a tap that some columns miss is multiplied by zeros for them: leaving it out would make
// the tiles too small. The cuts decide how sums are rounded, so they follow from the layer alone.
inline std::vector<ColumnSegment> column_segments(const std::vector<Tap>& taps, int64_t step,
                                                  int64_t width, int64_t columns,
                                                  const TileCost& cost) {
  const auto count = static_cast<int64_t>(taps.size());
  std::vector<Span> spans;
  std::vector<int64_t> cuts{0, columns};
  for (const Tap& tap : taps) {
    spans.push_back(inside(tap.offset, step, width, columns));
    cuts.push_back(spans.back().begin);
    cuts.push_back(spans.back().end);
  }
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  auto taps_of = [&](int64_t begin, int64_t end) {
    TapRange range{count, 0};
    for (int64_t t = 0; t < count; ++t) {
      if (spans[t].begin >= end || spans[t].end <= begin) continue;
      range.first = std::min(range.first, t);
      range.last = t + 1;
    }
    return range.last > 0 ? range : TapRange{0, 0};
  };
  // The cheapest way to cut what lies before each place.
  const size_t places = cuts.size();
  std::vector<int64_t> cheapest(places, INT64_MAX);
  std::vector<size_t> from(places, 0);
  cheapest[0] = 0;
  for (size_t i = 1; i < places; ++i) {
    for (size_t j = 0; j < i; ++j) {
      const int64_t whole =
          cheapest[j] + cost.of(cuts[i] - cuts[j], taps_of(cuts[j], cuts[i]));
      if (whole < cheapest[i]) cheapest[i] = whole, from[i] = j;
    }
  }
  std::vector<ColumnSegment> segments;
  for (size_t i = places - 1; i > 0; i = from[i])
    segments.push_back({cuts[from[i]], cuts[i], taps_of(cuts[from[i]], cuts[i])});
  std::reverse(segments.begin(), segments.end());
  return segments;
}

}  // namespace pyvit
