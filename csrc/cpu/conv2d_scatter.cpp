// dpatch[p, e] = Σ_o dy[o, p] · w[o, e], each patch then added where it was read from: the input
// gradient of a stem or a patchifying layer. Gathering packs O·taps values for each input pixel
// and multiplies them with only C rows; here dy is packed once, and C·kh runs of kw values are
// added for each output pixel.
//
// One task owns a band of input rows of one image, adds in float32 in its scratch, and computes
// every output row that reaches the band: no two tasks write one place. An input pixel receives
// its output pixels in ascending order, and bands are cut by the image's shape alone, so the
// result depends neither on threads nor on the batch.
#include "conv2d_scatter.h"

#include <vector>

#include "gemm.h"
#include "patches.h"
#include "transpose.h"

namespace pyvit {
namespace {

constexpr int64_t kBandBytes = 384 << 10;
constexpr int64_t kPixels = 252;  // output pixels in one block of the product

struct Axis {
  int64_t size, out, kernel, stride, padding, dilation;

  Axis(const Conv2dShape& s, int axis)
      : size(axis == 0 ? s.height : s.width),
        out(axis == 0 ? s.out_height : s.out_width),
        kernel(s.kernel[axis]),
        stride(s.stride[axis]),
        padding(s.padding[axis]),
        dilation(s.dilation[axis]) {}

  int64_t reach() const { return dilation * (kernel - 1); }
  int64_t input(int64_t o, int64_t tap) const { return o * stride - padding + tap * dilation; }
  // The output positions [first_reaching, last_reaching] whose window touches [begin, end).
  int64_t first_reaching(int64_t begin) const {
    return std::max<int64_t>(0, ceil_div(std::max<int64_t>(0, begin + padding - reach()), stride));
  }
  int64_t last_reaching(int64_t end) const {
    return std::min(out - 1, (end - 1 + padding) / stride);
  }
};

template <class T>
int64_t band_rows(int64_t channels, const Axis& rows, int64_t width) {
  const int64_t most = kBandBytes / (channels * width * static_cast<int64_t>(sizeof(T)));
  // A whole number of strides: patches that do not overlap are then never computed twice.
  return most >= rows.size ? rows.size : most / rows.stride * rows.stride;
}

// A row of the kernel for one channel, or the part of it in one block of the product.
struct KernelRun {
  int64_t channel, row, column, count;
};

std::vector<KernelRun> kernel_runs(int64_t begin, int64_t end, int64_t rows, int64_t columns) {
  std::vector<KernelRun> runs;
  for (int64_t e = begin; e < end;) {
    const int64_t count = std::min(columns - e % columns, end - e);
    runs.push_back({e / (rows * columns), e / columns % rows, e % columns, count});
    e += count;
  }
  return runs;
}

template <class T>
struct Band {
  T* sum;  // [channel][row][column]
  int64_t first, rows, width;

