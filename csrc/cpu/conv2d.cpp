// Convolution and its input gradient. Seven ways, asked in this order (at the end of this file),
// but that 1×1 groups on planar images are offered to the planes first:
//
//   depth-wise  groups of very few channels share the lanes of a vector (conv2d_depthwise.cpp)
//   small       few pixels and many channels: weights are multiplied where they lie
//               (conv2d_small.cpp)
//   scatter     input gradients of few channels from many (conv2d_scatter.cpp)
//   pixels      1×1 from a few channels to many, channels last (conv2d_pixels.cpp)
//   planes      planar images to a few planar channels, or 1×1 from a few: pixels take the vector
//               side, and are read where they lie (conv2d_planes.cpp)
//   band        channels take the vector side of the micro-kernel, windows of a padded copy of
//               the image the other (conv2d_band.cpp): nearly every layer
//   planar      pixels take the vector side, and patches are packed as panels of a GEMM (below):
//               1×1 layers on planar images, where packing is a copy, and what no other takes
#include "conv2d.h"

#include <algorithm>

#include "conv2d_band.h"
#include "conv2d_depthwise.h"
#include "conv2d_gather.h"
#include "conv2d_pixel_group.h"
#include "conv2d_pixel_strips.h"
#include "conv2d_pixels.h"
#include "conv2d_planes.h"
#include "conv2d_scatter.h"
#include "conv2d_small.h"
#include "gemm.h"
#include "transpose.h"

