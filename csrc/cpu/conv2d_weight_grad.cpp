// dw[o, e] = Σ_p dy[o, p] · patch(x)[e, p], summed over the pixels p of the batch, without
// unfolding: a band of the image is packed once, and each tap reads it shifted, so that one packed
// element serves all taps. dy takes the vector side, [pixel][channel]; elements of x are broadcast.
// (Where few channels meet, pixels take the vector side: conv2d_weight_grad_planar.cpp.)
#include "conv2d.h"

#include <vector>

#include "conv2d_weight_grad_pack.h"
#include "conv2d_weight_grad_pixels.h"
#include "conv2d_weight_grad_plan.h"
#include "conv2d_weight_grad_planar.h"
#include "conv2d_weight_grad_prefetch.h"
#include "conv2d_weight_grad_tile.h"
#include "split_sum.h"

namespace pyvit {
namespace {

using namespace weight_gradient;

// One block of dw: some output channels, channels and taps of a group, summed over some bands.
template <class S>
class BlockSum {
  using T = Compute<S>;
  static constexpr int64_t NR = Panel<T>::NR, L = kLanes<T>;
  const WeightGradPlan<T>& plan_;
  const Range out_, channels_, taps_[2];
  const bool channels_inside_;  // order of a patch in dw: (row tap, column tap, c), else (c, …)
  const int64_t image_rows_, pitch_;  // of the packed image, as are the steps
  const int64_t pixel_step_, channel_step_, strip_step_, grad_step_, ldc_;
  T *const sums_, *const image_, *const grad_;
  std::vector<int64_t> offsets_;   // of the rows of a tile in the packed image
  struct TapPixels {
    int64_t image, grad;  // first pixel of the tap that lies inside
    PixelLoops loops;
  };
  std::vector<TapPixels> clipped_;
  Prefetcher next_grad_, next_image_;

 public:
  BlockSum(const WeightGradPlan<T>& plan, Scratch scratch, int64_t block, bool channels_inside)
      : plan_(plan),
        out_(plan.block_range(0, block % plan.blocks(0))),
        channels_(plan.block_range(1, (block /= plan.blocks(0)) % plan.blocks(1))),
        taps_{plan.block_range(2, (block /= plan.blocks(1)) % plan.blocks(2)),
              plan.block_range(3, block / plan.blocks(2))},
        channels_inside_(channels_inside),
        image_rows_(plan.packed_lines(0, taps_[0].count)),
        pitch_(plan.packed_lines(1, taps_[1].count)),
        pixel_step_(plan.pixel_step()),
        channel_step_(plan.channel_step()),
        strip_step_(plan.strip_step()),
        grad_step_(plan.grad_step()),
        ldc_(plan.sum_columns()),
        sums_(scratch.take<T>(plan.sum_elements())),
        image_(scratch.take<T>(plan.image_elements())),
        grad_(scratch.take<T>(plan.grad_elements())) {}

  void clear() { std::fill(sums_, sums_ + plan_.sum_elements(), T(0)); }

  void add_band(int64_t index, const S* dy, const int64_t dy_stride[4], const S* x,
                const int64_t x_stride[4], bool accumulate) {
    const BandRange band = band_range(index);
    if constexpr (std::is_same_v<S, T>) {
      if (plan_.direct) {
        if (!accumulate) clear();
        prefetch(index + 1, dy, dy_stride, x, x_stride);
        return multiply_in_place(band, dy, dy_stride, x, x_stride);
      }
    }
    const BandWindow window = window_of(band);
    pack_grad_band(grad_, grad_step_, dy, dy_stride, plan_.axis[1].out, band, out_);
    if (plan_.lanes) {
      LanePacker<S>{plan_, window, out_, image_rows_, pitch_, strip_step_}.pack(
          image_, x, x_stride, band.image);
    } else {
      ImageBandPacker<S>{plan_, window, channels_.count, image_rows_, pitch_, channel_step_}.pack(
          image_, x + channels_.begin * x_stride[1], x_stride, band.image);
    }
    prefetch(index + 1, dy, dy_stride, x, x_stride);
    if (plan_.padded) {
      multiply_all_taps(band, window, accumulate);
    } else {
      multiply_clipped_taps(band, window, accumulate);
    }
  }

