// Convolution (forward, or the input gradient at stride 1) of planar images to a few planar
// channels, such as a segmentation's last layer or a filter of a grey image; and 1×1 layers from a
// few planar channels, however many groups of them there are.
//
// Pixels take the vector side. A task owns some rows of one image's result. It copies the rows
// under them, a few source channels at a time, to a band with zeros beside the image; a box of
// rows is then one line of pixels, of which every tap reads a shifted copy, and the pixels that
// fall between two rows are summed in vain. A 1×1 layer reads the image itself, but where a stride
// sets pixels apart, and of few source channels writes the result itself, some channels at a time.
// A few channels of the result may also lie side by side: their planes are interleaved at the end.
//
// Sums run over chunks of source channels, and inside a chunk over (channel, row tap, column tap):
// their order depends on the convolution's channels, kernel and size alone.
#include "conv2d_planes.h"

#include <algorithm>
#include <vector>

#include "conv2d_planes_kernel.h"
#include "interleave.h"
#include "parallel.h"

namespace pyvit {
namespace {

constexpr int64_t kChunk = 64;                   // terms of a sum in registers, about
constexpr int64_t kStreams = 16;                 // planes of a 1×1 layer read from memory at a time
constexpr int64_t kSmallPlane = 64;              // pixels, of which many planes are one stream
constexpr int64_t kStreamsApart = 8;             // whose pixels must be brought together first
constexpr int64_t kFewStreams = 2;               // leave little to do but to write, plane by plane
constexpr int64_t kLeastLine = 2;                // vectors of pixels that repay a task of their own
constexpr int64_t kPlaneBandBytes = 128 << 10;   // of the copied image
constexpr int64_t kPlaneSumBytes = 96 << 10;
constexpr int64_t kPlaneSourceBytes = 24 << 10;  // of a 1×1 layer, read again for other channels
constexpr int64_t kPlaneWeightBytes = 256 << 10;

template <class S>
struct PlanePlan {
  using T = Compute<S>;
  static constexpr int64_t L = kLanes<T>;
  const Gather<S>& g;
  int64_t K, chunk, first[2], span[2];  // of the taps' offsets
  bool pointwise;                       // the image is read in place
  bool direct;                          // the result is written so, but for less than a vector
  bool interleaved;                     // the result's channels lie side by side
  int64_t together;                     // channels of the result
  int64_t rows, columns;                // of a box
  bool possible = false;

  explicit PlanePlan(const Phases<S>& phases) : g(phases.list[0]) {
    const PatchSource<S>& s = g.source;
    const bool apart = s.stride[3] != 1;  // pixels, as under a 1×1 kernel with a stride
    const Destination<S>& d = g.destination;
    interleaved = std::is_same_v<S, T> && d.channels > 1 && d.stride[1] == 1 &&
                  d.stride[3] == d.channels && !apart;
    if (phases.list.size() > 1 || (d.stride[3] != 1 && !interleaved) || s.step[0] != 1 ||
        s.step[1] != 1 || s.patch_size() == 0)
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
    const bool streams = taps == 1 && s.grid[0] * s.grid[1] > kSmallPlane;
    chunk = std::min(s.channels, std::max<int64_t>(1, streams ? kStreams : kChunk / taps));
    pointwise = std::is_same_v<S, T> && taps == 1 && first[0] == 0 && first[1] == 0 &&
                s.grid[0] <= s.height && s.grid[1] <= s.width && !apart;
    const bool rows_joined = !pointwise && g.destination.stride[2] == s.grid[1];
    direct = std::is_same_v<S, T> && !interleaved && taps == 1 && s.channels <= kStreams &&
             (rows_joined ? s.grid[0] : 1) * s.grid[1] >= kLeastLine * L;
    if (apart && (!direct || s.channels > kStreamsApart)) return;
    together = direct && s.channels <= kFewStreams ? 1 : PlaneTile<T>::rows;
    if (g.destination.channels > PlaneTile<T>::rows && !direct) return;
    // Between two rows lie as many pixels as the kernel spans.
    if (s.grid[1] < span[1] || K * g.destination.channels * element > kPlaneWeightBytes) return;
    columns = s.grid[1];
    rows = s.grid[0];
    const int64_t most = direct ? kPlaneSourceBytes / (s.channels * element)
                                : kPlaneSumBytes / (g.destination.channels * element);
    if (taps == 1) {
      columns = std::min(columns, round_up(most, L));
      if (!direct || !rows_joined || columns < s.grid[1]) rows = 1;
    }
    auto fits = [&](int64_t r) {
      return r * pitch() <= most &&
             (pointwise || chunk * (r + span[0]) * pitch() * element <= kPlaneBandBytes);
    };
    while (rows > 1 && !fits(rows)) rows = ceil_div(rows, 2);
    while (rows > 4 && tasks() < 2 * thread_count()) rows = ceil_div(rows, 2);
    while (taps == 1 && columns > 8 * L && tasks() < 2 * thread_count())
      columns = round_up(ceil_div(columns, 2), L);
    possible = scratch_bytes() <= kScratchLimit;
  }

