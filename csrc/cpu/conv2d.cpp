// Two GEMMs (gemm.h) whose packers read patches (patches.h) straight from the image:
//
//   forward       y[o, p]  = Σ_k w[o, k] · patch(x)[k, p]        K = channels × taps
//   input grad    dx[c, p] = Σ_k w'[c, k] · patch(dy)[k, p]      the same code, see below
//
// Two arrangements, by memory layout. Planar (NCHW): pixels are contiguous, so they take the
// vector side of the micro-kernel. Channels-last: the elements of a patch are contiguous, so
// patches are rows of A and channels take the vector side.
//
// The input gradient gathers: no two tasks write one place. Input row h is read by output row
// (h + padding - i·dilation) / stride for each kernel row i where that is whole. Rows of one
// residue h mod stride share their kernel rows, and for h = residue + stride·t the output row is
// t + (residue + padding - i·dilation) / stride. So each of the stride² residues (phases) is a
// dense convolution of dy, with step 1, that writes every stride-th pixel. Layers of few input
// channels go another way: see conv2d_scatter.cpp.
#include "conv2d.h"

#include "conv2d_patches.h"
#include "conv2d_scatter.h"
#include "gemm.h"
#include "pixel_group.h"
#include "transpose.h"

namespace pyvit {
namespace {

template <class S>
struct Destination {
  S* data;
  int64_t channels;
  int64_t stride[4];  // batch, channel, row, column of the destination grid
};

// Weights seen from a destination: element (destination channel, source channel, row, column).
template <class S>
struct Weights {
  const S* data;
  int64_t stride[4];
  const S& at(int64_t d, int64_t s, int64_t i, int64_t j) const {
    return data[d * stride[0] + s * stride[1] + i * stride[2] + j * stride[3]];
  }
};

template <class S>
struct Gather {
  PatchSource<S> source;
  Weights<S> weights;
  Destination<S> destination;
  int64_t batch, groups;
  const S* bias;
  int64_t group_stride;  // of the weights

  bool channels_last() const {
    // With few channels a group, the vector side would be mostly padding.
    return source.stride[1] == 1 && destination.stride[1] == 1 && source.stride[3] != 1 &&
           destination.channels >= 8;
  }