  // Hands out the finished sums: row(o) is where the elements of output channel o go, `stride`
  // those of channel, row tap and column tap there.
  template <class D, class Row>
  void store_to(const Row& row, const int64_t stride[3]) const {
    const Range dims[3] = {channels_, taps_[0], taps_[1]};
    // Outermost first: rows and columns of taps, then channels; or channels first.
    const int rotated = channels_inside_ ? 1 : 0;
    const int order[3] = {rotated, rotated + 1, (rotated + 2) % 3};
    int64_t first = 0;
    for (int d = 0; d < 3; ++d) first += dims[d].begin * stride[d];
    // Inner dimensions that lie side by side in dw are one run.
    int64_t run = 1, runs[2] = {1, 1}, step[2] = {0, 0};
    for (int d = 2, outer = 2; d >= 0; --d) {
      const int64_t count = dims[order[d]].count, apart = stride[order[d]];
      if (outer == 2 && (count == 1 || apart == run)) {
        run *= count;
      } else {
        runs[--outer] = count, step[outer] = apart;
      }
    }
    const T* from = sums_;
    for (int64_t a = 0; a < runs[0]; ++a)
      for (int64_t b = 0; b < runs[1]; ++b, from += run * ldc_)
        store_run<D>(row, first + a * step[0] + b * step[1], from, run);
  }

 private:
  BandRange band_range(int64_t index) const {
    const int64_t column = index % plan_.bands[2], row = index / plan_.bands[2] % plan_.bands[1];
    return {piece(plan_.images, plan_.band.images, index / plan_.bands[2] / plan_.bands[1]),
            piece(plan_.axis[0].out, plan_.band.rows, row),
            piece(plan_.axis[1].out, plan_.band.columns, column)};
  }

  BandWindow window_of(const BandRange& band) const {
    BandWindow window{plan_.axis[0].lines(band.row, taps_[0], true),
                      plan_.axis[1].lines(band.column, taps_[1], false), {}, {}};
    window.row_span = lines_inside(window.rows, plan_.axis[0].in);
    window.column_span = lines_inside(window.columns, plan_.axis[1].in);
    return window;
  }

  // Announces the band that follows, a few cache lines of which each tile then fetches.
  void prefetch(int64_t index, const S* dy, const int64_t dy_stride[4], const S* x,
                const int64_t x_stride[4]) {
    next_grad_ = next_image_ = Prefetcher();
    if (index >= plan_.band_count()) return;
    const BandRange band = band_range(index);
    const BandWindow window = window_of(band);
    auto inside = [](const Lines& lines, Span span) -> Range {
      if (span.begin == span.end) return {0, 0};
      const int64_t first = lines.source(span.begin);
      return {first, lines.source(span.end - 1) + 1 - first};
    };
    next_grad_ = Prefetcher(dy, dy_stride, {band.image, out_, band.row, band.column});
    const Range read = plan_.lanes ? out_ : channels_;
    next_image_ = Prefetcher(x, x_stride, {band.image, read, inside(window.rows, window.row_span),
                                           inside(window.columns, window.column_span)});
  }
  // Which of the two operands the next kernel fetches, and how many lines at a time, where so many
  // kernels are left.
  Prefetcher& next() { return next_grad_.lines() > 0 ? next_grad_ : next_image_; }
  int64_t fetch_lines(int64_t kernels, const PixelLoops& loops) const {
    const int64_t lines = next_grad_.lines() + next_image_.lines();
    return ceil_div(lines, std::max<int64_t>(1, kernels) * loops.fetches());
  }

  template <class D, class Row>
  void store_run(const Row& row, int64_t first, const T* from, int64_t count) const {
    constexpr int64_t most = 64;
    T turned[L * most];
    for (int64_t o = 0; o < out_.count; o += L) {
      const int64_t width = std::min(L, out_.count - o);
      for (int64_t e = 0; e < count; e += most) {
        const int64_t length = std::min(most, count - e);
        const T* sums = from + e * ldc_ + o + overlap(o);
        if constexpr (std::is_same_v<D, T>) {
          D* to = row(out_.begin + o);
          transpose(to + first + e, row(out_.begin + o + 1) - to, sums, ldc_, 1, length, width);
          continue;
        }
        transpose(turned, most, sums, ldc_, 1, length, width);
        for (int64_t i = 0; i < width; ++i)
          narrow_run(row(out_.begin + o + i) + first + e, turned + i * most, length);
      }
    }
  }

