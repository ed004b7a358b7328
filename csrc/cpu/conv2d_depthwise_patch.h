// conv2d_depthwise_kernel.h for a patch of destination pixels, rows and columns of them, with a K×K
// kernel and step 1: windows overlap, and each source pixel is loaded once for all of those that it
// is in. Sums run in the same order: kernel rows, then columns.
#pragma once

#include <array>
#include <cstdint>
#include <utility>

#include "simd.h"

namespace pyvit {

template <class T>
struct LanePatch {
#if defined(__AVX512F__)
  static constexpr int rows = 4, columns = 4;  // 16 sums, and the weights of a 3×3 kernel
#else
  static constexpr int rows = 2, columns = 4;
#endif
  struct Arguments {
    const T* a;  // the first source pixel of the first window
    int64_t row_stride, column_stride;
    const T* weights;
    const T* base;
    T* c;
    int64_t c_row_stride, c_column_stride;
  };
  using Kernel = void (*)(const Arguments&);
};

template <class T, int K, int Rows, int Columns>
void lane_patch(const typename LanePatch<T>::Arguments& g) {
  constexpr int L = kLanes<T>;
  Vec<T> sum[Rows][Columns] = {};
  const T* row = g.a;
#pragma GCC unroll 8
  for (int h = 0; h < Rows + K - 1; ++h, row += g.row_stride) {
    const T* a = row;
#pragma GCC unroll 8
    for (int w = 0; w < Columns + K - 1; ++w, a += g.column_stride) {
      const Vec<T> pixel = load(a);
#pragma GCC unroll 8
      for (int i = 0; i < K; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < K; ++j) {
          const int r = h - i, c = w - j;
          if (r >= 0 && r < Rows && c >= 0 && c < Columns)
            sum[r][c] = fma(pixel, load(g.weights + (i * K + j) * L), sum[r][c]);
        }
      }
    }
  }
  const Vec<T> base = load(g.base);
  T* to = g.c;
  const int64_t down = g.c_row_stride, across = g.c_column_stride;  // stores might alias g
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r, to += down)
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c) store(to + c * across, base + sum[r][c]);
}

template <class T, int K, int... Index>
constexpr auto lane_patch_table(std::integer_sequence<int, Index...>) {
  constexpr int columns = LanePatch<T>::columns;
  return std::array<typename LanePatch<T>::Kernel, sizeof...(Index)>{
      lane_patch<T, K, Index / columns + 1, Index % columns + 1>...};
}
template <class T, int K>
inline constexpr auto kLanePatches = lane_patch_table<T, K>(
    std::make_integer_sequence<int, LanePatch<T>::rows * LanePatch<T>::columns>{});

template <class T>
inline void run_lane_patch(int64_t kernel, int64_t rows, int64_t columns,
                           const typename LanePatch<T>::Arguments& g) {
  const int64_t index = (rows - 1) * LanePatch<T>::columns + columns - 1;
  (kernel == 3 ? kLanePatches<T, 3> : kLanePatches<T, 5>)[index](g);
}

}  // namespace pyvit