  int64_t pitch() const { return columns + span[1]; }
  int64_t band_plane() const { return pointwise ? L : (rows + span[0]) * pitch(); }
  int64_t band_elements() const {
    return chunk * band_plane() + PlaneTile<T>::vectors[0] * L;  // of which the last is read whole
  }
  int64_t sum_plane() const { return direct ? L : round_up(rows * pitch(), L); }
  int64_t boxes_across() const { return ceil_div(g.source.grid[1], columns); }
  int64_t boxes() const { return ceil_div(g.source.grid[0], rows) * boxes_across(); }
  int64_t tasks() const { return g.groups * g.batch * boxes(); }
  int64_t scratch_bytes() const {
    return Scratch::bytes_for<T>(K * g.destination.channels) +
           Scratch::bytes_for<int64_t>(chunk * K / g.source.channels) +
           Scratch::bytes_for<T>(band_elements()) +
           Scratch::bytes_for<T>(g.destination.channels * sum_plane()) +
           Scratch::bytes_for<T>(g.destination.channels);
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
    bias_ = scratch.take<T>(outs_);
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
    sum(column, columns);
  }

 private:
  void enter(int64_t group) {
    group_ = group;
    g_ = plan_.g.group(group);
    std::fill_n(bias_, outs_, T(0));
    if (g_.bias != nullptr) widen_run(bias_, g_.bias, outs_);
    T* to = weights_;
    for (int64_t first = 0; first < outs_; first += plan_.together)
      for (int64_t c = 0; c < g_.source.channels; ++c)
        for (const Tap& i : g_.source.taps[0])
          for (const Tap& j : g_.source.taps[1])
            for (int64_t o = first; o < first + block(first); ++o)
              *to++ = widen(g_.weights.at(o, c, i.kernel, j.kernel));
  }
  // Destination channels that are summed together, from the first of them.
  int64_t block(int64_t first) const { return std::min(plan_.together, outs_ - first); }

  // Of a line in place, what may be read as whole vectors: the last one ends in what follows, or
  // begins early where the result is written so; else it is copied.
  int64_t whole_vectors(int64_t line, int64_t last_channel, int64_t column, bool direct) const {
    const PatchSource<S>& s = g_.source;
    const int64_t at =
        image_ * s.stride[0] + last_channel * s.stride[1] + row_ * s.stride[2] + column;
    const int64_t end = (g_.batch - 1) * s.stride[0] + (s.channels - 1) * s.stride[1] +
                        (s.height - 1) * s.stride[2] + s.width;
    return direct || at + round_up(line, L) <= end ? line : line / L * L;
  }

  // The box's columns [column, column + columns).
  void sum(int64_t column, int64_t columns) {
    const PatchSource<S>& s = g_.source;
    const Destination<S>& d = g_.destination;
    const int64_t pitch = columns + plan_.span[1], line = (rows_ - 1) * pitch + columns;
    const bool direct = plan_.direct && line >= L;
    typename PlaneTile<T>::Arguments tile;
    tile.offsets = offsets_;
    tile.w_pitch = 1;
    tile.from_pitch = tile.c_pitch = direct ? d.stride[1] : plan_.sum_plane();
    T* const to = direct ? reinterpret_cast<T*>(d.data) + image_ * d.stride[0] +
                               row_ * d.stride[2] + column
                         : sums_;
    for (int64_t c = 0; c < s.channels; c += plan_.chunk) {
      const int64_t count = std::min(plan_.chunk, s.channels - c);
      const int64_t whole =
          plan_.pointwise ? whole_vectors(line, c + count - 1, column, direct) : 0;
      tile.length = count * taps_;
      tile.base = c == 0 ? bias_ : nullptr;
      tile.from = tile.c = to;
      if (whole > 0) {
        tile.x = reinterpret_cast<const T*>(s.data) + image_ * s.stride[0] + c * s.stride[1] +
                 row_ * s.stride[2] + column;
        set_offsets(s.stride[1], 0);
        multiply(tile, c, whole, direct);
      }
      if (whole < line) {
        const int64_t left = pitch - whole;  // a line in place is one row
        pack(c, count, column + whole, left);
        tile.x = band_;
        tile.from = tile.c = to + whole;
        set_offsets((rows_ + plan_.span[0]) * left, left);
        multiply(tile, c, line - whole, direct);
      }
    }
    if (!direct) store(column, columns, pitch);
  }

