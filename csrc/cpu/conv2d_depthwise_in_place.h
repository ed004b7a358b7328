// Depth-wise layers, also of several outputs a channel, and other groups whose images have
// channels last: what their lanes read lies side by side in memory, in one vector or in two, and is
// multiplied where it is, without a band (conv2d_depthwise.cpp). Each product brings it to its
// lanes again; a group that fills a vector of lanes by itself reads one element for all of them.
//
// A task owns whole rows of the destination, all channels. Destination pixels are taken by the taps
// that reach the image from them: the columns that all taps reach from along rows, the others, at
// the image's sides, along columns; no tap outside the image is multiplied.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "conv2d_depthwise_kernel.h"
#include "conv2d_depthwise_patch.h"
#include "conv2d_depthwise_plan.h"
#include "conv2d_depthwise_weights.h"

namespace pyvit {

constexpr int64_t kLanesInCache = 14 << 20;  // bytes; beyond them, fetching ahead pays

constexpr int64_t kBytesAhead = 128;
constexpr int64_t kCacheStride = 4096, kCacheWays = 8;  // lines so far apart share a set

template <class T>
class LanesInPlace {
  static constexpr int64_t L = kLanes<T>;

 public:
  LanesInPlace(const LanePlan<T>& plan, const int64_t kernel[2])
      : plan_(plan), weights_(plan, kernel) {
    const int64_t source = plan.rows.source_size * plan.columns.source_size;
    const int64_t pixels = plan.any().batch * (source + plan.rows.size * plan.columns.size);
    fetches_ = pixels * plan.channels * static_cast<int64_t>(sizeof(T)) > kLanesInCache;
    Scratch scratch(plan.scratch_bytes());
    panel_ = scratch.take<T>(plan.blocks * plan.panel_elements());
    T* kernels = scratch.take<T>(plan.kernel_elements());
    bias_ = scratch.take<T>(plan.blocks * L);
    for (int64_t b = 0; b < plan.blocks; ++b) {
      blocks_.push_back(plan.block(b));
      const LaneBlock<T>& block = blocks_.back();
      weights_.pack(panel_ + b * plan.panel_elements(), kernels, block);
      if (plan.any().bias == nullptr) {
        std::fill(bias_ + b * L, bias_ + (b + 1) * L, T(0));
      } else {
        std::copy_n(plan.any().bias + block.first, block.count, bias_ + b * L);
        std::fill(bias_ + b * L + block.count, bias_ + (b + 1) * L, T(0));
      }
    }
    for (const TapAxis& taps : plan.taps[1]) find_columns(taps);
    joined_ = rows_are_one(plan.any());
  }

  void run(int64_t task) {
    const LaneAxis& down = plan_.rows;
    const int64_t image = task / down.boxes();
    const int64_t row = task % down.boxes() * down.extent;
    for (size_t p = 0; p < plan_.phases.list.size(); ++p) multiply(p, image, row);
  }

 private:
  // Columns of a phase that all taps reach the image from.
  struct Columns {
    int64_t count, begin, end;
  };

  void find_columns(const TapAxis& taps) {
    const LaneAxis& across = plan_.columns;
    const int64_t phases_across = std::min(across.phase_step, across.size);
    const int64_t residue = static_cast<int64_t>(columns_.size()) % phases_across;
    Columns all{ceil_div(across.size - residue, across.phase_step), 0, 0};
    all.end = all.count;
    auto at_edge = [&](int64_t column) {
      const Span taps_inside = reaching(across, taps, column);
      return taps_inside.end - taps_inside.begin < taps.count;
    };
    while (all.begin < all.end && at_edge(all.begin)) ++all.begin;
    while (all.begin < all.end && at_edge(all.end - 1)) --all.end;
    columns_.push_back(all);
  }

  // Whether the rows of a 1×1 layer follow each other in both images.
  static bool rows_are_one(const Gather<T>& g) {
    const auto &s = g.source;
    const int64_t width = s.grid[1];
    return s.patch_size() == s.channels && s.step[0] == 1 && s.step[1] == 1 &&
           s.taps[0][0].offset == 0 && s.taps[1][0].offset == 0 && s.grid[0] == s.height &&
           width == s.width && s.stride[2] == width * s.stride[3] &&
           g.destination.stride[2] == width * g.destination.stride[3];
  }

  static Span reaching(const LaneAxis& axis, const TapAxis& taps, int64_t position) {
    return taps.reaching(position * axis.step, position * axis.step, axis.source_size);
  }

  // What the rows of one phase in one box share.
  struct Part {
    const TapAxis &rows, &columns;
    const T* source;
    const T* weights;
    T* to;
    int64_t stride[2], to_stride[2];  // from a row, from a column to the next
  };

