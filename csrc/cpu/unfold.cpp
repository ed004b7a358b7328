// unfold copies, so it moves bits: one task writes one row of the column matrix, a run of pixels
// for each row of patches. With channels last, a task takes one pair of kernel row and column and
// transposes [pixel][channel] to [channel][pixel].
//
// fold gathers: one task owns one row of the image and adds to it, kernel row by kernel row and
// column by column, the runs of patches that reach it. So nothing is added atomically, and each
// pixel's sum has one order.
#include "unfold.h"

#include "patches.h"
#include "transpose.h"

namespace pyvit {
namespace {

template <class S>
PatchSource<S> patches_of(const UnfoldShape& shape, View4 image) {
  PatchSource<S> source{static_cast<const S*>(image.data),
                        shape.channels,
                        shape.height,
                        shape.width,
                        {image.stride[0], image.stride[1], image.stride[2], image.stride[3]},
                        {shape.grid[0], shape.grid[1]},
                        {shape.stride[0], shape.stride[1]},
                        {}};
  for (int axis = 0; axis < 2; ++axis)
    for (int64_t i = 0; i < shape.kernel[axis]; ++i)
      source.taps[axis].push_back({i, i * shape.dilation[axis] - shape.padding[axis]});
  return source;
}

// One element of every patch of an image: a row of the column matrix.
template <class S>
void unfold_row(const PatchSource<S>& source, int64_t image, int64_t element, S* row) {
  const PlanarIndex index(source, element);
  for (int64_t h = 0; h < source.grid[0]; ++h)
    copy_pixels(row + h * source.grid[1], source, index,
                PixelRun{image, h, 0, 0, source.grid[1]});
}

// All channels of one tap of every patch; rows of the column matrix are `ldc` apart.
template <class S>
void unfold_tap(const PatchSource<S>& source, int64_t image, int64_t row_tap, int64_t column_tap,
                S* out, int64_t ldc) {
  const int64_t count = source.grid[1], C = source.channels;
  const int64_t first = source.taps[1][column_tap].offset;
  for (int64_t row = 0; row < source.grid[0]; ++row, out += count) {
    const int64_t h = row * source.step[0] + source.taps[0][row_tap].offset;
    Span span{0, 0};
    if (h >= 0 && h < source.height)
      span = inside(first, source.step[1], source.width, count);
    for (int64_t c = 0; c < C && span.end - span.begin < count; ++c) {
      std::fill(out + c * ldc, out + c * ldc + span.begin, S(0));
      std::fill(out + c * ldc + span.end, out + c * ldc + count, S(0));
    }
    if (span.begin == span.end) continue;
    const S* from = source.data + image * source.stride[0] + h * source.stride[2] +
                    (first + span.begin * source.step[1]) * source.stride[3];
    transpose(out + span.begin, ldc, from, source.step[1] * source.stride[3], 1,
              span.end - span.begin, C);
  }
}

template <class S>
void run_unfold(const UnfoldShape& shape, View4 image, void* columns) {
  const PatchSource<S> source = patches_of<S>(shape, image);
  const int64_t K = source.patch_size(), L = source.pixels_per_image();
  const int64_t taps = shape.kernel[0] * shape.kernel[1];
  S* out = static_cast<S*>(columns);
  if (image.stride[1] == 1 && shape.channels >= 8) {
    parallel_for(shape.batch * taps, [&](int64_t task) {
      const int64_t b = task / taps, tap = task % taps;
      unfold_tap(source, b, tap / shape.kernel[1], tap % shape.kernel[1],
                 out + (b * K + tap) * L, taps * L);
    });
  } else {
    parallel_for(shape.batch * K, [&](int64_t task) {
      unfold_row(source, task / K, task % K, out + task * L);
    });
  }
}

// Columns of the image that are summed at a time.
constexpr int64_t kLine = 2048;

// The part [w0, w0 + width) of a row of the image, while it is summed. Pixels a stride apart are
// neighbours in it, as patches that reach them are in a row of the column matrix.
struct LineLayout {
  int64_t w0, width, step, pitch;
  struct Run {
    int64_t patch, place, count;  // first patch of a row of patches, its place in the line
  };
  std::vector<Run> runs;  // for each kernel column, the patches that reach the line

