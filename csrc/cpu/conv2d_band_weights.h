// Weights as the vector side of row_kernel.h: strips of destination channels, each with a row for
// every k in the order (row tap, column tap, source channel).
#pragma once

#include <vector>

#include "conv2d_gather.h"
#include "row_kernel.h"
#include "simd.h"
#include "transpose.h"

namespace pyvit {

// A block of destination channels, as strips, and source channels; rows are taps × channel_count.
template <class T>
struct WeightBlock : Strips<T> {
  int64_t first;                   // destination channel
  int64_t channel, channel_count;  // source channels
};

// Where each weight of a kernel, counted row by row, stands: in which phase's strips, and where
// among its taps; phase -1: nowhere.
struct TapPlace {
  int64_t phase, place;
};
inline void add_tap_places(std::vector<TapPlace>& places, int64_t phase,
                           const std::vector<Tap> taps[2], int64_t columns) {
  int64_t place = 0;
  for (const Tap& i : taps[0])
    for (const Tap& j : taps[1]) places[i.kernel * columns + j.kernel] = {phase, place++};
}

// The weights of a channel pair are one run of memory (NCHW): blocks are transposed whole, and
// their rows put where the order of k wants them, one block a phase.
template <class T, class S>
void pack_kernel_runs(const std::vector<WeightBlock<T>>& blocks, const Weights<S>& w,
                      const std::vector<TapPlace>& places) {
  constexpr int64_t L = kLanes<T>;
  const WeightBlock<T>& block = blocks[0];
  const int64_t taps = places.size();
  // Source channels side by side make one long run; else one run a channel.
  const bool joined = w.stride[1] == taps;
  const int64_t runs = joined ? 1 : block.channel_count;
  const int64_t length = joined ? taps * block.channel_count : taps;
  T turned[L * L];
  for (int64_t r = 0; r < runs; ++r) {
    for (int64_t d = 0; d < block.width; d += L) {
      const int64_t height = std::min(L, block.width - d);
      const S* from = w.data + (block.first + d) * w.stride[0] + (block.channel + r) * w.stride[1];
      if (!joined && r + 2 < runs)  // the next channels' weights lie pages away
        for (int64_t e = 0; e < height * taps; e += 64 / static_cast<int64_t>(sizeof(S)))
          __builtin_prefetch(from + 2 * w.stride[1] + e);
      int64_t channel = r, tap = 0;
      for (int64_t e = 0; e < length; e += L) {
        const int64_t count = std::min(L, length - e);
        transpose(turned, L, from + e, w.stride[0], 1, height, count);
        for (int64_t i = 0; i < count; ++i) {
          const auto [phase, place] = places[tap];
          if (phase >= 0)
            widen_run(blocks[phase].at(place * block.channel_count + channel, d), turned + i * L,
                      height);
          if (++tap == taps) tap = 0, ++channel;
        }
      }
    }
  }
}

template <class T, class S>
void pack_taps(const WeightBlock<T>& block, const Weights<S>& w, const std::vector<Tap> taps[2]) {
  constexpr int64_t strip = WeightBlock<T>::strip;
  int64_t k = 0;
  for (const Tap& i : taps[0]) {
    for (const Tap& j : taps[1]) {
      const S* from = &w.at(block.first, block.channel, i.kernel, j.kernel);
      if (w.stride[0] == 1) {
        for (int64_t c = 0; c < block.channel_count; ++c)
          for (int64_t d = 0; d < block.width; d += strip)
            widen_run(block.at(k + c, d), from + c * w.stride[1] + d,
                      std::min(strip, block.width - d));
      } else {
        for (int64_t d = 0; d < block.width; d += strip)
          transpose(block.at(k, d), block.lanes(d), from + d * w.stride[0], w.stride[0],
                    w.stride[1], std::min(strip, block.width - d), block.channel_count);
      }
      k += block.channel_count;
    }
  }
}

// The weights of all phases.
template <class T, class S>
void pack_weights(const std::vector<WeightBlock<T>>& blocks, const std::vector<Gather<S>>& phases,
                  const std::vector<TapPlace>& places, int64_t kernel_columns) {
  constexpr int64_t strip = WeightBlock<T>::strip;
  for (const WeightBlock<T>& block : blocks) {
    const int64_t lanes = block.lanes(block.width - 1), last = (block.width - 1) / strip * strip;
    if (block.width - last < lanes && block.rows > 0)
      std::fill(block.at(0, last), block.at(0, last) + block.rows * lanes, T(0));
  }
  const Weights<S>& w = phases[0].weights;
  if (w.stride[3] == 1 && w.stride[2] == kernel_columns && places.size() > 1)
    return pack_kernel_runs(blocks, w, places);
  for (size_t p = 0; p < phases.size(); ++p) pack_taps(blocks[p], w, phases[p].source.taps);
}

}  // namespace pyvit
