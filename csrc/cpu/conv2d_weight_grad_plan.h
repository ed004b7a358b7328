// How the weight gradient is cut up. Its sum over pixels goes band by band: a band is a rectangle
// of output pixels (several small images, or some rows of a large one) whose operands stay in the
// cache while every tap and channel goes over them. The bands depend on the sizes alone, and so
// does the order of each sum; the blocks of the result that are tasks may depend on the threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "conv2d.h"
#include "gemm.h"
#include "patches.h"

namespace pyvit::weight_gradient {

struct Range {
  int64_t begin, count;
};

// Part `index` of `extent` cut into pieces of `length`.
inline Range piece(int64_t extent, int64_t length, int64_t index) {
  const int64_t begin = index * length;
  return {begin, std::min(length, extent - begin)};
}

// Cuts `extent` into equal pieces of at most `most`, and of at least one.
inline int64_t equal_length(int64_t extent, int64_t most) {
  if (extent == 0) return 1;
  return ceil_div(extent, ceil_div(extent, std::max<int64_t>(1, most)));
}

// The source rows (or columns) that a range of output rows reads through a range of taps, as they
// lie in the packed band: `count` lines, line u being source line first + u·line_step, or, where
// the taps of neighbouring output lines do not overlap, the lines of each output line in turn.
struct Lines {
  int64_t first, count, line_step;
  int64_t out_step, tap_step;  // in packed lines
  int64_t group, group_step;   // lines of one output line, and from one to the next in the source

  int64_t source(int64_t u) const {
    if (group == 0) return first + u * line_step;
    return first + u / group * group_step + u % group * line_step;
  }
};

struct Axis {
  int64_t out, in, stride, padding, dilation;

  int64_t source(int64_t q, int64_t tap) const { return q * stride + tap * dilation - padding; }

  // With `apart`, lines that no tap reads are left out; without, lines are evenly spaced.
  Lines lines(Range q, Range taps, bool apart) const {
    const int64_t first = source(q.begin, taps.begin), reach = (taps.count - 1) * dilation;
    if (taps.count == 1) return {first, q.count, stride, 1, 0, 0, 0};
    if (apart && reach < stride)
      return {first, q.count * taps.count, dilation, taps.count, 1, taps.count, stride};
    const int64_t step = std::gcd(stride, dilation);
    const int64_t count = ((q.count - 1) * stride + reach) / step + 1;
    return {first, count, step, stride / step, dilation / step, 0, 0};
  }
  // The output lines, counted from q.begin, for which the tap reads inside the image.
  Span inside(Range q, int64_t tap) const {
    return pyvit::inside(source(q.begin, tap), stride, in, q.count);
  }
};

// Output lines for which the same taps read inside the image.
struct Segment {
  Range lines, taps;
};

inline std::vector<Segment> segments_of(const Axis& axis, Range q, int64_t taps) {
  std::vector<Segment> segments;
  for (int64_t line = q.begin; line < q.begin + q.count; ++line) {
    // Tap t reads source line first + t · dilation.
    const Span span = inside(axis.source(line, 0), axis.dilation, axis.in, taps);
    const Range within{span.begin, span.end - span.begin};
    if (within.count == 0) continue;
    if (!segments.empty()) {
      Segment& last = segments.back();
      if (last.lines.begin + last.lines.count == line && last.taps.begin == within.begin &&
          last.taps.count == within.count) {
        ++last.lines.count;
        continue;
      }
    }
    segments.push_back({{line, 1}, within});
  }
  return segments;
}

// Sizes of a band in output pixels. A sum is one chain over a band's pixels, then over the bands:
// a short sum has several bands too, so that its rounding errors do not all pile up in one chain.
struct Band {
  int64_t images, rows, columns;