  void multiply(size_t p, int64_t image, int64_t row) {
    const Gather<T>& phase = plan_.phases.list[p];
    const LaneAxis &down = plan_.rows, &across = plan_.columns;
    const int64_t residue = static_cast<int64_t>(p) / std::min(across.phase_step, across.size);
    const int64_t begin = row / down.phase_step;
    const int64_t end = begin + ceil_div(down.count(row) - residue, down.phase_step);
    const auto &source = phase.source, &to = phase.destination;
    const Part part{plan_.taps[0][p],
                    plan_.taps[1][p],
                    source.data + image * source.stride[0],
                    panel_ + weights_.phase(p),
                    to.data + image * to.stride[0],
                    {source.stride[2], source.stride[3]},
                    {to.stride[2], to.stride[3]}};
    const Columns& columns = columns_[p];
    if (joined_)
      return sum_line(part, 1, {0, 1}, {begin, begin + 1}, {0, (end - begin) * across.size});
    for (int64_t r = begin, same = begin; r < end; r = same) {
      const Span rows = reaching(down, part.rows, r);
      do ++same;
      while (same < end && equal(reaching(down, part.rows, same), rows));
      const bool all = rows.end - rows.begin == part.rows.count;
      if (all && plan_.patch_kernel(p) > 0) {
        sum_patches(part, plan_.patch_kernel(p), {r, same}, {columns.begin, columns.end});
      } else {
        for (int64_t at = r; at < same; ++at)
          sum_line(part, 1, rows, {at, at + 1}, {columns.begin, columns.end});
      }
      for (int64_t c = 0; c < columns.count; ++c) {
        if (c == columns.begin) c = columns.end;
        if (c < columns.count) sum_line(part, 0, rows, {r, same}, {c, c + 1});
      }
    }
  }
  static bool equal(Span a, Span b) { return a.begin == b.begin && a.end == b.end; }

  // The source pixel that the first of some taps reads from a destination pixel.
  const T* window(const Part& part, int64_t row, int64_t column, int64_t tap_row,
                  int64_t tap_column) const {
    const int64_t h = row * plan_.rows.step + part.rows.first + tap_row * part.rows.spacing;
    const int64_t w =
        column * plan_.columns.step + part.columns.first + tap_column * part.columns.spacing;
    return part.source + h * part.stride[0] + w * part.stride[1];
  }

  // One row (axis 1) or one column (axis 0) of pixels, all with the same taps.
  void sum_line(const Part& part, int axis, Span tap_rows, Span rows, Span columns) const {
    const Span tap_columns = reaching(plan_.columns, part.columns, columns.begin);
    const LaneAxis& along = axis == 0 ? plan_.rows : plan_.columns;
    typename LaneTile<T>::Arguments tile;
    tile.pitch = along.step * part.stride[axis];
    tile.from = plan_.from();
    tile.slots = plan_.slots;
    tile.slot_stride = tile.from == LaneSource::one ? 1 : 0;
    tile.weight_slot_stride = part.rows.count * part.columns.count * L;
    tile.rows = tap_rows.end - tap_rows.begin;
    tile.taps = tap_columns.end - tap_columns.begin;
    tile.row_stride = part.rows.spacing * part.stride[0];
    tile.tap_stride = part.columns.spacing * part.stride[1];
    tile.weight_row_stride = part.columns.count * L;
    const bool one_tap = tile.weight_slot_stride == L && tile.rows * tile.taps == 1;
    if (tile.from == LaneSource::one && one_tap) {
      tile.tap_stride = 1;  // the sources of one tap as the taps of one source
      std::swap(tile.slots, tile.taps);
    }
    tile.base_pitch = 0;
    tile.c_pitch = part.to_stride[axis];
    const int64_t weight = tap_rows.begin * tile.weight_row_stride + tap_columns.begin * L;
    const int64_t length = axis == 0 ? rows.end - rows.begin : columns.end - columns.begin;
    // Pixels that share no source need not be in one tile, nor compete for the same cache lines.
    const bool apart = axis == 1 && along.step > 1 && along.step >= part.columns.count;
    const int64_t most = apart ? pixels_in_cache(tile) : LaneTile<T>::pixels;
    const int64_t parts = ceil_div(length, most);
    for (int64_t i = 0, at = 0; i < parts; ++i) {
      const int64_t count = (length - at) / (parts - i);
      const int64_t row = rows.begin + (axis == 0 ? at : 0);
      const int64_t column = columns.begin + (axis == 0 ? 0 : at);
      const T* a = window(part, row, column, tap_rows.begin, tap_columns.begin);
      T* c = part.to + row * part.to_stride[0] + column * part.to_stride[1];
      for (int64_t b = 0; b < plan_.blocks; ++b) {
        const LaneBlock<T>& block = blocks_[b];
        tile.a = a + block.source;
        tile.sources = block.sources, tile.place = block.place;
        // Whole vectors are stored soonest; the next block writes what is its own again.
        tile.lanes = block.first + L <= plan_.channels ? L : block.count;
        if (tile.from == LaneSource::few || tile.from == LaneSource::pair)
          tile.from = block.sources > L ? LaneSource::pair : LaneSource::few;
        tile.c = c + block.first;
        tile.base = bias_ + b * L;
        tile.weights = part.weights + b * plan_.panel_elements() + weight;
        if (fetches_ && plan_.phases.list.size() > 1)
          for (int64_t q = count; q < 2 * count; ++q)
            __builtin_prefetch(tile.c + q * tile.c_pitch, 1);
        if (fetches_ && apart) {
          const bool last = i + 1 == parts;
          fetch_next(last ? window(part, row + 1, columns.begin, tap_rows.begin, 0)
                          : a + count * tile.pitch, count * tile.pitch, b, tile);
        } else if (fetches_ && axis == 1 && along.step > 1) {
          fetch_windows(count, tile);
        }
        run_lane_kernel<T>(count, tile);
      }
      at += count;
    }
  }

