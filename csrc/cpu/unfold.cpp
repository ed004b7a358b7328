// unfold copies, so it moves bits: one task writes one row of the column matrix, a run of pixels
// for each row of patches. Two layouts are transposed instead, by blocks of registers: channels
// last, [pixel][channel] to [channel][pixel], and patches far apart, whose kernel columns are
// neighbours in memory, [patch][kernel column] to [kernel column][patch].
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

// dst[i] = src[i·step]
template <class S>
inline void copy_strided(S* dst, const S* src, int64_t step, int64_t n) {
  if (step == 1) return widen_run(dst, src, n);
  int64_t i = 0;
#if defined(PYVIT_HAS_LANE_MASKS)
  if constexpr (std::is_same_v<S, float>) {
    constexpr int L = kLanes<float>;
    for (; step == 2 && i + L < n; i += L)  // not the last ones: src may end with them
      store(dst + i, even_lanes(load(src + 2 * i), load(src + 2 * i + L)));
  }
#endif
  for (; i < n; ++i) dst[i] = src[i * step];
}

// The pixels of every patch that one element of the kernel meets: a row of the column matrix.
template <class S>
void unfold_row(const PatchSource<S>& source, int64_t image, int64_t element, S* out) {
  const PlanarIndex index(source, element);
  const int64_t count = source.grid[1], step = source.step[1] * source.stride[3];
  const int64_t first = source.taps[1][index.column_tap].offset;
  const int64_t top = source.taps[0][index.row_tap].offset;
  // Rows and columns of patches that meet the image; the others meet padding.
  const Span rows = inside(top, source.step[0], source.height, source.grid[0]);
  const Span columns = inside(first, source.step[1], source.width, count);
  std::fill(out, out + rows.begin * count, S(0));
  std::fill(out + rows.end * count, out + source.grid[0] * count, S(0));
  if (rows.begin == rows.end) return;

  const int64_t n = columns.end - columns.begin;
  const int64_t pitch = source.step[0] * source.stride[2];
  const S* from = source.data + image * source.stride[0] + index.channel * source.stride[1] +
                  (top + rows.begin * source.step[0]) * source.stride[2] +
                  (first + columns.begin * source.step[1]) * source.stride[3];
  S* to = out + rows.begin * count + columns.begin;
  if (step == 1 && pitch == count && n > 0) {  // rows follow each other here as there: one run
    std::memcpy(to, from, ((rows.end - rows.begin - 1) * count + n) * sizeof(S));
  } else {
    for (int64_t r = rows.begin; r < rows.end; ++r, to += count, from += pitch)
      copy_strided(to, from, step, n);
  }
  auto clear_column = [&](int64_t t) {
    for (int64_t r = rows.begin; r < rows.end; ++r) out[r * count + t] = S(0);
  };
  for (int64_t t = 0; t < columns.begin; ++t) clear_column(t);
  for (int64_t t = columns.end; t < count; ++t) clear_column(t);
}

