// What conv2d_depthwise_kernel.h reads and writes: a part of an image copied to scratch so that
// each lane holds the source channels of its own destination channel, and weights and results in
// the same lanes.
#pragma once

#include <algorithm>

#include "conv2d_gather.h"
#include "simd.h"
#include "transpose.h"

namespace pyvit {

// How far ahead memory is fetched: strips of a row are too short for the hardware to guess.
constexpr int64_t kPixelsAhead = 16, kVectorsAhead = 4;
constexpr int64_t kMostLaneSources = 16;  // vectors of source channels under a vector of lanes

// The lanes of one vector: destination channels [first, first + count) of all groups together.
// Slot s of a lane is the source channel s of its group.
template <class T>
struct LaneBlock {
  static constexpr int64_t L = kLanes<T>;
  int64_t first, count;
  int64_t slots;                // source channels a group
  int64_t source, sources;      // the source channels that the lanes read, all slots
  bool straight;                // lane l of slot 0 is source channel `source + l`
  int32_t place[L];             // of slot 0 of each lane among `sources`
  int64_t groups, run = 0;      // slots of every group that fit in one vector, where not all do
  int32_t run_place[L];         // of the first of them

  LaneBlock(int64_t first_, int64_t count_, int64_t per_group, int64_t slots_)
      : first(first_), count(count_), slots(slots_) {
    const int64_t group = first / per_group, last = (first + count - 1) / per_group;
    source = group * slots;
    groups = last - group + 1;
    sources = groups * slots;
    for (int64_t fitting = 2; sources > L && fitting <= std::min<int64_t>(slots, 8); fitting *= 2)
      if (groups * fitting <= L) run = fitting;
    straight = per_group == 1 && slots == 1;
    for (int64_t l = 0; l < L; ++l)
      place[l] = static_cast<int32_t>(
          ((first + std::min(l, count - 1)) / per_group - group) * slots);
    for (int64_t l = 0; l < L; ++l)
      run_place[l] = static_cast<int32_t>(place[l] / slots * run);
  }
};

#if defined(__AVX512F__) || defined(__AVX2__)
// spread_to_slots for pixels of many channels: `Run` slots of each group at a time are brought
// together in a vector. The last run may repeat slots of the one before.
template <int Run>
inline void spread_runs(float* dst, int64_t slot_stride, const float* pixel,
                        const LaneBlock<float>& block) {
  float near[kLanes<float>] = {};
  for (int64_t at = 0; at < block.slots; at += Run) {
    const int64_t s = std::min(at, block.slots - Run);
    for (int64_t g = 0; g < block.groups; ++g)
      std::memcpy(near + g * Run, pixel + g * block.slots + s, Run * sizeof(float));
    const Vec<float> all = load(near);
    for (int r = 0; r < Run; ++r)
      store(dst + (s + r) * slot_stride, permute(all, block.run_place, r));
  }
}
#endif

// dst[s · slot_stride + lane] = pixel[place[lane] + s]; where the pixel's channels fit in a vector,
// a whole one is read.
template <class T>
inline void spread_to_slots(T* dst, int64_t slot_stride, const T* pixel,
                            const LaneBlock<T>& block) {
#if defined(__AVX512F__) || defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>) {
    if (block.run == 8) return spread_runs<8>(dst, slot_stride, pixel, block);
    if (block.run == 4) return spread_runs<4>(dst, slot_stride, pixel, block);
    if (block.run == 2) return spread_runs<2>(dst, slot_stride, pixel, block);
    if (block.sources <= kLanes<T>) {
      const Vec<float> all = load(pixel);
      for (int64_t s = 0; s < block.slots; ++s)
        store(dst + s * slot_stride, permute(all, block.place, s));
      return;
    }
  }
#endif
  for (int64_t s = 0; s < block.slots; ++s, dst += slot_stride)
    for (int64_t l = 0; l < kLanes<T>; ++l) dst[l] = pixel[block.place[l] + s];
}

// f(first, count) over [0, n) in pieces of L; the last one overlaps its neighbour where n > L, so
// that transposing it needs no partial block.
template <int64_t L, class F>
inline void for_each_piece(int64_t n, const F& f) {
  for (int64_t at = 0; at < n; at += L) {
    if (at + L > n && n > L) at = n - L;
    f(at, std::min(L, n - at));
  }
}

// Rows and columns of the image, both inside it.
struct LaneBox {
  int64_t image, row, rows, column, columns;
};

// Where pixel (row, column) of the box lies:
// data[block · block_stride + slot · slot_stride + row · row_stride + column · L].
template <class T>
struct LaneBand {
  T* data;
  int64_t block_stride, slot_stride, row_stride;
};

