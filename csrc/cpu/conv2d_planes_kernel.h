// c[row][i] = base + Σ_k w[k][row] · x[offset_k + i] for a few rows and vectors of i side by side,
// where x lies at any offset: planes of pixels to a few channels (conv2d_planes.cpp), or the
// weights of many channels to a few pixels (conv2d_pixels.cpp).
#pragma once

#include <array>
#include <cstdint>
#include <utility>

#include "parallel.h"
#include "simd.h"

namespace pyvit {

template <class T>
struct PlaneTile {
  static constexpr int rows = 4;
#if defined(__AVX512F__)
  // Rows × vectors sums, the vectors and a weight in 32 registers, or in 16.
  static constexpr int vectors[rows] = {8, 6, 4, 4};
#else
  static constexpr int vectors[rows] = {8, 5, 3, 2};
#endif
  struct Arguments {
    const T* x;
    const int64_t* offsets;
    int64_t length;  // of the sum
    const T* w;
    int64_t w_step, w_pitch;  // from one term, from one row to the next
    const T* base;            // of each row, what its sums are added to; or null
    const T* from;            // then vectors of it, as c has them
    int64_t from_pitch;
    T* c;
    int64_t c_pitch;
    int64_t tiles = 1;                                 // of so many vectors side by side
    int64_t repeats = 1, w_repeat = 0, base_repeat = 0, c_repeat = 0;  // with other rows
  };
  using Kernel = void (*)(const Arguments&);
};

template <class T, int Rows, int Vectors>
void plane_kernel(const typename PlaneTile<T>::Arguments& arguments) {
  constexpr int L = kLanes<T>;
  const typename PlaneTile<T>::Arguments g = arguments;  // stores might alias them
  for (int64_t repeat = 0; repeat < g.repeats; ++repeat) {
    for (int64_t at = 0; at < g.tiles * Vectors * L; at += Vectors * L) {
      Vec<T> sum[Rows][Vectors] = {};
      const T* w = g.w + repeat * g.w_repeat;
      for (int64_t k = 0; k < g.length; ++k, w += g.w_step) {
        const T* x = g.x + g.offsets[k] + at;
        Vec<T> xk[Vectors];
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) xk[v] = load(x + v * L);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
          const Vec<T> wk = broadcast(w[r * g.w_pitch]);
#pragma GCC unroll 8
          for (int v = 0; v < Vectors; ++v) sum[r][v] = fma(xk[v], wk, sum[r][v]);
        }
      }
      T* c = g.c + repeat * g.c_repeat + at;
      const T* base = g.base + repeat * g.base_repeat;
      const T* from = g.from + at;
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r, c += g.c_pitch, from += g.from_pitch) {
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v)
          store(c + v * L,
                (g.base == nullptr ? load(from + v * L) : broadcast(base[r])) + sum[r][v]);
      }
    }
  }
}

template <class T, int Rows, int... Vectors>
constexpr auto plane_kernel_table(std::integer_sequence<int, Vectors...>) {
  return std::array<typename PlaneTile<T>::Kernel, sizeof...(Vectors)>{
      plane_kernel<T, Rows, Vectors + 1>...};
}
template <class T, int Rows>
inline constexpr auto kPlaneKernels = plane_kernel_table<T, Rows>(
    std::make_integer_sequence<int, PlaneTile<T>::vectors[Rows - 1]>{});

template <class T, int... Rows>
constexpr auto plane_kernels_by_rows(std::integer_sequence<int, Rows...>) {
  return std::array<const typename PlaneTile<T>::Kernel*, sizeof...(Rows)>{
      kPlaneKernels<T, Rows + 1>.data()...};
}
template <class T>
inline constexpr auto kPlaneKernelTable = plane_kernels_by_rows<T>(
    std::make_integer_sequence<int, PlaneTile<T>::rows>{});

// At most PlaneTile::rows rows of `vectors` whole vectors, in parts of equal width, about.
template <class T>
inline void run_plane_kernel(int64_t rows, int64_t vectors,
                             typename PlaneTile<T>::Arguments g) {
  int64_t parts = ceil_div(vectors, PlaneTile<T>::vectors[rows - 1]);
  // With other rows to come, a rest would be a second pass over them.
  for (int64_t even = parts; g.repeats > 1 && even < 2 * parts; ++even)
    if (vectors % even == 0) parts = even, even = 2 * parts;
  const int64_t width = ceil_div(vectors, parts), rest = vectors % width;
  g.tiles = vectors / width;
  kPlaneKernelTable<T>[rows - 1][width - 1](g);
  if (rest == 0) return;
  const int64_t at = (vectors - rest) * kLanes<T>;
  g.tiles = 1, g.x += at, g.from += at, g.c += at;
  kPlaneKernelTable<T>[rows - 1][rest - 1](g);
}

// Rows of `length` elements, at least a vector: the last one begins early enough to end in the row.
template <class T>
inline void run_plane_rows(int64_t rows, int64_t length, typename PlaneTile<T>::Arguments g) {
  constexpr int64_t L = kLanes<T>;
  run_plane_kernel<T>(rows, length / L, g);
  if (length % L == 0) return;
  g.x += length - L, g.from += length - L, g.c += length - L;
  kPlaneKernelTable<T>[rows - 1][0](g);
}

}  // namespace pyvit