  // All elements of a patch see all pixels: zeros are packed where those lie outside.
  void multiply_all_taps(const BandRange& band, const BandWindow& window, bool accumulate) {
    const int64_t row_step = window.rows.tap_step * pitch_ * pixel_step_;
    const int64_t column_step = window.columns.tap_step * pixel_step_;
    const int64_t rows = taps_[0].count, columns = taps_[1].count, C = channels_.count;
    offsets_.resize(C * rows * columns);
    for (int64_t c = 0; c < C; ++c)
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j)
          offsets_[element(c, i, j)] = c * channel_step_ + i * row_step + j * column_step;
    const PixelLoops loops = pixels_of(band, window, {0, band.row.count}, {0, band.column.count});
    int64_t left = 0;
    for (int64_t o = 0; o < out_.count; o += NR)
      left += Tiles<T>(offsets_.size(), Side::broadcast, out_.count - o).count();
    for (int64_t o = 0; o < out_.count; o += NR) {
      const T* image = image_ + o / NR * strip_step_;
      const T* grad = grad_ + o * band.pixels();
      const Tiles<T> tiles(offsets_.size(), plan_.lanes ? Side::lanes : Side::broadcast,
                           out_.count - o);
      tiles.for_each([&](int64_t e, TileKernel<T> kernel) {
        kernel(image, offsets_.data() + e, grad, loops, sums_ + e * ldc_ + o, ldc_, accumulate,
               next(), fetch_lines(left--, loops));
      });
    }
  }

  // Each tap for itself: a tile spans channels.
  void multiply_clipped_taps(const BandRange& band, const BandWindow& window, bool accumulate) {
    const int64_t C = channels_.count, taps = taps_[0].count * taps_[1].count;
    offsets_.resize(C);
    for (int64_t c = 0; c < C; ++c) offsets_[c] = c * channel_step_;
    clipped_.clear();
    for (int64_t i = 0; i < taps_[0].count; ++i) {
      const Span rows = plan_.axis[0].inside(band.row, taps_[0].begin + i);
      for (int64_t j = 0; j < taps_[1].count; ++j) {
        const Span columns = plan_.axis[1].inside(band.column, taps_[1].begin + j);
        const int64_t u = rows.begin * window.rows.out_step + i * window.rows.tap_step;
        const int64_t v = columns.begin * window.columns.out_step + j * window.columns.tap_step;
        clipped_.push_back({(u - window.row_span.begin) * pitch_ + v - window.column_span.begin,
                            (rows.begin * band.column.count + columns.begin) * grad_step_,
                            pixels_of(band, window, rows, columns)});
      }
    }
    const int64_t next_channel = element(1, 0, 0) * ldc_;
    int64_t left = 0;
    for (int64_t o = 0; o < out_.count; o += NR)
      left += Tiles<T>(C, Side::broadcast, out_.count - o).count() * taps;
    for (int64_t o = 0; o < out_.count; o += NR) {
      const Tiles<T> tiles(C, Side::broadcast, out_.count - o);
      tiles.for_each([&](int64_t c, TileKernel<T> kernel) {
        for (int64_t tap = 0; tap < taps; ++tap) {
          const TapPixels& pixels = clipped_[tap];
          const int64_t lines = fetch_lines(left--, pixels.loops);
          if (pixels.loops.empty() && accumulate) continue;
          const int64_t row = element(c, tap / taps_[1].count, tap % taps_[1].count);
          kernel(image_ + pixels.image, offsets_.data() + c,
                 grad_ + o * band.pixels() + pixels.grad, pixels.loops, sums_ + row * ldc_ + o,
                 next_channel, accumulate, next(), lines);
        }
      });
    }
  }

  // Depth-wise, without packing: pixels that the same taps reach are summed together, away from the
  // image's border by all taps.
  void multiply_in_place(const BandRange& band, const T* dy, const int64_t dy_stride[4], const T* x,
                         const int64_t x_stride[4]) {
    const Axis *axis = plan_.axis;
    const auto row_segments = segments_of(axis[0], band.row, taps_[0].count);
    const auto column_segments = segments_of(axis[1], band.column, taps_[1].count);
    dy += band.image.begin * dy_stride[0] + out_.begin;
    x += band.image.begin * x_stride[0] + out_.begin;
    for (const Segment& rows : row_segments) {
      for (const Segment& columns : column_segments) {
        const PixelLoops loops(
            {columns.lines.count, axis[1].stride * x_stride[3], dy_stride[3]},
            {rows.lines.count, axis[0].stride * x_stride[2], dy_stride[2]},
            {band.image.count, x_stride[0], dy_stride[0]});
        const T* grad = dy + rows.lines.begin * dy_stride[2] + columns.lines.begin * dy_stride[3];
        const T* image = x +
                         axis[0].source(rows.lines.begin, rows.taps.begin) * x_stride[2] +
                         axis[1].source(columns.lines.begin, columns.taps.begin) * x_stride[3];
        offsets_.clear();
        for (int64_t i = 0; i < rows.taps.count; ++i)
          for (int64_t j = 0; j < columns.taps.count; ++j)
            offsets_.push_back(i * axis[0].dilation * x_stride[2] +
                               j * axis[1].dilation * x_stride[3]);
        // Rows of the sums are contiguous along a row of taps, and from row to row if all are here.
        const bool all = columns.taps.count == taps_[1].count;
        const int64_t runs = all ? 1 : rows.taps.count, run = offsets_.size() / runs;
        // The border is too short to fetch anything meanwhile.
        const bool inner = all && rows.taps.count == taps_[0].count;
        int64_t left = ceil_div(out_.count, NR) * Tiles<T>(run, Side::lanes, NR).count();
        for (int64_t o = 0, width; o < out_.count; o += width) {
          width = out_.count - o >= NR ? NR : L;
          const int64_t from = o - overlap(o);
          const Tiles<T> tiles(run, Side::lanes, width);
          for (int64_t i = 0; i < runs; ++i) {
            T* sums = sums_ + element(0, rows.taps.begin + i, columns.taps.begin) * ldc_ + o;
            tiles.for_each([&](int64_t e, TileKernel<T> kernel) {
              kernel(image + from, offsets_.data() + i * run + e, grad + from, loops,
                     sums + e * ldc_, ldc_, true, next(), inner ? fetch_lines(left--, loops) : 0);
            });
          }
        }
      }
    }
  }

