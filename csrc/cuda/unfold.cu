// Both gather, so that nothing is added to by two threads: a thread of `unfold` writes a run of
// patches in some rows of the column matrix, one of `fold` a pixel, the sum of what was copied from
// it in the order of the kernel's taps. Their floor is memory: unfold writes kernel-area times what
// it reads, and its reads stay in the cache.
#include "cuda/unfold.h"

#include <algorithm>

#include "cuda/divide.h"
#include "cuda/dtypes.h"

namespace pyvit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRun = 4;   // patches of a thread, side by side
constexpr int kRows = 4;  // rows of the column matrix of a thread, one after another

struct Geometry {
  int height, width, patches, elements;
  Divisor columns;           // of the grid of patches
  Divisor kernel_area, kernel_x;
  int stride[2], padding[2], dilation[2];
  int64_t image_stride[4];

  Geometry(const char* op, const UnfoldShape& s, const int64_t (&strides)[4])
      : height(static_cast<int>(s.height)), width(static_cast<int>(s.width)),
        patches(counted(op, s.grid[0] * s.grid[1], "patches of an image")),
        elements(counted(op, s.channels * s.kernel[0] * s.kernel[1], "elements of a patch")),
        columns(s.grid[1]), kernel_area(s.kernel[0] * s.kernel[1]), kernel_x(s.kernel[1]) {
    const int64_t size[2] = {s.height, s.width};
    for (int axis = 0; axis < 2; ++axis) {
      const int across = counted(op, size[axis] + 2 * s.padding[axis], "pixels across an image");
      padding[axis] = static_cast<int>(s.padding[axis]);
      // What reaches beyond the image, to no second patch or element, may be of any size.
      stride[axis] = static_cast<int>(s.grid[axis] > 1 ? s.stride[axis] : across);
      dilation[axis] = static_cast<int>(s.kernel[axis] > 1 ? s.dilation[axis] : 1);
    }
    std::copy(strides, strides + 4, image_stride);
  }
};

// E is any type of the element's size: elements are only moved.
template <class E>
struct alignas(sizeof(E) * kRun) Run {
  E values[kRun];
};

template <class E>
__global__ void __launch_bounds__(kThreads)
    unfold_kernel(const E* image, E* columns, Geometry g, Divisor across, Divisor down,
                  int threads_across, bool aligned) {
  const Quotient above(blockIdx.x, across);
  const Quotient place(above.quotient, down);
  const int64_t batch = place.quotient;
  const int column = threadIdx.x % threads_across, line = threadIdx.x / threads_across;
  const int first = (above.rest * threads_across + column) * kRun;
  if (first >= g.patches) return;
  // The upper left pixel of every patch of the run.
  int top[kRun], left[kRun];
  Quotient patch(first, g.columns);
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    top[i] = patch.quotient * g.stride[0] - g.padding[0];
    left[i] = patch.rest * g.stride[1] - g.padding[1];
    if (++patch.rest == static_cast<int>(g.columns.by)) {
      patch.rest = 0;
      ++patch.quotient;
    }
  }
  image += batch * g.image_stride[0];
  const int lines = kThreads / threads_across;
  int row = place.rest * lines * kRows + line;
  for (int i = 0; i < kRows && row < g.elements; ++i, row += lines) {
    const Quotient channel(row, g.kernel_area);
    const Quotient tap(channel.rest, g.kernel_x);
    const int down_by = tap.quotient * g.dilation[0], right_by = tap.rest * g.dilation[1];
    const E* plane = image + channel.quotient * g.image_stride[1];
    Run<E> run;
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      const int y = top[j] + down_by, x = left[j] + right_by;
      const bool inside = first + j < g.patches && y >= 0 && y < g.height && x >= 0 && x < g.width;
      run.values[j] = inside ? plane[y * g.image_stride[2] + x * g.image_stride[3]] : E{0};
    }
    E* to = columns + (batch * g.elements + row) * g.patches + first;
    if (aligned) {
      *reinterpret_cast<Run<E>*>(to) = run;
    } else {
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        if (first + j < g.patches) to[j] = run.values[j];
      }
    }
  }
}

