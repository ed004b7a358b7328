// Convolution (forward, or the input gradient at stride 1) of planar images to a few planar
// channels, such as a segmentation's last layer or a filter of a grey image.
//
// Pixels take the vector side. A task owns some rows of one image's result. It copies the rows
// under them, a few source channels at a time, to a band with zeros beside the image; a box of
// rows is then one line of pixels, of which every tap reads a shifted copy, and the pixels that
// fall between two rows are summed in vain. A 1×1 layer reads the image itself.
//
// Sums run over chunks of source channels, and inside a chunk over (channel, row tap, column tap):
// their order depends on the convolution's channels and kernel alone.
#include "conv2d_planes.h"

#include <algorithm>
#include <vector>

#include "conv2d_planes_kernel.h"
#include "parallel.h"

namespace pyvit {
namespace {

constexpr int64_t kChunk = 64;                  // terms of a sum in registers, about
constexpr int64_t kStreams = 16;                // planes of a 1×1 layer read from memory at a time
constexpr int64_t kPlaneBandBytes = 128 << 10;  // of the copied image
constexpr int64_t kPlaneSumBytes = 96 << 10;
constexpr int64_t kPlaneWeightBytes = 256 << 10;

template <class S>
struct PlanePlan {
  using T = Compute<S>;
  static constexpr int64_t L = kLanes<T>;
  const Gather<S>& g;
  int64_t K, chunk, first[2], span[2];  // of the taps' offsets
  bool pointwise;                       // the image is read in place
  int64_t rows, columns;                // of a box
  bool possible = false;

  explicit PlanePlan(const Phases<S>& phases) : g(phases.list[0]) {
    const PatchSource<S>& s = g.source;
    if (phases.list.size() > 1 || s.stride[3] != 1 || g.destination.stride[3] != 1 ||
        s.step[0] != 1 || s.step[1] != 1 || g.destination.channels > PlaneTile<T>::channels ||
        s.patch_size() == 0)
      return;
    for (int axis = 0; axis < 2; ++axis) {
      auto by_offset = [](const Tap& a, const Tap& b) { return a.offset < b.offset; };
      const auto [least, most] =
          std::minmax_element(s.taps[axis].begin(), s.taps[axis].end(), by_offset);
      first[axis] = least->offset;
      span[axis] = most->offset - least->offset;
    }
    const int64_t taps = s.patch_size() / s.channels, element = sizeof(T);
    K = s.patch_size();
    chunk = std::min(s.channels, std::max<int64_t>(1, taps == 1 ? kStreams : kChunk / taps));
    pointwise = std::is_same_v<S, T> && taps == 1 && first[0] == 0 && first[1] == 0 &&
                s.grid[0] <= s.height && s.grid[1] <= s.width;
    // Between two rows lie as many pixels as the kernel spans.
    if (s.grid[1] < span[1] || K * g.destination.channels * element > kPlaneWeightBytes) return;
    columns = s.grid[1];
    rows = s.grid[0];
    const int64_t most = kPlaneSumBytes / (g.destination.channels * element);
    if (taps == 1) {
      columns = std::min(columns, round_up(most, L));
      rows = 1;
    }
    auto fits = [&](int64_t r) {
      return r * pitch() <= most &&
             (pointwise || chunk * (r + span[0]) * pitch() * element <= kPlaneBandBytes);
    };
    while (rows > 1 && !fits(rows)) rows = ceil_div(rows, 2);
    while (rows > 4 && boxes() * g.batch * g.groups < 2 * thread_count()) rows = ceil_div(rows, 2);
    possible = scratch_bytes() <= kScratchLimit;
  }

  int64_t pitch() const { return columns + span[1]; }
  int64_t band_plane() const { return (rows + span[0]) * pitch(); }
  int64_t tile() const { return PlaneTile<T>::vectors[g.destination.channels - 1] * L; }
  int64_t band_elements() const { return chunk * band_plane() + tile(); }
  int64_t sum_plane() const { return round_up(rows * pitch(), L); }
  int64_t boxes_across() const { return ceil_div(g.source.grid[1], columns); }
  int64_t boxes() const { return ceil_div(g.source.grid[0], rows) * boxes_across(); }
  int64_t scratch_bytes() const {
    return Scratch::bytes_for<T>(K * g.destination.channels) +
           Scratch::bytes_for<int64_t>(chunk * K / g.source.channels) +
           Scratch::bytes_for<T>(band_elements()) +
           Scratch::bytes_for<T>(g.destination.channels * sum_plane());
  }
};

template <class S>
class PlaneWorker {
  using T = Compute<S>;
  static constexpr int64_t L = kLanes<T>;

 public:
  explicit PlaneWorker(const PlanePlan<S>& plan)
      : plan_(plan), outs_(plan.g.destination.channels), taps_(plan.K / plan.g.source.channels) {
    Scratch scratch(plan.scratch_bytes());
    weights_ = scratch.take<T>(plan.K * outs_);
    offsets_ = scratch.take<int64_t>(plan.chunk * taps_);
    band_ = scratch.take<T>(plan.band_elements());
    sums_ = scratch.take<T>(outs_ * plan.sum_plane());
  }