namespace pyvit {
namespace {

// y[o, p] = Σ_k w[o, k] · patch(x)[k, p]: A = weights, B = patches, C = [channel][pixel].

template <class S>
void pack_weight_rows(Compute<S>* dst, const Gather<S>& g, int64_t m0, int64_t mb, int64_t k0,
                      int64_t kb) {
  using T = Compute<S>;
  const auto& rows = g.source.taps[0];
  const auto& columns = g.source.taps[1];
  const int64_t* stride = g.weights.stride;
  const int64_t taps = rows.size() * columns.size();
  // Whether the kernel of one channel pair is one run of memory, in the order of the taps.
  const bool run = stride[3] == 1 && stride[2] == static_cast<int64_t>(columns.size()) &&
                   rows.back().kernel - rows[0].kernel + 1 == static_cast<int64_t>(rows.size()) &&
                   columns[0].kernel == 0 && columns.back().kernel + 1 == stride[2];
  if (taps == 1 && stride[0] == 1) {
    const S* w = &g.weights.at(m0, k0, rows[0].kernel, columns[0].kernel);
    return transpose(dst, Panel<T>::lda, w, stride[1], 1, kb, mb);
  }
  for (int64_t m = 0; m < mb; ++m) {
    T* row = dst + m * Panel<T>::lda;
    const S* w = g.weights.data + (m0 + m) * stride[0];
    if (run) {
      w += rows[0].kernel * stride[2];
      const int64_t length = stride[1] == taps ? kb : taps;  // whole channels lie side by side?
      for (int64_t k = 0; k < kb;) {
        const int64_t channel = (k0 + k) / taps, within = (k0 + k) % taps;
        const int64_t count = std::min(kb - k, std::max(length - within, taps - within));
        widen_run(row + k, w + channel * stride[1] + within, count);
        k += count;
      }
      continue;
    }
    PlanarIndex index(g.source, k0);
    for (int64_t k = 0; k < kb; ++k, index.next(g.source))
      row[k] = widen(w[index.channel * stride[1] + rows[index.row_tap].kernel * stride[2] +
                       columns[index.column_tap].kernel * stride[3]]);
  }
}

template <class S>
void pack_patch_strips(Compute<S>* dst, const PatchSource<S>& source, int64_t k0, int64_t kb,
                       int64_t n0, int64_t nb) {
  using T = Compute<S>;
  constexpr int NR = Panel<T>::NR;
  for (int64_t j = 0; j < nb; j += NR, dst += kb * NR)
    copy_pixel_group(dst, NR, source, k0, kb, n0 + j, std::min<int64_t>(NR, nb - j));
}

template <class S>
void store_planar(const Gather<S>& g, const Compute<S>* c, int64_t ldc, int64_t m0, int64_t mb,
                  int64_t n0, int64_t nb) {
  using T = Compute<S>;
  const Destination<S>& d = g.destination;
  for (int64_t m = 0; m < mb; ++m) {
    const T bias = g.bias == nullptr ? T(0) : widen(g.bias[m0 + m]);
    const T* from = c + m * ldc;
    S* channel = d.data + (m0 + m) * d.stride[1];
    for_each_run(g.source.grid, n0, nb, [&](const PixelRun& run) {
      S* out = channel + run.image * d.stride[0] + run.row * d.stride[2] +
               run.column * d.stride[3];
      if (d.stride[3] == 1) {
        for (int64_t t = 0; t < run.count; ++t) out[t] = narrow<S>(from[run.at + t] + bias);
      } else {
        for (int64_t t = 0; t < run.count; ++t)
          out[t * d.stride[3]] = narrow<S>(from[run.at + t] + bias);
      }
    });
  }
}

// Whether this is a 1×1 layer on planar images, to planar images.
template <class S>
bool pixels_are_runs(const Gather<S>& g) {
  return g.source.patch_size() == g.source.channels && g.source.taps[0][0].offset == 0 &&
         g.source.taps[1][0].offset == 0 && g.source.step[0] == 1 && g.source.step[1] == 1 &&
         g.source.grid[0] == g.source.height && g.source.grid[1] == g.source.width &&
         g.source.stride[3] == 1 && g.destination.stride[3] == 1 && g.destination.stride[1] != 1;
}

template <class S>
void run_planar(const Gather<S>& gather) {
  using T = Compute<S>;
  const int64_t K = gather.source.patch_size();
  const int64_t pixels = gather.batch * gather.source.pixels_per_image();
  const BlockGrid<T> grid(gather.destination.channels, pixels, gather.groups);
  const int64_t tasks = grid.tasks();
  const bool runs = pixels_are_runs(gather);
  parallel_for(tasks * gather.groups, [&](int64_t task) {
    const Gather<S> g = gather.group(task / tasks);
    const int64_t block = task % tasks;
    gemm_block<T>(
        grid.m0(block), grid.height(block), grid.n0(block), grid.width(block), 0, K,
        [&](T* a, int64_t m, int64_t rows, int64_t k0, int64_t kb) {
          pack_weight_rows(a, g, m, rows, k0, kb);
        },
        [&](T* b, int64_t k0, int64_t kb, int64_t n, int64_t columns) {
          if (runs) {
            pack_pixel_strips(b, g.source.data, g.source.stride, g.source.grid, k0, kb, n, columns);
          } else {
            pack_patch_strips(b, g.source, k0, kb, n, columns);
          }
        },
        [&](auto... block) { store_planar(g, block...); });
  });
}

// Where one phase alone has taps, as under a 1×1 kernel with a stride, zeros are written first, as
// one run, and that phase over them. Planar pixels would be written one by one all the same.
template <class S>
void write_zeros_first(Phases<S>& phases, const Conv2dShape& shape, const View4& dx) {
  const auto has_taps = [](const Gather<S>& phase) { return phase.source.patch_size() > 0; };
  const auto only = std::find_if(phases.list.begin(), phases.list.end(), has_taps);
  const int64_t row = shape.width * shape.in_channels;
  if (phases.list.size() < 2 || only == phases.list.end() || dx.stride[1] != 1 ||
      dx.stride[3] != shape.in_channels || std::any_of(only + 1, phases.list.end(), has_taps))
    return;
  parallel_for(shape.batch * shape.height, [&](int64_t i) {
    S* to = static_cast<S*>(dx.data) + i / shape.height * dx.stride[0];
    std::fill_n(to + i % shape.height * dx.stride[2], row, S{});
  });
  phases = {{*only}, {only->source.grid[0], only->source.grid[1]}, {1, 1}};
}

// Groups of a 1×1 layer, before a way that would copy them, or bring them to lanes.
template <class S>
bool groups_in_place(Phases<S>& phases) {
  const Gather<S>& g = phases.list[0];
  if (phases.list.size() != 1 || g.groups == 1) return false;
  if (pixels_are_runs(g)) {
    flatten_pointwise(phases);
    return conv2d_planes(phases, true);
  }
  if (g.source.patch_size() != g.source.channels || g.destination.stride[1] != 1) return false;
  Phases<S> flat = phases;
  flatten_pointwise(flat);
  return conv2d_pixels(flat);
}

// Whether most of the kernel misses the image: what scatters multiplies all of it.
template <class S>
bool mostly_idle(const Phases<S>& phases, const Conv2dShape& shape) {
  int64_t taps = 0;
  for (const Gather<S>& phase : phases.list)
    taps += phase.source.taps[0].size() * phase.source.taps[1].size();
  return 2 * taps <= shape.kernel[0] * shape.kernel[1];
}

constexpr int64_t kShortestRun = 16;

template <class S>
void run(Phases<S>& phases, const int64_t kernel[2]) {
  flatten_pointwise(phases);
  if (conv2d_pixels(phases)) return;
  if (conv2d_planes(phases)) return;
  // Runs of a few pixels are no help: the band turns them as it copies.
  const bool runs = phases.list.size() == 1 && pixels_are_runs(phases.list[0]) &&
                    phases.list[0].source.pixels_per_image() >= kShortestRun;
  if (!runs && conv2d_band(phases, kernel)) return;
  for (const Gather<S>& phase : phases.list) run_planar(phase);
}

// An image of one pixel, channels side by side, is of both layouts, and channels last is the quicker
// one to read and write: strides that nothing follows are made to say so.
void tell_layout(View4& image, int64_t channels, int64_t height, int64_t width) {
  if (height * width != 1 || image.stride[1] != 1) return;
  image.stride[2] = image.stride[3] = channels;
}

}  // namespace

void conv2d(DType dtype, const Conv2dShape& shape, View4 x, View4 w, const void* bias, View4 y) {
  tell_layout(x, shape.in_channels, shape.height, shape.width);
  tell_layout(y, shape.out_channels, shape.out_height, shape.out_width);
  dispatch(dtype, [&](auto s) {
    auto phases = forward_phases<decltype(s)>(shape, x, w, bias, y);
    drop_idle_taps(phases);
    drop_skipped_pixels(phases);
    if (groups_in_place(phases) || conv2d_depthwise(phases, shape.kernel)) return;
    if (conv2d_small(dtype, shape, x, w, bias, y)) return;
    run(phases, shape.kernel);
  });
}

void conv2d_input_grad(DType dtype, const Conv2dShape& shape, View4 dy, View4 w, View4 dx) {
  tell_layout(dy, shape.out_channels, shape.out_height, shape.out_width);
  tell_layout(dx, shape.in_channels, shape.height, shape.width);
  dispatch(dtype, [&](auto s) {
    auto phases = input_grad_phases<decltype(s)>(shape, dy, w, dx);
    drop_idle_taps(phases);
    write_zeros_first(phases, shape, dx);
    if (groups_in_place(phases) || conv2d_depthwise(phases, shape.kernel)) return;
    if (conv2d_small_input_grad(dtype, shape, dy, w, dx)) return;
    if (!mostly_idle(phases, shape) && scatter_is_cheaper(shape))
      return conv2d_input_grad_scatter(dtype, shape, dy, w, dx);
    run(phases, shape.kernel);
  });
}

}  // namespace pyvit