// All elements of one kernel row of every patch: rows of the column matrix, one a kernel column.
// The kernel's columns are neighbours in memory.
template <class S>
void unfold_kernel_row(const PatchSource<S>& source, int64_t image, int64_t channel,
                       int64_t row_tap, S* out) {
  const int64_t count = source.grid[1], L = source.pixels_per_image();
  const int64_t columns = source.taps[1].size(), first = source.taps[1][0].offset;
  const int64_t step = source.step[1];
  // The patches whose kernel columns all lie inside the image, and the rest before and after.
  const Span leftmost = inside(first, step, source.width, count);
  const Span rightmost = inside(first + columns - 1, step, source.width, count);
  const int64_t begin = std::min(leftmost.begin, rightmost.end), end = rightmost.end;
  for (int64_t r = 0; r < source.grid[0]; ++r, out += count) {
    const int64_t h = r * source.step[0] + source.taps[0][row_tap].offset;
    const bool outside = h < 0 || h >= source.height;
    const S* line = source.data + image * source.stride[0] + channel * source.stride[1] +
                    (outside ? 0 : h) * source.stride[2];
    auto one_by_one = [&](int64_t from, int64_t to) {
      for (int64_t j = 0; j < columns; ++j)
        for (int64_t t = from; t < to; ++t) {
          const int64_t w = first + j + t * step;
          out[j * L + t] = outside || w < 0 || w >= source.width ? S(0) : line[w];
        }
    };
    if (outside) {
      one_by_one(0, count);
      continue;
    }
    one_by_one(0, begin);
    if (begin < end)
      transpose(out + begin, L, line + first + begin * step, step, 1, end - begin, columns);
    one_by_one(end, count);
  }
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
  } else if (image.stride[3] == 1 && shape.stride[1] > 2 && shape.kernel[1] > 2 &&
             shape.dilation[1] == 1) {
    const int64_t rows = shape.channels * shape.kernel[0];  // of the kernels of one image
    parallel_for(shape.batch * rows, [&](int64_t task) {
      const int64_t row = task % rows;
      unfold_kernel_row(source, task / rows, row / shape.kernel[0], row % shape.kernel[0],
                        out + task * shape.kernel[1] * L);
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
    if constexpr (std::is_same_v<S, Compute<S>>) {
      if (step >= 4 && width % step == 0)
        return transpose(out, step, line, pitch, 1, step, pitch);
    }
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

// Rows [h0, h0 + rows) of one channel; `elements` is that channel's first row of the column matrix,
// whose rows are read on for all rows of the image before the next one is begun.
template <class S>
void fold_rows(const UnfoldShape& s, const LineLayout& layout, const S* elements,
               const int64_t stride[3], int64_t h0, int64_t rows, S* out) {
  Compute<S> lines[2 * kLine];
  const int64_t size = layout.size();
  std::fill(lines, lines + rows * size, Compute<S>(0));
  for (int64_t i = 0; i < s.kernel[0]; ++i) {
    for (const LineLayout::Run& run : layout.runs) {
      const S* from = elements + run.patch * stride[2];
      elements += stride[1];
      for (int64_t r = 0; r < rows && run.count > 0; ++r) {
        const int64_t above = h0 + r + s.padding[0] - i * s.dilation[0];
        const int64_t row = s.stride[0] == 1 ? above : above / s.stride[0];
        if (above < 0 || row * s.stride[0] != above || row >= s.grid[0]) continue;
        add_strided(lines + r * size + run.place, from + row * s.grid[1] * stride[2], stride[2],
                    run.count);
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) layout.store(lines + r * size, out + r * s.width);
}

// Patches that neither overlap nor leave gaps, as those of a patch embedding: nothing is added.
bool tiles_the_image(const UnfoldShape& s) {
  bool tiles = true;
  for (int axis = 0; axis < 2; ++axis)
    tiles &= s.kernel[axis] == s.stride[axis] && s.dilation[axis] == 1 && s.padding[axis] == 0;
  return tiles;
}

// Row h of one channel from [kernel column][patch]; pixels beyond the last whole patch are zero.
template <class S>
void copy_patches(const UnfoldShape& s, const S* elements, const int64_t stride[3], int64_t h,
                  S* out) {
  const int64_t row = h / s.kernel[0], covered = s.grid[1] * s.kernel[1];
  if (row >= s.grid[0]) {
    std::fill(out, out + s.width, S(0));
    return;
  }
  const S* from = elements + h % s.kernel[0] * s.kernel[1] * stride[1] +
                  row * s.grid[1] * stride[2];
  transpose(out, s.kernel[1], from, stride[1], stride[2], s.kernel[1], s.grid[1]);
  std::fill(out + covered, out + s.width, S(0));
}

// f(channel's first row of the column matrix, first row of the image, rows, those rows' pixels),
// `rows` at a time.
template <class S, class F>
void for_each_band(const UnfoldShape& s, ColumnView columns, void* image, int64_t rows,
                   const F& f) {
  const int64_t bands = ceil_div(s.height, rows);
  parallel_for(s.batch * s.channels * bands, [&](int64_t task) {
    const int64_t plane = task / bands, h0 = task % bands * rows;
    const S* elements = static_cast<const S*>(columns.data) +
                        plane / s.channels * columns.stride[0] +
                        plane % s.channels * s.kernel[0] * s.kernel[1] * columns.stride[1];
    f(elements, h0, std::min(rows, s.height - h0),
      static_cast<S*>(image) + (plane * s.height + h0) * s.width);
  });
}

template <class S>
void run_fold(const UnfoldShape& s, ColumnView columns, void* image) {
  std::vector<LineLayout> layouts;
  for (int64_t w0 = 0; w0 < s.width; w0 += kLine) layouts.emplace_back(s, w0);
  const int64_t rows = 2 * kLine / layouts.front().size();
  for_each_band<S>(s, columns, image, rows, [&](const S* elements, int64_t h0, int64_t n, S* out) {
    for (const LineLayout& layout : layouts)
      fold_rows(s, layout, elements, columns.stride, h0, n, out + layout.w0);
  });
}

// Copies move bits: by the size of an element.
template <class S>
void run_fold_patches(const UnfoldShape& s, ColumnView columns, void* image) {
  for_each_band<S>(s, columns, image, 1, [&](const S* elements, int64_t h, int64_t, S* out) {
    copy_patches(s, elements, columns.stride, h, out);
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
  if (!tiles_the_image(shape)) {
    dispatch(dtype, [&](auto s) { run_fold<decltype(s)>(shape, columns, image); });
    return;
  }
  switch (dtype) {
    case DType::f64: return run_fold_patches<double>(shape, columns, image);
    case DType::f32: return run_fold_patches<float>(shape, columns, image);
    case DType::bf16:
    case DType::f16: return run_fold_patches<uint16_t>(shape, columns, image);
  }
}

}  // namespace pyvit