  // Channels that the last vector, if not full, has in common with the one before: its sums begin
  // with them.
  int64_t overlap(int64_t o) const {
    return plan_.direct ? std::max<int64_t>(0, o + L - out_.count) : 0;
  }

  // Row of the sums that holds an element of the patch, counted from the block's first.
  int64_t element(int64_t c, int64_t i, int64_t j) const {
    return channels_inside_ ? (i * taps_[1].count + j) * channels_.count + c
                            : (c * taps_[0].count + i) * taps_[1].count + j;
  }

  PixelLoops pixels_of(const BandRange& band, const BandWindow& window, Span rows,
                       Span columns) const {
    const int64_t width = band.column.count, height = band.row.count;
    return PixelLoops(
        {columns.end - columns.begin, window.columns.out_step * pixel_step_, grad_step_},
        {rows.end - rows.begin, window.rows.out_step * pitch_ * pixel_step_, width * grad_step_},
        {band.image.count, image_rows_ * pitch_ * pixel_step_, height * width * grad_step_});
  }
};

template <class S>
void weight_grad(const Conv2dShape& shape, View4 dy, View4 x, View4 dw) {
  using T = Compute<S>;
  WeightGradPlan<T> plan(shape, x);
  const int64_t G = plan.groups, O = plan.out_channels, E = plan.elements();
  if constexpr (std::is_same_v<S, T>) plan.read_directly(dy, x);
  const auto split = SplitSum<T>::of_bands(plan.band_count(), G * O * E, plan.scratch_bytes());
  const int64_t parts = split.parts;
  plan.divide_among(thread_count(), G * parts);

  const bool channels_inside = dw.stride[1] == 1;
  const int64_t blocks = plan.block_count();
  S* const result = static_cast<S*>(dw.data);
  parallel_for(blocks * G * parts, [&](int64_t task) {
    const int64_t block = task % blocks, g = task / blocks % G, part = task / blocks / G;
    BlockSum<S> sum(plan, Scratch(plan.scratch_bytes()), block, channels_inside);
    const S* grad = static_cast<const S*>(dy.data) + g * O * dy.stride[1];
    const S* image = static_cast<const S*>(x.data) + g * plan.channels * x.stride[1];
    const int64_t begin = split.begin(part), end = split.end(part);
    if (begin == end) sum.clear();
    for (int64_t band = begin; band < end; ++band)
      sum.add_band(band, grad, dy.stride, image, x.stride, band != begin);
    if (parts > 1) {
      sum.template store_to<T>(
          [&](int64_t o) { return split.partial(part) + (g * O + o) * E; }, dw.stride + 1);
    } else {
      sum.template store_to<S>([&](int64_t o) { return result + (g * O + o) * dw.stride[0]; },
                               dw.stride + 1);
    }
  });
  if (parts == 1) return;
  parallel_for(G * O, [&](int64_t row) {
    split.sum_run(row * E, E, [&](int64_t at, const T* sums, int64_t count) {
      narrow_run(result + row * dw.stride[0] + at, sums, count);
    });
  });
}

}  // namespace

void conv2d_weight_grad(DType dtype, const Conv2dShape& shape, View4 dy, View4 x, View4 dw) {
  bool done = false;
  dispatch(dtype, [&](auto s) { done = pixel_weight_grad<decltype(s)>(shape, dy, x, dw); });
  if (done) return;
  if (planar_weight_grad_pays(dtype, shape, x))
    return conv2d_weight_grad_planar(dtype, shape, dy, x, dw);
  dispatch(dtype, [&](auto s) { weight_grad<decltype(s)>(shape, dy, x, dw); });
}

}  // namespace pyvit