  // All destination channels of a line, from source channel c on.
  void multiply(typename PlaneTile<T>::Arguments tile, int64_t c, int64_t line, bool direct) const {
    const T *base = tile.base, *from = tile.from;
    T* const to = tile.c;
    for (int64_t o = 0; o < outs_; o += plan_.together) {
      tile.w = weights_ + o * plan_.K + c * taps_ * block(o);
      tile.w_step = block(o);
      tile.base = base == nullptr ? nullptr : base + o;
      tile.from = from + o * tile.from_pitch;
      tile.c = to + o * tile.c_pitch;
      if (!direct) {
        run_plane_kernel<T>(block(o), ceil_div(line, L), tile);
        continue;
      }
      tile.repeats = plan_.together == 1 ? outs_ : 1;  // all of them, one behind the other
      tile.w_repeat = plan_.K, tile.base_repeat = 1, tile.c_repeat = tile.c_pitch;
      run_plane_rows<T>(block(o), line, tile);
      if (tile.repeats > 1) return;
    }
  }

  void set_offsets(int64_t plane, int64_t pitch) {
    if (plane == plane_ && pitch == pitch_) return;
    plane_ = plane, pitch_ = pitch;
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
          copy_clipped(to, image + h * s.stride[2], column + plan_.first[1], 1, s.stride[3],
                       s.width, pitch);
        }
      }
    }
  }

  void store(int64_t column, int64_t columns, int64_t pitch) const {
    const Destination<S>& d = g_.destination;
    if constexpr (std::is_same_v<S, T>) {
      S* out = d.data + image_ * d.stride[0] + row_ * d.stride[2] + column * d.stride[3];
      for (int64_t r = 0; r < rows_ && plan_.interleaved; ++r)
        interleave(out + r * d.stride[2], static_cast<const T*>(sums_ + r * pitch),
                   plan_.sum_plane(), outs_, columns);
      if (plan_.interleaved) return;
    }
    for (int64_t o = 0; o < outs_; ++o) {
      S* out = d.data + image_ * d.stride[0] + o * d.stride[1] + row_ * d.stride[2] + column;
      for (int64_t r = 0; r < rows_; ++r)
        narrow_run(out + r * d.stride[2], sums_ + o * plan_.sum_plane() + r * pitch, columns);
    }
  }

  const PlanePlan<S>& plan_;
  const int64_t outs_, taps_;
  Gather<S> g_;
  T *weights_, *band_, *sums_, *bias_;
  int64_t* offsets_;
  int64_t plane_ = -1, pitch_ = -1;  // of the offsets
  int64_t group_ = -1, image_ = 0, row_ = 0, rows_ = 0;
};

}  // namespace

template <class S>
bool conv2d_planes(const Phases<S>& phases, bool only_in_place) {
  const PlanePlan<S> plan(phases);
  if (!plan.possible || (only_in_place && !plan.direct)) return false;
  parallel_ranges(plan.tasks(), [&](int64_t begin, int64_t end) {
    PlaneWorker<S> worker(plan);
    for (int64_t task = begin; task < end; ++task) worker.run(task);
  });
  return true;
}

template bool conv2d_planes(const Phases<double>&, bool);
template bool conv2d_planes(const Phases<float>&, bool);
template bool conv2d_planes(const Phases<bfloat16>&, bool);
template bool conv2d_planes(const Phases<float16>&, bool);

}  // namespace pyvit
