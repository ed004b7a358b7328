// Weights as the vector side of row_kernel.h: for each strip of destination channels, the rows k
// in the order (row tap, column tap, source channel), a strip wide.
#pragma once

#include <vector>

#include "gather.h"
#include "simd.h"
#include "transpose.h"

namespace pyvit {

template <class T>
struct WeightStrip {
  static constexpr int64_t L = kLanes<T>;
  T* to;
  int64_t vectors;  // one or two
  int64_t first, width;              // destination channels; zeros from width on
  int64_t channel, channel_count;    // source channels
  int64_t lanes() const { return vectors * L; }
};

// Where each weight of a kernel, counted row by row, stands among the taps; -1: in another phase.
inline std::vector<int64_t> tap_places(const std::vector<Tap> taps[2], int64_t rows,
                                       int64_t columns) {
  std::vector<int64_t> places(rows * columns, -1);
  int64_t place = 0;
  for (const Tap& i : taps[0])
    for (const Tap& j : taps[1]) places[i.kernel * columns + j.kernel] = place++;
  return places;
}

// The weights of a channel pair are one run of memory (NCHW): blocks are transposed whole, and
// their rows put where the order of k wants them.
template <class T, class S>
void pack_kernel_runs(const WeightStrip<T>& strip, const Weights<S>& w,
                      const std::vector<int64_t>& places) {
  constexpr int64_t L = kLanes<T>;
  const int64_t taps = places.size(), lanes = strip.lanes();
  // Channels side by side make one long run; else one run a channel.
  const bool joined = w.stride[1] == taps;
  const int64_t runs = joined ? 1 : strip.channel_count;
  const int64_t length = joined ? taps * strip.channel_count : taps;
  T block[L * L];
  for (int64_t d0 = 0; d0 < strip.width; d0 += L) {
    const int64_t height = std::min(L, strip.width - d0);
    for (int64_t r = 0; r < runs; ++r) {
      const S* from =
          w.data + (strip.first + d0) * w.stride[0] + (strip.channel + r) * w.stride[1];
      int64_t channel = r, tap = 0;
      for (int64_t e = 0; e < length; e += L) {
        const int64_t count = std::min(L, length - e);
        transpose(block, L, from + e, w.stride[0], 1, height, count);
        for (int64_t i = 0; i < count; ++i) {
          if (places[tap] >= 0) {
            T* row = strip.to + (places[tap] * strip.channel_count + channel) * lanes + d0;
            for (int64_t j = 0; j < height; ++j) row[j] = block[i * L + j];
          }
          if (++tap == taps) tap = 0, ++channel;
        }
      }
    }
  }
}

template <class T, class S>
void pack_weight_strip(const WeightStrip<T>& strip, const Weights<S>& w,
                       const std::vector<Tap> taps[2], const std::vector<int64_t>& places,
                       int64_t kernel_columns) {
  const int64_t lanes = strip.lanes();
  const int64_t rows = taps[0].size() * taps[1].size() * strip.channel_count;
  if (strip.width < lanes) std::fill(strip.to, strip.to + rows * lanes, T(0));
  if (w.stride[3] == 1 && w.stride[2] == kernel_columns && places.size() > 1)
    return pack_kernel_runs(strip, w, places);
  T* to = strip.to;
  for (const Tap& i : taps[0]) {
    for (const Tap& j : taps[1]) {
      const S* from = &w.at(strip.first, strip.channel, i.kernel, j.kernel);
      if (w.stride[0] == 1) {
        for (int64_t c = 0; c < strip.channel_count; ++c)
          widen_run(to + c * lanes, from + c * w.stride[1], strip.width);
      } else {
        transpose(to, lanes, from, w.stride[0], w.stride[1], strip.width, strip.channel_count);
      }
      to += strip.channel_count * lanes;
    }
  }
}

}  // namespace pyvit