  Gather group(int64_t g) const {
    Gather one = *this;
    one.source.data += g * source.channels * source.stride[1];
    one.destination.data += g * destination.channels * destination.stride[1];
    one.weights.data += g * group_stride;
    if (bias != nullptr) one.bias += g * destination.channels;
    return one;
  }
};

// ---- planar: A = weights, B = patches, C = [channel][pixel] --------------------------------

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
  T line[Panel<T>::NB];
  for (int64_t m = 0; m < mb; ++m) {
    const T bias = g.bias == nullptr ? T(0) : widen(g.bias[m0 + m]);
    for (int64_t j = 0; j < nb; ++j) line[j] = c[m * ldc + j] + bias;
    S* channel = d.data + (m0 + m) * d.stride[1];
    for_each_run(g.source.grid, n0, nb, [&](const PixelRun& run) {
      S* out = channel + run.image * d.stride[0] + run.row * d.stride[2] +
               run.column * d.stride[3];
      if (d.stride[3] == 1) {
        narrow_run(out, line + run.at, run.count);
      } else {
        for (int64_t t = 0; t < run.count; ++t) out[t * d.stride[3]] = narrow<S>(line[run.at + t]);
      }
    });
  }
}

// ---- channels last: A = patches, B = weights, C = [pixel][channel] --------------------------

template <class S>
void pack_patch_rows(Compute<S>* dst, const PatchSource<S>& source, int64_t m0, int64_t mb,
                     int64_t k0, int64_t kb) {
  for_each_run(source.grid, m0, mb, [&](const PixelRun& run) {
    for (int64_t t = 0; t < run.count; ++t)
      copy_patch(dst + (run.at + t) * Panel<Compute<S>>::lda, source, run.image, run.row,
                 run.column + t, k0, k0 + kb);
  });
}

template <class S>
void pack_weight_strips(Compute<S>* dst, const Gather<S>& g, int64_t k0, int64_t kb, int64_t n0,
                        int64_t nb) {
  using T = Compute<S>;
  constexpr int NR = Panel<T>::NR;
  const int64_t C = g.source.channels, columns = g.source.taps[1].size();
  for (int64_t j = 0; j < nb; j += NR, dst += kb * NR) {
    const int64_t width = std::min<int64_t>(NR, nb - j);
    for (int64_t k = 0; k < kb;) {
      const int64_t c = (k0 + k) % C, tap = (k0 + k) / C, count = std::min(C - c, kb - k);
      const S* w = &g.weights.at(n0 + j, c, g.source.taps[0][tap / columns].kernel,
                                 g.source.taps[1][tap % columns].kernel);
      transpose(dst + k * NR, NR, w, g.weights.stride[0], g.weights.stride[1], width, count);
      k += count;
    }
    for (int64_t k = 0; width < NR && k < kb; ++k)
      std::fill(dst + k * NR + width, dst + (k + 1) * NR, T(0));
  }
}

template <class S>
void store_channels_last(const Gather<S>& g, const Compute<S>* c, int64_t ldc, int64_t m0,
                         int64_t mb, int64_t n0, int64_t nb) {
  using T = Compute<S>;
  const Destination<S>& d = g.destination;
  T bias[Panel<T>::NB], line[Panel<T>::NB];
  for (int64_t j = 0; j < nb; ++j) bias[j] = g.bias == nullptr ? T(0) : widen(g.bias[n0 + j]);
  for_each_run(g.source.grid, m0, mb, [&](const PixelRun& run) {
    S* out = d.data + run.image * d.stride[0] + run.row * d.stride[2] +
             run.column * d.stride[3] + n0;
    const T* from = c + run.at * ldc;
    for (int64_t t = 0; t < run.count; ++t, out += d.stride[3], from += ldc) {
      for (int64_t j = 0; j < nb; ++j) line[j] = from[j] + bias[j];
      narrow_run(out, line, nb);
    }
  });
}

// ---- one convolution, either arrangement --------------------------------------------------

template <class S>
void run_gather(const Gather<S>& gather) {
  using T = Compute<S>;
  const int64_t K = gather.source.patch_size();
  const int64_t pixels = gather.batch * gather.source.pixels_per_image();
  const int64_t channels = gather.destination.channels;
  const bool last = gather.channels_last();
  const BlockGrid<T> grid(last ? pixels : channels, last ? channels : pixels, gather.groups);
  const int64_t tasks = grid.tasks();
  parallel_for(tasks * gather.groups, [&](int64_t task) {
    const Gather<S> g = gather.group(task / tasks);
    const int64_t block = task % tasks;
    const int64_t m0 = grid.m0(block), mb = grid.height(block);
    const int64_t n0 = grid.n0(block), nb = grid.width(block);
    if (last) {
      gemm_block<T>(
          m0, mb, n0, nb, 0, K,
          [&](T* a, int64_t m, int64_t rows, int64_t k0, int64_t kb) {
            pack_patch_rows(a, g.source, m, rows, k0, kb);
          },
          [&](T* b, int64_t k0, int64_t kb, int64_t n, int64_t columns) {
            pack_weight_strips(b, g, k0, kb, n, columns);
          },
          [&](auto... block) { store_channels_last(g, block...); });
    } else {
      gemm_block<T>(
          m0, mb, n0, nb, 0, K,
          [&](T* a, int64_t m, int64_t rows, int64_t k0, int64_t kb) {
            pack_weight_rows(a, g, m, rows, k0, kb);
          },
          [&](T* b, int64_t k0, int64_t kb, int64_t n, int64_t columns) {
            pack_patch_strips(b, g.source, k0, kb, n, columns);
          },
          [&](auto... block) { store_planar(g, block...); });
    }
  });
}

// A 1×1 convolution with step 1 takes an image as one long row where memory allows it.
template <class S>
void flatten_pointwise(Gather<S>& g) {
  PatchSource<S>& s = g.source;
  const bool pointwise = s.taps[0].size() == 1 && s.taps[1].size() == 1 &&
                         s.taps[0][0].offset == 0 && s.taps[1][0].offset == 0 &&
                         s.step[0] == 1 && s.step[1] == 1 && s.grid[0] == s.height &&
                         s.grid[1] == s.width;
  if (!pointwise || s.stride[2] != s.width * s.stride[3] ||
      g.destination.stride[2] != s.width * g.destination.stride[3])
    return;
  s.width *= s.height;
  s.height = 1;
  s.grid[0] = 1;
  s.grid[1] = s.width;
}

template <class S>
void forward(const Conv2dShape& shape, View4 x, View4 w, const void* bias, View4 y) {
  const int64_t out_per_group = shape.out_channels / shape.groups;
  Gather<S> g{forward_patches<S>(shape, x),
              {static_cast<const S*>(w.data),
               {w.stride[0], w.stride[1], w.stride[2], w.stride[3]}},
              {static_cast<S*>(y.data),
               out_per_group,
               {y.stride[0], y.stride[1], y.stride[2], y.stride[3]}},
              shape.batch,
              shape.groups,
              static_cast<const S*>(bias),
              out_per_group * w.stride[0]};
  flatten_pointwise(g);
  run_gather(g);
}

// The kernel rows (or columns) that reach inputs of one residue, with the output they reach from.
std::vector<Tap> taps_of_residue(const Conv2dShape& shape, int axis, int64_t residue) {
  std::vector<Tap> taps;
  for (int64_t i = 0; i < shape.kernel[axis]; ++i) {
    const int64_t distance = residue + shape.padding[axis] - i * shape.dilation[axis];
    if (distance % shape.stride[axis] == 0) taps.push_back({i, distance / shape.stride[axis]});
  }
  return taps;
}

template <class S>
void input_grad(const Conv2dShape& shape, View4 dy, View4 w, View4 dx) {
  const int64_t out_per_group = shape.out_channels / shape.groups;
  for (int64_t rh = 0; rh < std::min(shape.stride[0], shape.height); ++rh) {
    for (int64_t rw = 0; rw < std::min(shape.stride[1], shape.width); ++rw) {
      Gather<S> g{{static_cast<const S*>(dy.data),
                   out_per_group,
                   shape.out_height,
                   shape.out_width,
                   {dy.stride[0], dy.stride[1], dy.stride[2], dy.stride[3]},
                   {ceil_div(shape.height - rh, shape.stride[0]),
                    ceil_div(shape.width - rw, shape.stride[1])},
                   {1, 1},
                   {taps_of_residue(shape, 0, rh), taps_of_residue(shape, 1, rw)}},
                  {static_cast<const S*>(w.data),
                   {w.stride[1], w.stride[0], w.stride[2], w.stride[3]}},
                  {static_cast<S*>(dx.data) + rh * dx.stride[2] + rw * dx.stride[3],
                   shape.in_channels / shape.groups,
                   {dx.stride[0], dx.stride[1], dx.stride[2] * shape.stride[0],
                    dx.stride[3] * shape.stride[1]}},
                  shape.batch,
                  shape.groups,
                  nullptr,
                  out_per_group * w.stride[0]};
      flatten_pointwise(g);
      run_gather(g);
    }
  }
}

}  // namespace

void conv2d(DType dtype, const Conv2dShape& shape, View4 x, View4 w, const void* bias, View4 y) {
  dispatch(dtype, [&](auto s) { forward<decltype(s)>(shape, x, w, bias, y); });
}

void conv2d_input_grad(DType dtype, const Conv2dShape& shape, View4 dy, View4 w, View4 dx) {
  if (scatter_is_cheaper(shape)) return conv2d_input_grad_scatter(dtype, shape, dy, w, dx);
  dispatch(dtype, [&](auto s) { input_grad<decltype(s)>(shape, dy, w, dx); });
}

}  // namespace pyvit