// Channels side by side in memory: all blocks of a pixel together, as memory likes it.
template <class T, class S>
void pack_lanes_last(const LaneBand<T>& band, const PatchSource<S>& source,
                     const LaneBlock<T>* blocks, int64_t block_count, const LaneBox& box) {
  constexpr int64_t L = kLanes<T>;
  T pixel[L * kMostLaneSources];
  std::fill(pixel, pixel + L, T(0));
  const bool straight = blocks[0].straight;
  const bool whole = straight && blocks[block_count - 1].count == L;
  for (int64_t r = 0; r < box.rows; ++r) {
    const S* from = source.data + box.image * source.stride[0] +
                    (box.row + r) * source.stride[2] + box.column * source.stride[3];
    T* to = band.data + r * band.row_stride;
    for (int64_t w = 0; w < box.columns; ++w, from += source.stride[3], to += L) {
      T* of_block = to;
      for (int64_t b = 0; b < block_count; ++b, of_block += band.block_stride) {
        const S* channels = from + blocks[b].source;
        __builtin_prefetch(channels + kPixelsAhead * source.stride[3]);
        if constexpr (std::is_same_v<S, T>) {
          if (whole) {
            store(of_block, load(channels));
            continue;
          }
        }
        if (straight) {
          widen_run(of_block, channels, blocks[b].count);
        } else {
          widen_run(pixel, channels, blocks[b].sources);
          spread_to_slots(of_block, band.slot_stride, pixel, blocks[b]);
        }
      }
    }
  }
}

// Planes: transposed, a vector of pixels at a time. Narrow rows that follow each other in memory
// are taken as one.
template <class T, class S>
void pack_lanes_planar(const LaneBand<T>& band, const PatchSource<S>& source,
                       const LaneBlock<T>& block, const LaneBox& box) {
  constexpr int64_t L = kLanes<T>;
  const bool joined = source.stride[2] == box.columns * source.stride[3] && box.columns < 4 * L;
  const int64_t length = joined ? box.rows * box.columns : box.columns;
  const int64_t width = round_up(block.sources, L);
  T pixels[L * L * kMostLaneSources];
  std::fill(pixels, pixels + L * width, T(0));
  const S* corner = source.data + box.image * source.stride[0] + block.source * source.stride[1] +
                    box.row * source.stride[2] + box.column * source.stride[3];
  for (int64_t r = 0; r < (joined ? 1 : box.rows); ++r, corner += source.stride[2]) {
    for_each_piece<L>(length, [&](int64_t at, int64_t count) {
      const S* from = corner + at * source.stride[3];
      for (int64_t c = 0; c < block.sources; ++c)  // each plane is a stream of its own
        __builtin_prefetch(from + c * source.stride[1] + kVectorsAhead * L * source.stride[3]);
      if (block.straight && !joined) {
        transpose(band.data + r * band.row_stride + at * L, L, from, source.stride[1],
                  source.stride[3], block.count, count);
        return;
      }
      transpose(pixels, width, from, source.stride[1], source.stride[3], block.sources, count);
      int64_t row = r + at / box.columns, column = at % box.columns;
      for (int64_t p = 0; p < count; ++p) {
        T* to = band.data + row * band.row_stride + column * L;
        if (block.straight) {
          store(to, load(pixels + p * L));
        } else {
          spread_to_slots(to, band.slot_stride, pixels + p * width, block);
        }
        if (++column == box.columns) column = 0, ++row;
      }
    });
  }
}

// Sums of one vector's lanes, pixels side by side, to planes.
template <class T, class S>
void store_lanes_planar(S* out, int64_t channel_stride, int64_t column_stride, const T* from,
                        int64_t pixels, int64_t lanes) {
  constexpr int64_t L = kLanes<T>;
  for_each_piece<L>(pixels, [&](int64_t at, int64_t count) {
    S* to = out + at * column_stride;
    for (int64_t c = 0; c < lanes; ++c)
      __builtin_prefetch(to + c * channel_stride + kVectorsAhead * L * column_stride, 1);
    if constexpr (std::is_same_v<S, T>) {
      if (column_stride == 1)
        return transpose(to, channel_stride, from + at * L, L, 1, count, lanes);
    }
    T block[L * L];
    transpose(block, L, from + at * L, L, 1, count, lanes);
    for (int64_t c = 0; c < lanes; ++c, to += channel_stride) {
      if (column_stride == 1) {
        narrow_run(to, block + c * L, count);
      } else {
        for (int64_t p = 0; p < count; ++p) to[p * column_stride] = narrow<S>(block[c * L + p]);
      }
    }
  });
}

}  // namespace pyvit
