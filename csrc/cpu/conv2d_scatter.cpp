// dpatch[e, p] = Σ_o w[o, e] · dy[o, p], each patch then added where it was read from: the input
// gradient of a stem or a patchifying layer, whose few channels would leave the vector side of a
// gather mostly empty.
//
// One task owns a band of input rows of one image, adds in its scratch, and computes every output
// row that reaches the band: no two tasks write one place. A row of the sums is kept as one line
// for each residue of the padded column modulo the stride, so that what one kernel element
// receives from a row of output pixels is added as one run; the lines are interleaved at the end.
// Output pixels are taken in groups of whole rows, which the image's shape alone decides: an input
// pixel is summed in the same order however the bands are cut.
#include "conv2d_scatter.h"

#include <vector>

#include "conv2d_pixel_strips.h"
#include "gemm.h"
#include "interleave.h"
#include "transpose.h"

namespace pyvit {
namespace {

constexpr int64_t kBandBytes = 384 << 10;
constexpr int64_t kElements = 252;  // patch elements in one block of the product

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
  // The output positions [first_reaching, last_reaching] whose window touches [begin, end).
  int64_t first_reaching(int64_t begin) const {
    return std::max<int64_t>(0, ceil_div(std::max<int64_t>(0, begin + padding - reach()), stride));
  }
  int64_t last_reaching(int64_t end) const {
    return std::min(out - 1, (end - 1 + padding) / stride);
  }
  // Length of a line of sums: every stride-th padded position.
  int64_t line() const {
    return std::max(out + reach() / stride, ceil_div(size + padding, stride));
  }
};

// Elements of a band for one of its rows.
int64_t row_elements(const Conv2dShape& shape) {
  const Axis across(shape, 1);
  return shape.in_channels / shape.groups * across.stride * across.line();
}

// Rows of a band that are worth it beside the output rows that two neighbouring bands both compute.
int64_t shortest_band(const Axis& down) {
  return std::max(down.stride, 4 * (down.reach() + 1 - down.stride));
}

template <class T>
int64_t band_rows(const Conv2dShape& shape) {
  const Axis down(shape, 0);
  const int64_t most = kBandBytes / (row_elements(shape) * static_cast<int64_t>(sizeof(T)));
  auto cut = [&](int64_t bands) {
    return round_up(ceil_div(down.size, bands), down.stride);
  };
  int64_t bands = 1;
  while (cut(bands) > std::max(most, down.stride)) ++bands;
  const int64_t images = shape.batch * shape.groups, wanted = 2 * thread_count();
  while (images * bands < wanted && cut(2 * bands) >= shortest_band(down)) bands *= 2;
  return cut(bands);
}

// Element e of a patch: a weight of each output channel, and where its products are added.
struct Element {
  int64_t weight, channel, row, line, shift;
};

std::vector<Element> patch_elements(const Conv2dShape& shape, const int64_t weight_stride[4]) {
  const Axis down(shape, 0), across(shape, 1);
  std::vector<Element> elements;
  for (int64_t c = 0; c < shape.in_channels / shape.groups; ++c)
    for (int64_t i = 0; i < down.kernel; ++i)
      for (int64_t j = 0; j < across.kernel; ++j)
        elements.push_back(
            {c * weight_stride[1] + i * weight_stride[2] + j * weight_stride[3], c,
             i * down.dilation, j * across.dilation % across.stride,
             j * across.dilation / across.stride});
  // In the order of memory, so that weights are runs whatever their layout.
  std::sort(elements.begin(), elements.end(),
            [](const Element& a, const Element& b) { return a.weight < b.weight; });
  return elements;
}

// A[e, o] = w[o, e]
template <class S>
void pack_elements(Compute<S>* dst, const S* weights, int64_t out_stride,
                   const std::vector<Element>& elements, int64_t m0, int64_t mb, int64_t kb) {
  constexpr int64_t lda = Panel<Compute<S>>::lda;
  for (int64_t m = 0; m < mb;) {
    const int64_t first = elements[m0 + m].weight;
    int64_t run = 1;
    while (m + run < mb && elements[m0 + m + run].weight == first + run) ++run;
    transpose(dst + m * lda, lda, weights + first, out_stride, 1, kb, run);
    m += run;
  }
}

template <class S>
class Scatter {
  using T = Compute<S>;
  using P = Panel<T>;

 public:
  Scatter(const Conv2dShape& shape, View4 dy, View4 w, View4 dx)
      : shape_(shape), dy_(dy), w_(w), dx_(dx), down_(shape, 0), across_(shape, 1),
        channels_(shape.in_channels / shape.groups), outs_(shape.out_channels / shape.groups),
        rows_(band_rows<T>(shape)), row_(row_elements(shape)),
        elements_(patch_elements(shape, w.stride)) {}

  void run() const {
    const int64_t bands = ceil_div(shape_.height, rows_);
    parallel_for(shape_.batch * shape_.groups * bands, [&](int64_t task) {
      const int64_t image = task / bands / shape_.groups, g = task / bands % shape_.groups;
      const int64_t first = task % bands * rows_, last = std::min(shape_.height, first + rows_);
      Scratch scratch(scratch_bytes());
      T* sums = scratch.take<T>(rows_ * row_);
      T* pixels = scratch.take<T>(row_);
      std::fill(sums, sums + (last - first) * row_, T(0));
      add_band(scratch, sums, image, g, first, last);
      store_band(sums, pixels, image, g, first, last);
    });
  }

