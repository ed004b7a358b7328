// C[row, column] = base + Σ_ij W[i, j] · A[row + i, column + j] for a few rows of one plane, with
// columns in the lanes: a depth-wise convolution of planar images, read where they are. Lanes
// outside the image are masked. A vector is loaded once for all rows that it is in.
#pragma once

#include <array>
#include <cstdint>
#include <utility>

#include "simd.h"

#if defined(PYVIT_HAS_LANE_MASKS)
namespace pyvit {

struct DepthwiseTile {
  static constexpr int rows = 4, vectors = 2, taps = 3;
  struct Arguments {
    const float* source[rows + taps - 1];  // row by row, where the first tap meets column 0
    int64_t vector_stride;  // from the first vector of columns to the second, in A and in C
    LaneMask inside[taps][vectors];
    const float* weights;  // taps × taps
    float base;
    float* c;
    int64_t c_row_stride;
  };
  using Kernel = void (*)(const Arguments&);
};

// Sums run over kernel rows, then columns, as conv2d_depthwise_kernel.h's do.
template <int Rows, int Vectors, bool Masked>
void depthwise_kernel(const DepthwiseTile::Arguments& g) {
  constexpr int K = DepthwiseTile::taps;
  Vec<float> sum[Rows][Vectors] = {};
  const int64_t vector = g.vector_stride;
#pragma GCC unroll 16
  for (int h = 0; h < Rows + K - 1; ++h) {
    const float* row = g.source[h];
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) {
      Vec<float> a[Vectors];
      for (int v = 0; v < Vectors; ++v) {
        const float* from = row + j + v * vector;
        a[v] = Masked ? load_masked(Vec<float>{}, g.inside[j][v], from) : load(from);
        asm("" : "+v"(a[v]));  // or the compiler loads it again for every row
      }
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        if (h < r || h - r >= K) continue;
        const Vec<float> w = broadcast(g.weights[(h - r) * K + j]);
        for (int v = 0; v < Vectors; ++v) sum[r][v] = fma(a[v], w, sum[r][v]);
      }
    }
  }
  const Vec<float> base = broadcast(g.base);
  float* c = g.c;
  const int64_t down = g.c_row_stride;  // stores might alias g
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r, c += down)
    for (int v = 0; v < Vectors; ++v) store(c + v * vector, base + sum[r][v]);
}

// [rows][vectors][whether masked], rows and vectors less one each.
template <int... Index>
constexpr auto depthwise_kernel_table(std::integer_sequence<int, Index...>) {
  return std::array<DepthwiseTile::Kernel, sizeof...(Index)>{
      depthwise_kernel<Index / 4 + 1, Index / 2 % 2 + 1, Index % 2 == 1>...};
}
inline constexpr auto kDepthwiseKernels =
    depthwise_kernel_table(std::make_integer_sequence<int, DepthwiseTile::rows * 4>{});

inline void run_depthwise_kernel(int64_t rows, int64_t vectors, bool masked,
                             const DepthwiseTile::Arguments& g) {
  kDepthwiseKernels[(rows - 1) * 4 + (vectors - 1) * 2 + masked](g);
}

}  // namespace pyvit
#endif
