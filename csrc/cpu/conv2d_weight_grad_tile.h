// The innermost product of the weight gradient: a tile of patch elements × output channels, summed
// over pixels that lie in a grid of constant strides, so that neither operand is unfolded.
#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "conv2d_weight_grad_prefetch.h"
#include "gemm.h"

namespace pyvit::weight_gradient {

// `count` pixels, so many elements apart in the image and in the gradient.
struct PixelLoop {
  int64_t count, x, dy;
};

// Pixels (image, row, column) of a band as three loops, the innermost first.
struct PixelLoops {
  PixelLoop at[3];

  // Short rows become outer loops, and loops that run on into each other one. The order of the
  // pixels depends on the counts alone.
  PixelLoops(PixelLoop column, PixelLoop row, PixelLoop image) : at{column, row, image} {
    constexpr int64_t short_row = 6;
    if (at[0].count < short_row) {
      const int longest = at[1].count >= at[2].count ? 1 : 2;
      if (at[longest].count > at[0].count) std::swap(at[0], at[longest]);
    }
    join(1);
    join(0);
  }
  // Times that a kernel fetches something on its way through the pixels.
  static constexpr int64_t kFetchPixels = 16;
  int64_t fetches() const {
    return std::max<int64_t>(1, ceil_div(at[0].count, kFetchPixels) * at[1].count * at[2].count);
  }
  bool empty() const { return at[0].count * at[1].count * at[2].count == 0; }

 private:
  void join(int inner) {
    PixelLoop &in = at[inner], &out = at[inner + 1];
    const bool goes_on = out.x == in.count * in.x && out.dy == in.count * in.dy;
    if (in.count == 1) {
      in = out;
    } else if (out.count != 1 && !goes_on) {
      return;
    } else {
      in.count *= out.count;
    }
    out = inner == 0 ? at[2] : PixelLoop{1, 0, 0};
    at[2] = PixelLoop{1, 0, 0};
  }
};

// How an element of x meets the lanes of dy: one value for all output channels, or, where each of
// them has channels of its own (small groups), a value for each.
enum class Side { broadcast, lanes };

// c[i, 0 : Vectors·L] (+)= Σ_pixels x[pixel + offset[i]] · dy[pixel, 0 : Vectors·L], i < Rows.
template <class T, Side side, int Vectors, int Rows>
void tile_kernel(const T* x, const int64_t* offset, const T* dy, const PixelLoops& loops, T* c,
                 int64_t ldc, bool accumulate, Prefetcher& next, int64_t lines) {
  constexpr int L = kLanes<T>;
  Vec<T> sum[Rows][Vectors] = {};
  const auto [inner, middle, outer] = loops.at;
  for (int64_t n = 0; n < outer.count; ++n, x += outer.x, dy += outer.dy) {
    const T *x_row = x, *dy_row = dy;
    for (int64_t r = 0; r < middle.count; ++r, x_row += middle.x, dy_row += middle.dy) {
      const T *xk = x_row, *dyk = dy_row;
      for (int64_t left = inner.count; left > 0; left -= PixelLoops::kFetchPixels) {
        next.fetch(lines);
        const int64_t some = std::min(left, PixelLoops::kFetchPixels);
        for (int64_t k = some; k > 0; --k, xk += inner.x, dyk += inner.dy) {
          Vec<T> b[Vectors];
          for (int v = 0; v < Vectors; ++v) b[v] = load(dyk + v * L);
#pragma GCC unroll 32
          for (int i = 0; i < Rows; ++i) {
            const T* a = xk + offset[i];
            for (int v = 0; v < Vectors; ++v)
              sum[i][v] =
                  fma(side == Side::lanes ? load(a + v * L) : broadcast(*a), b[v], sum[i][v]);
          }
        }
      }
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < Rows; ++i) {
    for (int v = 0; v < Vectors; ++v) {
      T* to = c + i * ldc + v * L;
      store(to, accumulate ? load(to) + sum[i][v] : sum[i][v]);
    }
  }
}

template <class T>
using TileKernel = void (*)(const T*, const int64_t*, const T*, const PixelLoops&, T*, int64_t,
                            bool, Prefetcher&, int64_t);

// Rows of the tallest tile of one or two vectors. Two fill the registers; one has more rows than
// the arithmetic units are deep, and more would run out of registers for their addresses.
template <class T>
inline constexpr int kSumRows[3] = {0, kVectorBytes == 64 ? 12 : 8, Panel<T>::MR};

template <class T, Side side, int Vectors, int... Rows>
constexpr auto tile_kernel_table(std::integer_sequence<int, Rows...>) {
  return std::array<TileKernel<T>, sizeof...(Rows)>{tile_kernel<T, side, Vectors, Rows + 1>...};
}
template <class T, Side side, int Vectors>
inline constexpr auto kTileKernels = tile_kernel_table<T, side, Vectors>(
    std::make_integer_sequence<int, kSumRows<T>[Vectors]>{});

// Tiles of nearly equal height for any number of rows, and `width` lanes of dy.
template <class T>
class Tiles {
 public:
  Tiles(int64_t rows, Side side, int64_t width)
      : rows_(rows), vectors_(width > kLanes<T> ? 2 : 1), count_(ceil_div(rows, height())) {
    if (side == Side::broadcast) {
      kernels_ = vectors_ == 2 ? kTileKernels<T, Side::broadcast, 2>.data()
                               : kTileKernels<T, Side::broadcast, 1>.data();
    } else {
      kernels_ = vectors_ == 2 ? kTileKernels<T, Side::lanes, 2>.data()
                               : kTileKernels<T, Side::lanes, 1>.data();
    }
  }
  int64_t count() const { return count_; }
  // f(first row, kernel) for each tile.
  template <class F>
  void for_each(const F& f) const {
    for (int64_t tile = 0, i = 0; tile < count_; ++tile) {
      const int64_t rows = (rows_ - i) / (count_ - tile);
      f(i, kernels_[rows - 1]);
      i += rows;
    }
  }

 private:
  int64_t height() const { return kSumRows<T>[vectors_]; }
  int64_t rows_;
  int vectors_;
  int64_t count_;
  const TileKernel<T>* kernels_;
};

}  // namespace pyvit::weight_gradient
