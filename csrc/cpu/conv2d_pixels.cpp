// 1×1 convolution (forward or input gradient) of few channels to many, channels last, such as the
// gradient of a network's last layer. Writing the result is most of the work: its pixels are
// written one behind the other, each whole, while the weights wait in the first-level cache.
//
// Channels of the result take the vector side of conv2d_planes_kernel.h, pixels the other; both
// images are left where they lie. Sums run over the source channels, in order.
#include "conv2d_pixels.h"

#include <algorithm>

#include "conv2d_planes_kernel.h"
#include "parallel.h"
#include "transpose.h"

namespace pyvit {
namespace {

constexpr int64_t kMostSources = 16;            // channels of a group, of one pixel
constexpr int64_t kPixelPanelBytes = 24 << 10;  // of all groups' weights
constexpr int64_t kPixelBoxBytes = 128 << 10;   // of the result, by one call of a kernel
constexpr int64_t kFewTerms = 4;                // of a sum that leave little to do but to write
constexpr int64_t kLeastPixels = 64;            // of a task
constexpr int64_t kPixelsInCache = 14 << 20;    // of a result; beyond, one stream is written best

template <class T>
class Pixels {
  static constexpr int64_t L = kLanes<T>;

 public:
  explicit Pixels(const Phases<T>& phases)
      : g_(phases.list[0]), K_(g_.source.patch_size()), outs_(g_.destination.channels) {
    const PatchSource<T>& s = g_.source;
    const int64_t element = sizeof(T), row = g_.groups * outs_ * element;
    if (phases.list.size() > 1 || K_ != s.channels || K_ > kMostSources || outs_ < 2 * L ||
        g_.destination.stride[1] != 1 || s.step[0] != 1 || s.step[1] != 1 ||
        s.taps[0][0].offset != 0 || s.taps[1][0].offset != 0 || s.grid[0] > s.height ||
        s.grid[1] > s.width || K_ * row > kPixelPanelBytes)
      return;
    const int64_t bytes = g_.batch * s.grid[0] * s.grid[1] * row;
    together_ = K_ <= kFewTerms && bytes > kPixelsInCache ? 1 : PlaneTile<T>::rows;
    columns_ = std::min(s.grid[1], std::max(together_, kPixelBoxBytes / row));
    while (columns_ > kLeastPixels && tasks() < 2 * thread_count())
      columns_ = ceil_div(columns_, 2);
    possible = true;
  }

  void run() const {
    parallel_ranges(tasks(), [&](int64_t begin, int64_t end) {
      Scratch scratch(Scratch::bytes_for<T>(g_.groups * K_ * outs_) +
                      Scratch::bytes_for<T>(g_.groups * outs_) + Scratch::bytes_for<int64_t>(K_));
      T* weights = scratch.take<T>(g_.groups * K_ * outs_);
      T* bias = scratch.take<T>(g_.groups * outs_);
      int64_t* offsets = scratch.take<int64_t>(K_);
      std::fill_n(bias, g_.groups * outs_, T(0));
      if (g_.bias != nullptr) std::copy_n(g_.bias, g_.groups * outs_, bias);
      for (int64_t k = 0; k < K_; ++k) offsets[k] = k * outs_;
      const int64_t* stride = g_.weights.stride;
      const T* tap = &g_.weights.at(0, 0, g_.source.taps[0][0].kernel, g_.source.taps[1][0].kernel);
      for (int64_t group = 0; group < g_.groups; ++group)
        transpose(weights + group * K_ * outs_, outs_, tap + group * g_.group_stride, stride[0],
                  stride[1], outs_, K_);
      for (int64_t task = begin; task < end; ++task) multiply(task, weights, bias, offsets);
    });
  }

  bool possible = false;

 private:
  int64_t boxes() const { return ceil_div(g_.source.grid[1], columns_); }
  int64_t tasks() const { return g_.batch * g_.source.grid[0] * boxes(); }

  void multiply(int64_t task, const T* weights, const T* bias, const int64_t* offsets) const {
    const PatchSource<T>& s = g_.source;
    const Destination<T>& d = g_.destination;
    const int64_t column = task % boxes() * columns_, row = task / boxes() % s.grid[0];
    const int64_t image = task / boxes() / s.grid[0];
    const int64_t columns = std::min(columns_, s.grid[1] - column), rest = columns % together_;
    typename PlaneTile<T>::Arguments tile;
    tile.offsets = offsets;
    tile.length = K_;
    tile.w_step = s.stride[1], tile.w_pitch = s.stride[3];
    tile.base = nullptr;
    tile.from_pitch = 0;
    tile.c_pitch = d.stride[3];
    tile.w_repeat = together_ * tile.w_pitch, tile.c_repeat = together_ * tile.c_pitch;
    for (int64_t group = 0; group < g_.groups; ++group) {
      tile.x = weights + group * K_ * outs_;
      tile.from = bias + group * outs_;
      tile.w = s.data + image * s.stride[0] + group * K_ * s.stride[1] + row * s.stride[2] +
               column * s.stride[3];
      tile.c = d.data + image * d.stride[0] + group * outs_ + row * d.stride[2] +
               column * d.stride[3];
      tile.repeats = columns / together_;
      if (tile.repeats > 0) run_plane_rows<T>(together_, outs_, tile);
      tile.w += (columns - rest) * tile.w_pitch;
      tile.c += (columns - rest) * tile.c_pitch;
      tile.repeats = 1;
      if (rest > 0) run_plane_rows<T>(rest, outs_, tile);
    }
  }

  const Gather<T>& g_;
  const int64_t K_, outs_;  // of a group
  int64_t together_ = 1;    // pixels in one tile
  int64_t columns_ = 0;     // of a task
};

}  // namespace

template <class S>
bool conv2d_pixels(const Phases<S>& phases) {
  if constexpr (std::is_same_v<S, Compute<S>>) {
    const Pixels<S> pixels(phases);
    if (pixels.possible) pixels.run();
    return pixels.possible;
  }
  return false;
}

template bool conv2d_pixels(const Phases<double>&);
template bool conv2d_pixels(const Phases<float>&);
template bool conv2d_pixels(const Phases<bfloat16>&);
template bool conv2d_pixels(const Phases<float16>&);

}  // namespace pyvit