  void run(int64_t task) {
    const int64_t boxes = plan_.boxes(), group = task / boxes / plan_.g.batch;
    if (group != group_) enter(group);
    const int64_t box = task % boxes;
    image_ = task / boxes % plan_.g.batch;
    row_ = box / plan_.boxes_across() * plan_.rows;
    rows_ = std::min(plan_.rows, g_.source.grid[0] - row_);
    const int64_t column = box % plan_.boxes_across() * plan_.columns;
    const int64_t columns = std::min(plan_.columns, g_.source.grid[1] - column);
    // The last vector of a line is read whole, which only a copy allows.
    const int64_t in_place = plan_.pointwise ? columns / L * L : 0;
    if (in_place > 0) sum(column, in_place, true);
    if (in_place < columns) sum(column + in_place, columns - in_place, false);
  }

 private:
  void enter(int64_t group) {
    group_ = group;
    g_ = plan_.g.group(group);
    T* to = weights_;
    for (int64_t c = 0; c < g_.source.channels; ++c)
      for (const Tap& i : g_.source.taps[0])
        for (const Tap& j : g_.source.taps[1])
          for (int64_t o = 0; o < outs_; ++o)
            *to++ = widen(g_.weights.at(o, c, i.kernel, j.kernel));
  }

  // The box's columns [column, column + columns).
  void sum(int64_t column, int64_t columns, bool in_place) {
    const PatchSource<S>& s = g_.source;
    const int64_t pitch = columns + plan_.span[1], line = (rows_ - 1) * pitch + columns;
    const int64_t plane = (rows_ + plan_.span[0]) * pitch;
    for (int64_t o = 0; o < outs_; ++o)
      std::fill_n(sums_ + o * plan_.sum_plane(), round_up(line, L),
                  g_.bias == nullptr ? T(0) : widen(g_.bias[o]));
    set_offsets(in_place ? s.stride[1] : plane, pitch);
    for (int64_t c = 0; c < s.channels; c += plan_.chunk) {
      const int64_t count = std::min(plan_.chunk, s.channels - c);
      const T* x = band_;
      if (in_place) {
        if constexpr (std::is_same_v<S, T>)
          x = s.data + image_ * s.stride[0] + c * s.stride[1] + row_ * s.stride[2] + column;
      } else {
        pack(c, count, column, pitch);
      }
      multiply(x, weights_ + c * taps_ * outs_, count * taps_, line);
    }
    store(column, columns, pitch);
  }

  void set_offsets(int64_t plane, int64_t pitch) {
    int64_t* to = offsets_;
    for (int64_t c = 0; c < plan_.chunk; ++c)
      for (const Tap& i : g_.source.taps[0])
        for (const Tap& j : g_.source.taps[1])
          *to++ = c * plane + (i.offset - plan_.first[0]) * pitch + j.offset - plan_.first[1];
  }

  void pack(int64_t channel, int64_t count, int64_t column, int64_t pitch) {
    const PatchSource<S>& s = g_.source;
    const S* image = s.data + image_ * s.stride[0] + channel * s.stride[1];
    T* to = band_;
    for (int64_t c = 0; c < count; ++c, image += s.stride[1]) {
      for (int64_t r = 0; r < rows_ + plan_.span[0]; ++r, to += pitch) {
        const int64_t h = row_ + plan_.first[0] + r;
        if (h < 0 || h >= s.height) {
          std::fill_n(to, pitch, T(0));
        } else {
          copy_clipped(to, image + h * s.stride[2], column + plan_.first[1], 1, 1, s.width, pitch);
        }
      }
    }
  }

  void multiply(const T* x, const T* weights, int64_t length, int64_t line) const {
    typename PlaneTile<T>::Arguments tile;
    tile.offsets = offsets_;
    tile.length = length;
    tile.w = weights;
    tile.c_pitch = plan_.sum_plane();
    const int64_t vectors = ceil_div(line, L), most = PlaneTile<T>::vectors[outs_ - 1];
    for (int64_t v = 0; v < vectors;) {
      const int64_t parts = ceil_div(vectors - v, most), count = (vectors - v) / parts;
      tile.x = x + v * L;
      tile.c = sums_ + v * L;
      run_plane_kernel<T>(outs_, count, tile);
      v += count;
    }
  }

  void store(int64_t column, int64_t columns, int64_t pitch) const {
    const Destination<S>& d = g_.destination;
    for (int64_t o = 0; o < outs_; ++o) {
      S* out = d.data + image_ * d.stride[0] + o * d.stride[1] + row_ * d.stride[2] + column;
      for (int64_t r = 0; r < rows_; ++r)
        narrow_run(out + r * d.stride[2], sums_ + o * plan_.sum_plane() + r * pitch, columns);
    }
  }

  const PlanePlan<S>& plan_;
  const int64_t outs_, taps_;
  Gather<S> g_;
  T *weights_, *band_, *sums_;
  int64_t* offsets_;
  int64_t group_ = -1, image_ = 0, row_ = 0, rows_ = 0;
};

}  // namespace

template <class S>
bool conv2d_planes(const Phases<S>& phases) {
  const PlanePlan<S> plan(phases);
  if (!plan.possible) return false;
  parallel_ranges(plan.g.groups * plan.g.batch * plan.boxes(), [&](int64_t begin, int64_t end) {
    PlaneWorker<S> worker(plan);
    for (int64_t task = begin; task < end; ++task) worker.run(task);
  });
  return true;
}

template bool conv2d_planes(const Phases<double>&);
template bool conv2d_planes(const Phases<float>&);
template bool conv2d_planes(const Phases<bfloat16>&);
template bool conv2d_planes(const Phases<float16>&);

}  // namespace pyvit