  LineLayout(const UnfoldShape& s, int64_t begin)
      : w0(begin), width(std::min(kLine, s.width - begin)), step(s.stride[1]),
        pitch(ceil_div(width, step)) {
    for (int64_t j = 0; j < s.kernel[1]; ++j) {
      const int64_t first = j * s.dilation[1] - s.padding[1] - w0;
      const Span span = inside(first, step, width, s.grid[1]);
      const int64_t w = first + span.begin * step;
      runs.push_back({span.begin, w % step * pitch + w / step, span.end - span.begin});
    }
  }
  int64_t size() const { return std::min(step, width) * pitch; }

  template <class S>
  void store(const Compute<S>* line, S* out) const {
    if (step == 1) return narrow_run(out, line, width);
    for (int64_t phase = 0; phase < std::min(step, width); ++phase)
      for (int64_t w = phase, at = phase * pitch; w < width; w += step, ++at)
        out[w] = narrow<S>(line[at]);
  }
};

// line[t] += widen(from[t·stride]) for t in [0, count)
template <class S>
void add_strided(Compute<S>* line, const S* from, int64_t stride, int64_t count) {
  if constexpr (std::is_same_v<S, Compute<S>>) {
    if (stride == 1) return add_run(line, from, count);
  }
  Compute<S> widened[kLine];
  if (stride == 1) {
    widen_run(widened, from, count);
  } else {
    for (int64_t t = 0; t < count; ++t) widened[t] = widen(from[t * stride]);
  }
  add_run(line, widened, count);
}

// Row h of one channel; `elements` is that channel's first row of the column matrix.
template <class S>
void fold_row(const UnfoldShape& s, const LineLayout& layout, const S* elements,
              const int64_t stride[3], int64_t h, S* out) {
  Compute<S> line[2 * kLine];
  std::fill(line, line + layout.size(), Compute<S>(0));
  for (int64_t i = 0; i < s.kernel[0]; ++i) {
    const int64_t above = h + s.padding[0] - i * s.dilation[0], row = above / s.stride[0];
    if (above < 0 || above % s.stride[0] != 0 || row >= s.grid[0]) continue;
    const S* from = elements + i * s.kernel[1] * stride[1] + row * s.grid[1] * stride[2];
    for (const LineLayout::Run& run : layout.runs) {
      if (run.count > 0)
        add_strided(line + run.place, from + run.patch * stride[2], stride[2], run.count);
      from += stride[1];
    }
  }
  layout.store(line, out);
}

template <class S>
void run_fold(const UnfoldShape& s, ColumnView columns, void* image) {
  std::vector<LineLayout> layouts;
  for (int64_t w0 = 0; w0 < s.width; w0 += kLine) layouts.emplace_back(s, w0);
  const int64_t* stride = columns.stride;
  parallel_for(s.batch * s.channels * s.height, [&](int64_t task) {
    const int64_t plane = task / s.height;
    const S* elements = static_cast<const S*>(columns.data) + plane / s.channels * stride[0] +
                        plane % s.channels * s.kernel[0] * s.kernel[1] * stride[1];
    for (const LineLayout& layout : layouts)
      fold_row(s, layout, elements, stride, task % s.height,
               static_cast<S*>(image) + task * s.width + layout.w0);
  });
}

}  // namespace

void unfold(DType dtype, const UnfoldShape& shape, View4 image, void* columns) {
  switch (dtype) {
    case DType::f64: return run_unfold<double>(shape, image, columns);
    case DType::f32: return run_unfold<float>(shape, image, columns);
    case DType::bf16:
    case DType::f16: return run_unfold<uint16_t>(shape, image, columns);
  }
}

void fold(DType dtype, const UnfoldShape& shape, ColumnView columns, void* image) {
  dispatch(dtype, [&](auto s) { run_fold<decltype(s)>(shape, columns, image); });
}

}  // namespace pyvit