  Band(const Conv2dShape& s, int64_t most_pixels) {
    const int64_t all = s.batch * s.out_height * s.out_width;
    most_pixels = std::min(most_pixels, std::max<int64_t>(64, all / 4));
    columns = equal_length(s.out_width, most_pixels);
    rows = equal_length(s.out_height, most_pixels / columns);
    const bool whole = columns == s.out_width && rows == s.out_height;
    images = whole ? equal_length(s.batch, most_pixels / (rows * columns)) : 1;
  }
  int64_t pixels() const { return images * rows * columns; }
};

inline bool is_depthwise(const Conv2dShape& s) {
  return s.groups > 1 && s.groups == s.in_channels && s.groups == s.out_channels;
}

template <class T>
struct WeightGradPlan {
  static constexpr int64_t kBlockBytes = 7 << 17;  // what a task keeps in the second cache
  static constexpr int NR = Panel<T>::NR;

  int64_t images;
  // Depth-wise: the result is one group whose lanes each have a channel of their own.
  bool lanes;
  bool direct = false;  // ... and the operands, their channels side by side, are read in place
  int64_t groups, out_channels, channels;  // channels: of one output channel
  Axis axis[2];
  int64_t kernel[2];
  Band band;
  int64_t bands[3];  // images, rows, columns
  // Few channels: pixels outside the image are packed as zeros, so that one tile spans taps and
  // channels. Many: each tap clips its pixels to the image instead.
  bool padded;
  // Pixels keep their channels side by side, as in a channels-last image of few channels.
  bool pixel_major;
  int64_t block[4];  // out channels, channels, row taps, column taps

  WeightGradPlan(const Conv2dShape& s, View4 x)
      : images(s.batch),
        lanes(is_depthwise(s)),
        groups(lanes ? 1 : s.groups),
        out_channels(s.out_channels / groups),
        channels(s.in_channels / s.groups),
        axis{axis_of(s, 0, s.height, s.out_height), axis_of(s, 1, s.width, s.out_width)},
        kernel{s.kernel[0], s.kernel[1]},
        band(s, 256),
        bands{ceil_div(s.batch, band.images), ceil_div(s.out_height, band.rows),
              ceil_div(s.out_width, band.columns)},
        padded(lanes || channels < 8 || !reads_outside()),
        pixel_major(channels < 8 && s.groups == 1 && channels > 1 && x.stride[1] == 1 &&
                    x.stride[3] == channels),
        block{out_channels, channels, kernel[0], kernel[1]} {
    choose_blocks();
  }

  // Only where values need no widening.
  void read_directly(View4 dy, View4 x) {
    direct = lanes && block[2] == kernel[0] && block[3] == kernel[1] &&
             out_channels >= kLanes<T> && x.stride[1] == 1 && dy.stride[1] == 1;
  }

  // Smaller blocks where `copies` times as many tasks as blocks would leave threads idle.
  void divide_among(int64_t threads, int64_t copies) {
    for (;;) {
      const int64_t tasks = block_count() * copies;
      if (10 * tasks >= 9 * round_up(tasks, threads)) return;
      if (!pixel_major && block[1] > 2 * Panel<T>::MR) {
        block[1] = ceil_div(block[1], 2);
      } else if (block[0] > NR) {
        block[0] = round_up(ceil_div(block[0], 2), NR);
      } else if (block[2] > 1 && !direct) {
        block[2] = ceil_div(block[2], 2);
      } else {
        return;
      }
    }
  }

  int64_t band_count() const { return bands[0] * bands[1] * bands[2]; }
  int64_t elements() const { return channels * kernel[0] * kernel[1]; }
  int64_t extent(int dim) const {
    return dim == 0 ? out_channels : dim == 1 ? channels : kernel[dim - 2];
  }
  int64_t blocks(int dim) const { return ceil_div(extent(dim), block[dim]); }
  int64_t block_count() const { return blocks(0) * blocks(1) * blocks(2) * blocks(3); }
  Range block_range(int dim, int64_t index) const { return piece(extent(dim), block[dim], index); }