struct FoldDivisors {
  Divisor chunks, channels, width, stride[2], dilation[2];
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    fold_kernel(const T* columns, T* image, Geometry g, FoldDivisors by, int rows, int kernel_y,
                int64_t stride_b, int64_t stride_k, int64_t stride_l) {
  const Quotient place(blockIdx.x, by.chunks), plane(place.quotient, by.channels);
  const int pixel = place.rest * kThreads + threadIdx.x, pixels = g.height * g.width;
  if (pixel >= pixels) return;
  const Quotient at(pixel, by.width);
  const int y = at.quotient + g.padding[0], x = at.rest + g.padding[1];
  const int across = static_cast<int>(g.columns.by), kernel_x = static_cast<int>(g.kernel_x.by);
  columns += plane.quotient * stride_b;
  float total = 0.0f;
  // The patches that may have the pixel, from the last back: so go the taps from the first on.
  for (int row = min(Quotient(y, by.stride[0]).quotient, rows - 1); row >= 0; --row) {
    const Quotient i(y - row * g.stride[0], by.dilation[0]);
    if (i.quotient >= kernel_y) break;
    if (i.rest != 0) continue;
    const int first = (plane.rest * kernel_y + i.quotient) * kernel_x;
    for (int column = min(Quotient(x, by.stride[1]).quotient, across - 1); column >= 0; --column) {
      const Quotient j(x - column * g.stride[1], by.dilation[1]);
      if (j.quotient >= kernel_x) break;
      if (j.rest != 0) continue;
      total += widen(columns[(first + j.quotient) * stride_k + (row * across + column) * stride_l]);
    }
  }
  image[static_cast<int64_t>(place.quotient) * pixels + pixel] = narrow<T>(total);
}

template <class E>
void launch_unfold(const UnfoldShape& shape, View4 image, void* columns, void* stream) {
  const Geometry geometry("unfold", shape, image.stride);
  int threads_across = kThreads;  // the fewest that cover a row
  while (threads_across > 1 && threads_across / 2 * kRun >= geometry.patches) threads_across /= 2;
  const int64_t wide = threads_across * kRun, tall = kThreads / threads_across * kRows;
  const int64_t across = (geometry.patches + wide - 1) / wide;
  const int64_t down = (geometry.elements + tall - 1) / tall;
  launch("unfold", unfold_kernel<E>, shape.batch * down * across, kThreads, 0, stream,
         static_cast<const E*>(image.data), static_cast<E*>(columns), geometry, Divisor(across),
         Divisor(down), threads_across, geometry.patches % kRun == 0);
}

template <class T>
void launch_fold(const UnfoldShape& shape, ColumnView columns, void* image, void* stream) {
  const Geometry geometry("fold", shape, {});
  const int64_t pixels = counted("fold", shape.height * shape.width, "pixels of an image");
  const int64_t chunks = (pixels + kThreads - 1) / kThreads;
  FoldDivisors by;
  by.chunks = Divisor(chunks);
  by.channels = Divisor(shape.channels);
  by.width = Divisor(shape.width);
  for (int axis = 0; axis < 2; ++axis) {
    by.stride[axis] = Divisor(geometry.stride[axis]);
    by.dilation[axis] = Divisor(geometry.dilation[axis]);
  }
  launch("fold", fold_kernel<T>, shape.batch * shape.channels * chunks, kThreads, 0, stream,
         static_cast<const T*>(columns.data), static_cast<T*>(image), geometry, by,
         static_cast<int>(shape.grid[0]), static_cast<int>(shape.kernel[0]), columns.stride[0],
         columns.stride[1], columns.stride[2]);
}

}  // namespace

void unfold(DType dtype, const UnfoldShape& shape, View4 image, void* columns, void* stream) {
  if (dtype == DType::f32) return launch_unfold<uint32_t>(shape, image, columns, stream);
  launch_unfold<uint16_t>(shape, image, columns, stream);
}

void fold(DType dtype, const UnfoldShape& shape, ColumnView columns, void* image, void* stream) {
  dispatch(dtype, [&](auto element) {
    launch_fold<decltype(element)>(shape, columns, image, stream);
  });
}

}  // namespace pyvit::cuda
