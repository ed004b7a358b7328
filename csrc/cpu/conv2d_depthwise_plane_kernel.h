// C[row, column] = base + Σ_ij W[i, j] · A[row + i, column + j·step] for a few rows of one plane,
// with columns in the lanes: a depth-wise convolution, read where the image lies. The step is 1 where
// a plane is one channel, and the number of channels where they lie side by side in it; weights are
// those of each lane's channel. Lanes outside the image are masked. A vector is loaded once for all
// rows that it is in.
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
    int64_t tap_step;       // from one tap of a row to the next
    LaneMask inside[taps][vectors];
    const float* weights[vectors];  // taps × taps vectors
    const float* base[vectors];     // one vector
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
  const int64_t vector = g.vector_stride, step = g.tap_step;
#pragma GCC unroll 16
  for (int h = 0; h < Rows + K - 1; ++h) {
    const float* row = g.source[h];
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) {
      Vec<float> a[Vectors];
      for (int v = 0; v < Vectors; ++v) {
        const float* from = row + j * step + v * vector;
        a[v] = Masked ? load_masked(Vec<float>{}, g.inside[j][v], from) : load(from);
        asm("" : "+v"(a[v]));  // or the compiler loads it again for every row
      }
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        if (h < r || h - r >= K) continue;
        for (int v = 0; v < Vectors; ++v) {
          const float* w = g.weights[v] + ((h - r) * K + j) * kLanes<float>;
          sum[r][v] = fma(a[v], load(w), sum[r][v]);
        }
      }
    }
  }
  Vec<float> base[Vectors];
  for (int v = 0; v < Vectors; ++v) base[v] = load(g.base[v]);
  float* c = g.c;
  const int64_t down = g.c_row_stride;  // stores might alias g
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r, c += down)
    for (int v = 0; v < Vectors; ++v) store(c + v * vector, base[v] + sum[r][v]);
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
