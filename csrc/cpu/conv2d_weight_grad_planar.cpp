// dw[o, e] = Σ_p dy[o, p] · patch(x)[e, p] with the pixels p in the lanes of the vectors. The lanes
// are full however few channels a group has; what it costs is that the lanes of each sum must be
// added up in the end, and that channels-last operands are turned into planes. A tap reads the
// image's plane shifted; rows lie in a plane with the padding between them, so that the pixels of
// a band are one run for all taps.
#include "conv2d_weight_grad_planar.h"

#include "conv2d_weight_grad_planar_pack.h"
#include "conv2d_weight_grad_planar_plan.h"
#include "conv2d_weight_grad_planar_tile.h"
#include "split_sum.h"

namespace pyvit {
namespace {

using namespace weight_gradient;

// One block of dw: some output channels and channels of some groups, summed over some bands.
template <class S>
class PlanarSum {
  using T = Compute<S>;
  static constexpr int64_t L = kLanes<T>;
  // Lines fetched at a time, at most: a product that is too short to hide them leaves them to the
  // processor, which fetches long runs by itself.
  static constexpr int64_t kMostLines = 16;
  const PlanarPlan<T>& plan_;
  const Range groups_, outs_, channels_;
  const int64_t elements_, plane_step_;
  T *const sums_, *const image_, *const grad_;
  MaskBits<T>* const mask_;
  Prefetcher next_grad_, next_image_;
  int64_t kernels_ = 0;  // that a band takes
  std::vector<int64_t> offsets_;  // of the elements of a patch in the packed image
  int64_t rows_ = 0, images_ = 0, columns_ = 0, first_column_ = 0;  // it is for

 public:
  PlanarSum(const PlanarPlan<T>& plan, Scratch scratch, int64_t block)
      : plan_(plan),
        groups_(plan.block_range(0, block % plan.blocks(0))),
        outs_(plan.block_range(1, block / plan.blocks(0) % plan.blocks(1))),
        channels_(plan.block_range(2, block / plan.blocks(0) / plan.blocks(1))),
        elements_(channels_.count * plan.taps()),
        plane_step_(plan.plane_step()),
        sums_(scratch.take<T>(plan.sum_elements() + L * L)),
        image_(scratch.take<T>(plan.image_elements())),
        grad_(scratch.take<T>(plan.grad_elements())),
        mask_(scratch.take<MaskBits<T>>(plan.plane_step())) {
    for (int64_t c = 0; c < channels_.count; ++c)
      for (const auto& row : plan.rows.taps)
        for (const auto& column : plan.columns.taps)
          offsets_.push_back(
              ((c * plan.rows.phases.size() + row.phase) * plan.columns.phases.size() +
               column.phase) * plane_step_ + row.shift * plan.pitch() + column.shift);
    equal_parts(outs_.count, kPlanarOuts, [&](int64_t, int64_t height) {
      kernels_ += groups_.count * ceil_div(elements_, kPlanarElements[height]);
    });
  }

  void clear() { std::fill(sums_, sums_ + plan_.sum_elements(), T(0)); }

  void add_band(int64_t index, const S* dy, const int64_t dy_stride[4], const S* x,
                const int64_t x_stride[4], bool accumulate) {
    const BandRange band = band_range(index);
    const PlanePacker<S> packer(plan_);
    const PixelVectors pixels = pixel_vectors(band);
    prepare(band, pixels);
    const int64_t outs = groups_.count * outs_.count, channels = groups_.count * channels_.count;
    packer.pack_grad(grad_, dy + (groups_.begin * plan_.outs + outs_.begin) * dy_stride[1],
                     dy_stride, band, outs);
    packer.pack_image(image_, x + (groups_.begin * plan_.channels + channels_.begin) * x_stride[1],
                      x_stride, band, channels);
    prefetch(index + 1, dy, dy_stride, x, x_stride);
    int64_t lines = ceil_div(next_grad_.lines() + next_image_.lines(), kernels_ * pixels.fetches());
    if (lines > kMostLines) lines = 0;
    for (int64_t g = 0; g < groups_.count; ++g) {
      const T* image = image_ + g * channels_.count * plan_.phases() * plane_step_;
      equal_parts(outs_.count, kPlanarOuts, [&](int64_t o, int64_t height) {
        const int64_t out = g * outs_.count + o;
        equal_parts(elements_, kPlanarElements[height], [&](int64_t e, int64_t width) {
          planar_kernel_for<T>(height, width)(
              image, offsets_.data() + e, grad_ + out * plane_step_, plane_step_, mask_, pixels,
              sums_ + (out * elements_ + e) * L, elements_ * L, accumulate,
              next_grad_.lines() > 0 ? next_grad_ : next_image_, lines);
        });
      });
    }
  }