  // Adds the patch elements of output pixel (oh, ow).
  void add(const std::vector<KernelRun>& runs, const T* patch, int64_t oh, int64_t ow,
           const Axis& vertical, const Axis& horizontal) const {
    for (const KernelRun& run : runs) {
      const T* from = patch;
      patch += run.count;
      const int64_t h = vertical.input(oh, run.row) - first;
      if (h < 0 || h >= rows) continue;
      T* line = sum + (run.channel * rows + h) * width;
      const int64_t w = horizontal.input(ow, run.column);
      if (horizontal.dilation == 1) {
        const int64_t skip = std::max<int64_t>(0, -w), stop = std::min(run.count, width - w);
        if (stop > skip) add_run(line + w + skip, from + skip, stop - skip);
        continue;
      }
      for (int64_t j = 0; j < run.count; ++j) {
        const int64_t column = w + j * horizontal.dilation;
        if (column >= 0 && column < width) line[column] += from[j];
      }
    }
  }
};

template <class S>
void scatter(const Conv2dShape& shape, View4 dy, View4 w, View4 dx) {
  using T = Compute<S>;
  using P = Panel<T>;
  const Axis vertical(shape, 0), horizontal(shape, 1);
  const int64_t G = shape.groups, C = shape.in_channels / G, O = shape.out_channels / G;
  const int64_t E = C * vertical.kernel * horizontal.kernel, W = shape.width;
  const int64_t rows = band_rows<T>(C, vertical, W), bands = ceil_div(shape.height, rows);
  const int64_t grid[2] = {shape.out_height, shape.out_width};
  // Where patch element e lies in the weights of one output channel.
  const bool weights_are_runs = w.stride[3] == 1 && w.stride[2] == horizontal.kernel &&
                                w.stride[1] == vertical.kernel * horizontal.kernel;
  parallel_for(shape.batch * G * bands, [&](int64_t task) {
    const int64_t band_index = task % bands, g = task / bands % G, image = task / bands / G;
    const S* grad = static_cast<const S*>(dy.data) + image * dy.stride[0] + g * O * dy.stride[1];
    const S* weights = static_cast<const S*>(w.data) + g * O * w.stride[0];
    Band<T> band{nullptr, band_index * rows, std::min(rows, shape.height - band_index * rows), W};
    const int64_t nb = std::min(E, P::NB);
    Scratch scratch(Scratch::bytes_for<T>(C * rows * W) + P::scratch_bytes(kPixels, nb));
    band.sum = scratch.take<T>(C * rows * W);
    std::fill(band.sum, band.sum + C * band.rows * W, T(0));

    auto pack_pixels = [&](T* a, int64_t m0, int64_t mb, int64_t k0, int64_t kb) {
      for_each_run(grid, m0, mb, [&](const PixelRun& run) {
        const S* from = grad + run.row * dy.stride[2] + run.column * dy.stride[3] +
                        k0 * dy.stride[1];
        T* to = a + run.at * P::lda;
        if (dy.stride[1] == 1) {
          for (int64_t t = 0; t < run.count; ++t)
            widen_run(to + t * P::lda, from + t * dy.stride[3], kb);
        } else {
          transpose(to, P::lda, from, dy.stride[1], dy.stride[3], kb, run.count);
        }
      });
    };
    auto pack_weights = [&](T* b, int64_t k0, int64_t kb, int64_t n0, int64_t columns) {
      const auto runs = kernel_runs(n0, n0 + columns, vertical.kernel, horizontal.kernel);
      T line[P::NB] = {};
      for (int64_t k = 0; k < kb; ++k) {
        const S* of_channel = weights + (k0 + k) * w.stride[0];
        if (weights_are_runs) {
          widen_run(line, of_channel + n0, columns);
        } else {
          T* to = line;
          for (const KernelRun& run : runs)
            for (int64_t j = 0; j < run.count; ++j)
              *to++ = widen(of_channel[run.channel * w.stride[1] + run.row * w.stride[2] +
                                       (run.column + j) * w.stride[3]]);
        }
        for (int64_t j = 0; j < columns; j += P::NR)
          std::copy(line + j, line + j + P::NR, b + j * kb + k * P::NR);
      }
    };
    auto add_patches = [&](const T* c, int64_t ldc, int64_t m0, int64_t mb, int64_t n0,
                           int64_t columns) {
      const auto runs = kernel_runs(n0, n0 + columns, vertical.kernel, horizontal.kernel);
      for_each_run(grid, m0, mb, [&](const PixelRun& run) {
        for (int64_t t = 0; t < run.count; ++t)
          band.add(runs, c + (run.at + t) * ldc, run.row, run.column + t, vertical, horizontal);
      });
    };

    const int64_t begin = vertical.first_reaching(band.first) * shape.out_width;
    const int64_t end =
        (vertical.last_reaching(band.first + band.rows) + 1) * shape.out_width;
    for (int64_t m0 = begin; m0 < end; m0 += kPixels)
      for (int64_t n0 = 0; n0 < E; n0 += P::NB)
        gemm_block<T>(scratch, m0, std::min(kPixels, end - m0), n0, std::min(P::NB, E - n0), 0, O,
                      pack_pixels, pack_weights, add_patches);

    S* out = static_cast<S*>(dx.data) + image * dx.stride[0] + g * C * dx.stride[1];
    for (int64_t c = 0; c < C; ++c) {
      for (int64_t h = 0; h < band.rows; ++h) {
        S* line = out + c * dx.stride[1] + (band.first + h) * dx.stride[2];
        const T* sum = band.sum + (c * band.rows + h) * W;
        if (dx.stride[3] == 1) {
          narrow_run(line, sum, W);
        } else {
          for (int64_t i = 0; i < W; ++i) line[i * dx.stride[3]] = narrow<S>(sum[i]);
        }
      }
    }
  });
}

}  // namespace

bool scatter_is_cheaper(const Conv2dShape& shape) {
  const int64_t C = shape.in_channels / shape.groups, O = shape.out_channels / shape.groups;
  const Axis vertical(shape, 0);
  // Measured: packing a value takes about a tenth of the time of adding a run of kw of them.
  const bool less_work = 10 * C <= O * shape.kernel[1];
  // The bands fit, and are tall beside the rows that two of them both compute.
  const int64_t tall = std::max(vertical.stride, 4 * (vertical.reach() + 1 - vertical.stride));
  const int64_t row_bytes = C * shape.width * static_cast<int64_t>(sizeof(double));
  return less_work && row_bytes * std::min(tall, shape.height) <= kBandBytes;
}

void conv2d_input_grad_scatter(DType dtype, const Conv2dShape& shape, View4 dy, View4 w,
                               View4 dx) {
  dispatch(dtype, [&](auto s) { scatter<decltype(s)>(shape, dy, w, dx); });
}

}  // namespace pyvit