  // Of the pixels of a row, how many a tile may have so that what it reads of one block stays in
  // the first-level cache: the lines around it are the next block's.
  int64_t pixels_in_cache(const typename LaneTile<T>::Arguments& tile) const {
    const int64_t bytes = plan_.any().source.stride[3] * static_cast<int64_t>(sizeof(T));
    const int64_t sets = std::min<int64_t>(64, kCacheStride / std::gcd(bytes, kCacheStride));
    const int64_t lines = std::max<int64_t>(1, tile.rows * tile.taps);  // of a pixel
    return std::clamp<int64_t>(sets * kCacheWays / lines, 2, LaneTile<T>::pixels);
  }

  // A block's share of the source rows from the next tile's on, `length` elements of each: memory is
  // then read in few and long runs.
  void fetch_next(const T* from, int64_t length, int64_t b,
                  const typename LaneTile<T>::Arguments& tile) const {
    const int64_t begin = length * b / plan_.blocks, end = length * (b + 1) / plan_.blocks;
    for (int64_t i = 0; i < tile.rows; ++i)
      for (int64_t e = begin; e < end; e += 64 / sizeof(T))
        __builtin_prefetch(from + i * tile.row_stride + e);
  }

  // What the same pixels read of a block soon to come.
  static void fetch_windows(int64_t pixels, const typename LaneTile<T>::Arguments& tile) {
    for (int64_t i = 0; i < tile.rows; ++i)
      for (int64_t q = 0; q < pixels; ++q)
        for (int64_t j = 0; j < tile.taps; ++j)
          __builtin_prefetch(tile.a + i * tile.row_stride + q * tile.pitch + j * tile.tap_stride +
                             kBytesAhead / sizeof(T));
  }

  void sum_patches(const Part& part, int64_t kernel, Span rows, Span columns) const {
    typename LanePatch<T>::Arguments patch;
    patch.row_stride = part.stride[0], patch.column_stride = part.stride[1];
    patch.c_row_stride = part.to_stride[0], patch.c_column_stride = part.to_stride[1];
    for (int64_t r = rows.begin; r < rows.end;) {
      const int64_t height = next_part(rows.end - r, LanePatch<T>::rows);
      for (int64_t c = columns.begin; c < columns.end;) {
        const int64_t width = next_part(columns.end - c, LanePatch<T>::columns);
        const T* a = window(part, r, c, 0, 0);
        T* to = part.to + r * part.to_stride[0] + c * part.to_stride[1];
        for (int64_t b = 0; b < plan_.blocks; ++b) {
          patch.a = a + blocks_[b].first;
          patch.c = to + blocks_[b].first;
          patch.base = bias_ + b * L;
          patch.weights = part.weights + b * plan_.panel_elements();
          if (fetches_)
            for (int64_t i = 0; i < height; ++i)
              for (int64_t j = 0; j < width; ++j)
                __builtin_prefetch(patch.a + (i + kernel - 1) * patch.row_stride +
                                   (j + kernel - 1 + width) * patch.column_stride);
          if (fetches_)
            for (int64_t i = 0; i < height; ++i)
              for (int64_t j = 0; j < width; ++j)
                __builtin_prefetch(patch.c + i * patch.c_row_stride +
                                   (j + width) * patch.c_column_stride, 1);
          run_lane_patch<T>(kernel, height, width, patch);
        }
        c += width;
      }
      r += height;
    }
  }
  // The first of the fewest equal parts of at most `most`.
  static int64_t next_part(int64_t length, int64_t most) {
    return length / ceil_div(length, most);
  }

  const LanePlan<T>& plan_;
  const LaneWeights<T> weights_;
  bool fetches_;  // ahead: the images are too large to be in a cache
  bool joined_;   // a task's pixels are one row
  T *panel_, *bias_;
  std::vector<LaneBlock<T>> blocks_;
  std::vector<Columns> columns_;  // of each phase
};

}  // namespace pyvit
