// The innermost product of the weight gradient: a tile of patch elements × output channels, summed
// over pixels that lie in a grid of constant strides, so that neither operand is unfolded.
#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "gemm.h"

namespace pyvit {

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

// c[i, 0 : Vectors·L] (+)= Σ_pixels x[pixel + offset[i]] · dy[pixel, 0 : Vectors·L], i < Rows.
template <class T, int Rows, int Vectors>
void tile_kernel(const T* x, const int64_t* offset, const T* dy, const PixelLoops& loops, T* c,
                 int64_t ldc, bool accumulate) {
  constexpr int L = kLanes<T>;
  Vec<T> sum[Rows][Vectors] = {};
  const auto [inner, middle, outer] = loops.at;
  for (int64_t n = 0; n < outer.count; ++n, x += outer.x, dy += outer.dy) {
    const T *x_row = x, *dy_row = dy;
    for (int64_t r = 0; r < middle.count; ++r, x_row += middle.x, dy_row += middle.dy) {
      const T *xk = x_row, *dyk = dy_row;
      for (int64_t k = inner.count; k > 0; --k, xk += inner.x, dyk += inner.dy) {
        Vec<T> b[Vectors];
        for (int v = 0; v < Vectors; ++v) b[v] = load(dyk + v * L);
#pragma GCC unroll 16
        for (int i = 0; i < Rows; ++i) {
          const Vec<T> a = broadcast(xk[offset[i]]);
          for (int v = 0; v < Vectors; ++v) sum[i][v] = fma(a, b[v], sum[i][v]);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
    for (int v = 0; v < Vectors; ++v) {
      T* to = c + i * ldc + v * L;
      store(to, accumulate ? load(to) + sum[i][v] : sum[i][v]);
    }
  }
}

template <class T>
using TileKernel = void (*)(const T*, const int64_t*, const T*, const PixelLoops&, T*, int64_t,
                            bool);

template <class T, int Vectors, int... Rows>
constexpr auto tile_kernel_table(std::integer_sequence<int, Rows...>) {
  return std::array<TileKernel<T>, sizeof...(Rows)>{tile_kernel<T, Rows + 1, Vectors>...};
}
template <class T, int Vectors>
inline constexpr auto kTileKernels =
    tile_kernel_table<T, Vectors>(std::make_integer_sequence<int, Panel<T>::MR>{});

// The same for any number of rows, in tiles of nearly equal height, and `width` lanes of dy.
template <class T>
void multiply_tiles(const T* x, const int64_t* offset, int64_t rows, const T* dy, int64_t width,
                    const PixelLoops& loops, T* c, int64_t ldc, bool accumulate) {
  const auto& kernels = width > kLanes<T> ? kTileKernels<T, 2> : kTileKernels<T, 1>;
  const int64_t tiles = ceil_div(rows, Panel<T>::MR);
  for (int64_t tile = 0, i = 0; tile < tiles; ++tile) {
    const int64_t height = (rows - i) / (tiles - tile);
    kernels[height - 1](x, offset + i, dy, loops, c + i * ldc, ldc, accumulate);
    i += height;
  }
}

}  // namespace pyvit