  // Hands out the finished sums: row(o) is where the elements of output channel o go, `stride`
  // those of channel, row tap and column tap there.
  template <class D, class Row>
  void store_to(const Row& row, const int64_t stride[3]) const {
    const int64_t count = groups_.count * outs_.count * elements_;
    add_lanes(count);
    const T* from = sums_;
    for (int64_t g = groups_.begin; g < groups_.begin + groups_.count; ++g) {
      for (int64_t o = 0; o < outs_.count; ++o) {
        D* to = row(g * plan_.outs + outs_.begin + o) + channels_.begin * stride[0];
        for (int64_t c = 0; c < channels_.count; ++c, to += stride[0])
          for (size_t i = 0; i < plan_.rows.taps.size(); ++i)
            for (size_t j = 0; j < plan_.columns.taps.size(); ++j)
              to[i * stride[1] + j * stride[2]] = narrow<D>(*from++);
      }
    }
  }

 private:
  BandRange band_range(int64_t index) const {
    const int64_t column = index % plan_.bands[2], row = index / plan_.bands[2] % plan_.bands[1];
    return {piece(plan_.images, plan_.band.images, index / plan_.bands[2] / plan_.bands[1]),
            piece(plan_.rows.out, plan_.band.rows, row),
            piece(plan_.columns.out, plan_.band.columns, column)};
  }

  // Announces the band that follows, a few cache lines of which each tile then fetches.
  void prefetch(int64_t index, const S* dy, const int64_t dy_stride[4], const S* x,
                const int64_t x_stride[4]) {
    next_grad_ = next_image_ = Prefetcher();
    if (index >= plan_.band_count()) return;
    const BandRange band = band_range(index);
    auto source = [](const PhasedAxis& axis, Range q) -> Range {
      const int64_t first = std::max<int64_t>(0, q.begin * axis.stride - axis.padding);
      const int64_t last = (q.begin + q.count + axis.halo) * axis.stride - axis.padding;
      return {first, std::max<int64_t>(0, std::min(last, axis.in) - first)};
    };
    next_grad_ = Prefetcher(dy, dy_stride,
                            {band.image, {groups_.begin * plan_.outs + outs_.begin,
                                          groups_.count * outs_.count}, band.row, band.column});
    next_image_ = Prefetcher(x, x_stride,
                             {band.image, {groups_.begin * plan_.channels + channels_.begin,
                                           groups_.count * channels_.count},
                              source(plan_.rows, band.row), source(plan_.columns, band.column)});
  }

  PixelVectors pixel_vectors(const BandRange& band) const {
    const int64_t run = (band.row.count - 1) * plan_.pitch() + band.column.count;
    const int64_t step = plan_.image_step(), more = band.image.count - 1;
    if (plan_.run_on) return {1, 0, ceil_div(more * step + run, L)};
    return {band.image.count, step, ceil_div(run, L)};
  }

  // Where a vector holds what is no pixel of the band, dy and the mask are 0; so is the image where
  // all bands like this one read outside.
  void prepare(const BandRange& band, PixelVectors pixels) {
    if (band.row.count == rows_ && band.column.count == columns_ && band.image.count == images_ &&
        band.column.begin == first_column_)
      return;
    rows_ = band.row.count, columns_ = band.column.count, images_ = band.image.count;
    first_column_ = band.column.begin;
    std::fill(grad_, grad_ + plan_.grad_elements(), T(0));
    std::fill(image_, image_ + plan_.image_elements(), T(0));
    std::fill(mask_, mask_ + pixels.count * L, 0);
    for (int64_t n = 0; n < (plan_.run_on ? images_ : 1); ++n)
      for (int64_t r = 0; r < rows_; ++r)
        std::fill_n(mask_ + n * plan_.image_step() + r * plan_.pitch(), columns_, -1);
  }