 private:
  int64_t scratch_bytes() const {
    return Scratch::bytes_for<T>(rows_ * row_) + Scratch::bytes_for<T>(row_) +
           P::scratch_bytes(kElements, P::NB);
  }

  void add_band(Scratch scratch, T* sums, int64_t image, int64_t g, int64_t first,
                int64_t last) const {
    const S* grad = static_cast<const S*>(dy_.data) + image * dy_.stride[0] +
                    g * outs_ * dy_.stride[1];
    const S* weights = static_cast<const S*>(w_.data) + g * outs_ * w_.stride[0];
    const int64_t grid[2] = {shape_.out_height, shape_.out_width};
    auto pack_a = [&](T* a, int64_t m0, int64_t mb, int64_t k0, int64_t kb) {
      pack_elements(a, weights + k0 * w_.stride[0], w_.stride[0], elements_, m0, mb, kb);
    };
    auto pack_b = [&](T* b, int64_t k0, int64_t kb, int64_t n0, int64_t nb) {
      pack_pixel_strips(b, grad, dy_.stride, grid, k0, kb, n0, nb);
    };
    auto add = [&](const T* c, int64_t ldc, int64_t m0, int64_t mb, int64_t n0, int64_t nb) {
      for (int64_t m = 0; m < mb; ++m, c += ldc) {
        const Element& e = elements_[m0 + m];
        for_each_run(grid, n0, nb, [&](const PixelRun& run) {
          const int64_t h = run.row * down_.stride - down_.padding + e.row;
          if (h < first || h >= last) return;
          add_run(line(sums, h - first, e.channel, e.line) + e.shift + run.column, c + run.at,
                  run.count);
        });
      }
    };
    const int64_t width = shape_.out_width, group = std::max<int64_t>(1, P::NB / width);
    const int64_t begin = down_.first_reaching(first), end = down_.last_reaching(last) + 1;
    for (int64_t row = begin / group * group; row < end; row += group) {
      const int64_t from = std::max(begin, row) * width, to = std::min(end, row + group) * width;
      for (int64_t n0 = from; n0 < to; n0 += P::NB)
        for (int64_t m0 = 0; m0 < count(); m0 += kElements)
          gemm_block<T>(scratch, m0, std::min(kElements, count() - m0), n0,
                        std::min(P::NB, to - n0), 0, outs_, pack_a, pack_b, add);
    }
  }

  int64_t count() const { return elements_.size(); }
  T* line(T* sums, int64_t row, int64_t channel, int64_t residue) const {
    return sums + row * row_ + (channel * across_.stride + residue) * across_.line();
  }

  void store_band(T* sums, T* pixels, int64_t image, int64_t g, int64_t first,
                  int64_t last) const {
    const int64_t padded = across_.stride * across_.line(), W = shape_.width;
    for (int64_t h = first; h < last; ++h) {
      S* out = static_cast<S*>(dx_.data) + image * dx_.stride[0] + g * channels_ * dx_.stride[1] +
               h * dx_.stride[2];
      T* from = line(sums, h - first, 0, 0);
      if (across_.stride > 1) {
        for (int64_t c = 0; c < channels_; ++c)
          interleave(pixels + c * padded, static_cast<const T*>(from + c * padded),
                     across_.line(), across_.stride, across_.line());
        std::swap(from, pixels);
      }
      const T* planes = from + across_.padding;
      if (dx_.stride[1] == 1 && dx_.stride[3] == channels_) {
        store_pixels(out, pixels, planes, padded, W);
      } else {
        for (int64_t c = 0; c < channels_; ++c)
          store_line(out + c * dx_.stride[1], planes + c * padded, W);
      }
      if (across_.stride > 1) std::swap(from, pixels);
    }
  }

  // Channels last. `spare` has room for a row.
  void store_pixels(S* out, T* spare, const T* planes, int64_t plane, int64_t width) const {
    interleave(spare, planes, plane, channels_, width);
    narrow_run(out, spare, width * channels_);
  }

  void store_line(S* out, const T* from, int64_t width) const {
    if (dx_.stride[3] == 1) return narrow_run(out, from, width);
    for (int64_t i = 0; i < width; ++i) out[i * dx_.stride[3]] = narrow<S>(from[i]);
  }

  const Conv2dShape& shape_;
  const View4 dy_, w_, dx_;
  const Axis down_, across_;
  const int64_t channels_, outs_, rows_, row_;
  const std::vector<Element> elements_;
};

}  // namespace

bool scatter_is_cheaper(const Conv2dShape& shape) {
  const int64_t C = shape.in_channels / shape.groups, O = shape.out_channels / shape.groups;
  const Axis down(shape, 0);
  // A gather fills its vectors with terms of each sum where input channels do not
  // (conv2d_band_fold.h), but terms are few where a stride is large.
  const bool few_channels = shape.kernel[0] * shape.kernel[1] > 1 &&
                            (C <= 4 || (C > 8 && C < 12)) && O >= 32;
  const int64_t row_bytes = row_elements(shape) * static_cast<int64_t>(sizeof(double));
  return few_channels && row_bytes * std::min(shortest_band(down), shape.height) <= kBandBytes;
}

void conv2d_input_grad_scatter(DType dtype, const Conv2dShape& shape, View4 dy, View4 w,
                               View4 dx) {
  dispatch(dtype, [&](auto s) { Scatter<decltype(s)>(shape, dy, w, dx).run(); });
}

}  // namespace pyvit