  int64_t packed_lines(int a, int64_t taps) const {
    const int64_t q = a == 0 ? band.rows : band.columns;
    const int64_t all = axis[a].lines({0, q}, {0, taps}, a == 0).count;
    return padded ? all : std::min(all, axis[a].in);
  }
  int64_t packed_pixels() const {
    return band.images * packed_lines(0, block[2]) * packed_lines(1, block[3]);
  }
  // Elements between pixels and between channels of the packed band. Channels lie an odd number of
  // cache lines apart, so that they do not share a cache set.
  int64_t pixel_step() const { return lanes ? NR : pixel_major ? channels : 1; }
  int64_t channel_step() const {
    const int64_t line = 64 / sizeof(T);
    if (lanes) return packed_pixels() * NR;
    return pixel_major ? 1 : (ceil_div(packed_pixels(), line) | 1) * line;
  }
  int64_t strip_step() const { return lanes ? block[1] * channel_step() : 0; }
  int64_t image_elements() const {
    if (lanes) return ceil_div(block[0], NR) * strip_step();
    return pixel_major ? packed_pixels() * channels : block[1] * channel_step();
  }
  // Elements from pixel to pixel of a strip of dy.
  int64_t grad_step() const { return block[0] > kLanes<T> ? NR : kLanes<T>; }
  int64_t grad_elements() const { return band.pixels() * round_up(block[0], grad_step()); }
  int64_t sum_columns() const { return round_up(block[0], NR); }
  int64_t sum_elements() const { return block[1] * block[2] * block[3] * sum_columns(); }
  int64_t scratch_bytes() const {
    return Scratch::bytes_for<T>(image_elements()) + Scratch::bytes_for<T>(grad_elements()) +
           Scratch::bytes_for<T>(sum_elements());
  }

 private:
  static Axis axis_of(const Conv2dShape& s, int a, int64_t in, int64_t out) {
    return {out, in, s.stride[a], s.padding[a], s.dilation[a]};
  }
  bool reads_outside() const {
    for (int a = 0; a < 2; ++a) {
      const Axis& along = axis[a];
      if (along.padding > 0 || along.source(along.out - 1, kernel[a] - 1) >= along.in) return true;
    }
    return false;
  }

  // Values that all tasks together pack: each block of the result packs both of its operands.
  double packed() const {
    const double grad = static_cast<double>(band.pixels()) * out_channels;
    const double image = static_cast<double>(packed_pixels()) * channels;
    const int64_t times = lanes ? out_channels : blocks(0);
    return (grad * blocks(1) + image * times) * blocks(2) * blocks(3);
  }

  // The largest number of channels that fits beside the other sizes of the block; 0 if none does.
  int64_t most_channels() {
    block[1] = channels;
    if (scratch_bytes() <= kBlockBytes) return channels;
    if (pixel_major) return 0;
    block[1] = 1;
    const int64_t fixed = Scratch::bytes_for<T>(grad_elements()) + 192;
    const int64_t each = (image_elements() + sum_elements()) * sizeof(T);
    return fixed + each > kBlockBytes ? 0 : std::min(channels, (kBlockBytes - fixed) / each);
  }

  // The cheapest block that fits. Columns of taps are divided only where nothing else would do.
  void choose_blocks() {
    for (;;) {
      double least = 0;
      int64_t best[3] = {0, 0, 0};
      for (int64_t rows = kernel[0];; rows = ceil_div(rows, 2)) {
        block[2] = rows;
        const int64_t strips = ceil_div(out_channels, NR);
        for (int64_t parts = 1; parts <= strips; ++parts) {
          block[0] = std::min(out_channels, ceil_div(strips, parts) * NR);
          const int64_t most = most_channels();
          if (most == 0) continue;
          block[1] = equal_length(channels, most);
          if (const double cost = packed(); best[0] == 0 || cost < least) {
            std::copy(block, block + 3, best);
            least = cost;
          }
        }
        if (rows == 1) break;
      }
      if (best[0] != 0) {
        std::copy(best, best + 3, block);
        return;
      }
      if (block[3] == 1) return;  // one strip, channel and tap: Band bounds their size
      block[3] = ceil_div(block[3], 2);
    }
  }
};

}  // namespace pyvit::weight_gradient