  // sums[i] = Σ_lane sums[i · L + lane].
  void add_lanes(int64_t count) const {
    for (int64_t i = 0; i < count; i += L) {
      T turned[L * L];
      transpose_block(turned, L, static_cast<const T*>(sums_ + i * L), L);
      Vec<T> total = load(turned);
      for (int l = 1; l < L; ++l) total += load(turned + l * L);
      store(sums_ + i, total);
    }
  }
};

template <class S>
void planar_weight_grad(const Conv2dShape& shape, View4 dy, View4 x, View4 dw) {
  using T = Compute<S>;
  PlanarPlan<T> plan(shape, x.stride[1] == 1 || dy.stride[1] == 1);
  const int64_t rows = shape.out_channels, E = plan.elements();
  // Many groups are tasks enough.
  const auto split = SplitSum<T>::of_bands(plan.band_count(), rows * E, plan.scratch_bytes(),
                                           ceil_div(32, shape.groups));
  const int64_t parts = split.parts;
  plan.divide_among(thread_count(), parts);

  const int64_t blocks = plan.block_count();
  S* const result = static_cast<S*>(dw.data);
  parallel_for(blocks * parts, [&](int64_t task) {
    const int64_t part = task / blocks, begin = split.begin(part), end = split.end(part);
    PlanarSum<S> sum(plan, Scratch(plan.scratch_bytes()), task % blocks);
    if (begin == end) sum.clear();
    for (int64_t band = begin; band < end; ++band)
      sum.add_band(band, static_cast<const S*>(dy.data), dy.stride, static_cast<const S*>(x.data),
                   x.stride, band != begin);
    if (parts > 1) {
      sum.template store_to<T>([&](int64_t o) { return split.partial(part) + o * E; },
                               dw.stride + 1);
    } else {
      sum.template store_to<S>([&](int64_t o) { return result + o * dw.stride[0]; },
                               dw.stride + 1);
    }
  });
  if (parts == 1) return;
  parallel_for(rows, [&](int64_t row) {
    split.sum_run(row * E, E, [&](int64_t at, const T* sums, int64_t count) {
      narrow_run(result + row * dw.stride[0] + at, sums, count);
    });
  });
}

// Of the pixels, those for which an average tap reads inside the image.
double inside_fraction(const Conv2dShape& s, int a) {
  const int64_t out = a == 0 ? s.out_height : s.out_width, in = a == 0 ? s.height : s.width;
  int64_t within = 0;
  for (int64_t tap = 0; tap < s.kernel[a]; ++tap) {
    const Span span = inside(tap * s.dilation[a] - s.padding[a], s.stride[a], in, out);
    within += span.end - span.begin;
  }
  return static_cast<double>(within) / (s.kernel[a] * out);
}

constexpr int64_t kMostScratch = 1 << 20;

// Depth-wise layers only where their channels would not fill a vector. Otherwise the costs of both
// ways are estimated, in vectors' products; the factors were measured.
template <class T>
bool planar_pays(const Conv2dShape& s, View4 x) {
  constexpr int64_t L = kLanes<T>;
  const PlanarPlan<T> plan(s, false);
  if (plan.scratch_bytes() > kMostScratch) return false;  // taps far apart, or very many
  if (is_depthwise(s)) return s.in_channels < L;
  const int64_t pixels = s.batch * s.out_height * s.out_width;
  const double products = static_cast<double>(plan.outs) * plan.elements();
  const double packed = ceil_div(plan.channels * plan.phases() + plan.outs, L);
  // Every sum costs the addition of its lanes; some strided rows are packed one by one.
  const bool single_pixels = x.stride[1] != 1 && s.stride[1] * x.stride[3] > 2;
  // Pixels that are turned one by one, to a plane for each phase.
  const bool far_apart = x.stride[1] == 1 && s.stride[1] > 2 && plan.taps() > 1 && plan.outs > L;
  const double planar = products * (1.15 * plan.vectors() + 24) +
                        (single_pixels ? 40 : far_apart ? 28 : 12) * packed * plan.pixels();
  // A single vector of output channels costs more than each of two; a first layer packs less.
  const int64_t vectors = ceil_div(plan.outs, L), single = vectors % 2;
  const bool first = plan.channels < 8 && s.groups == 1;
  const double inside = plan.channels < 8 ? 1 : inside_fraction(s, 0) * inside_fraction(s, 1);
  const double other = inside * pixels * plan.elements() * (vectors + 0.42 * single) +
                       (plan.taps() == 1 ? 12 : first ? 16 : 28) * packed * pixels + 4000;
  return planar < other;
}

}  // namespace

bool planar_weight_grad_pays(DType dtype, const Conv2dShape& shape, View4 x) {
  bool pays = false;
  dispatch(dtype, [&](auto s) { pays = planar_pays<Compute<decltype(s)>>(shape, x); });
  return pays;
}

void conv2d_weight_grad_planar(DType dtype, const Conv2dShape& shape, View4 dy, View4 x,
                               View4 dw) {
  dispatch(dtype, [&](auto s) { planar_weight_grad<decltype(s)>(shape, dy, x, dw); });
}

}  // namespace pyvit
