// The two products of a convolution with few pixels, on weights where they lie: to pack them would
// cost more than to use them.
#pragma once

#include <array>
#include <cstdint>
#include <utility>

#include "simd.h"

namespace pyvit {

// c[pixel][row] += Σ_k a[pixel, k] · w[row, k], k contiguous on both sides, or in some runs.
template <class T>
struct DotTile {
#if defined(__AVX512F__)
  static constexpr int rows = 4, pixels = 6;  // 24 sums and 4 vectors of weights
#else
  static constexpr int rows = 3, pixels = 4;
#endif
  struct Arguments {
    const T* a;  // rows padded with zeros to whole vectors
    int64_t pitch;
    const T* w[rows];
    int64_t length;
    T* c;
    int64_t c_pitch;
    int64_t row_count;
    int64_t runs = 1, a_step = 0, w_step = 0;  // from one run to the next
  };
  using Kernel = void (*)(const Arguments&);
};

template <class T, int Pixels>
void dot_kernel(const typename DotTile<T>::Arguments& g) {
  constexpr int L = kLanes<T>, rows = DotTile<T>::rows;
  Vec<T> sum[rows][Pixels] = {};
  const T* a_run = g.a;
  auto multiply = [&](int64_t k, const Vec<T>* w) {
#pragma GCC unroll 8
    for (int p = 0; p < Pixels; ++p) {
      const Vec<T> a = load(a_run + p * g.pitch + k);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) sum[r][p] = fma(a, w[r], sum[r][p]);
    }
  };
  const T* w_run[rows];
  for (int r = 0; r < rows; ++r) w_run[r] = g.w[r];
  for (int64_t run = 0; run < g.runs; ++run, a_run += g.a_step) {
    int64_t k = 0;
    for (; k + L <= g.length; k += L) {
      Vec<T> w[rows];
      for (int r = 0; r < rows; ++r) w[r] = load(w_run[r] + k);
      multiply(k, w);
    }
    if (k < g.length) {
      T end[rows][L] = {};
      Vec<T> w[rows];
      for (int r = 0; r < rows; ++r) {
        std::memcpy(end[r], w_run[r] + k, (g.length - k) * sizeof(T));
        w[r] = load(end[r]);
      }
      multiply(k, w);
    }
    for (int r = 0; r < rows; ++r) w_run[r] += g.w_step;
  }
  for (int p = 0; p < Pixels; ++p)
    for (int r = 0; r < rows; ++r)
      if (r < g.row_count) g.c[p * g.c_pitch + r] += reduce_add<T>(sum[r][p]);
}

// c[pixel][lane] = Σ_k a[pixel, k] · b[k, lane] for four vectors of lanes; rows of b lie anywhere.
template <class T>
struct StripTile {
#if defined(__AVX512F__)
  static constexpr int pixels = 6, vectors = 4;
#else
  static constexpr int pixels = 6, vectors = 2;
#endif
  static constexpr int width = vectors * kLanes<T>;
  struct Arguments {
    const T* a;
    int64_t pitch;
    const T* b;
    int64_t b_pitch;
    int64_t length;
    T* c;  // [pixel][width]
  };
  using Kernel = void (*)(const Arguments&);
};

template <class T, int Pixels>
void strip_kernel(const typename StripTile<T>::Arguments& g) {
  constexpr int L = kLanes<T>, vectors = StripTile<T>::vectors;
  constexpr int64_t ahead = 8;  // rows of b that are fetched early: each lies in pages of its own
  Vec<T> sum[Pixels][vectors] = {};
  const T* b = g.b;
  for (int64_t k = 0; k < g.length; ++k, b += g.b_pitch) {
    Vec<T> bk[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      __builtin_prefetch(b + ahead * g.b_pitch + v * L);
      bk[v] = load(b + v * L);
    }
#pragma GCC unroll 8
    for (int p = 0; p < Pixels; ++p) {
      const Vec<T> a = broadcast(g.a[p * g.pitch + k]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[p][v] = fma(a, bk[v], sum[p][v]);
    }
  }
  for (int p = 0; p < Pixels; ++p)
    for (int v = 0; v < vectors; ++v) store(g.c + p * StripTile<T>::width + v * L, sum[p][v]);
}

template <class T, int... Pixels>
constexpr auto dot_kernel_table(std::integer_sequence<int, Pixels...>) {
  return std::array<typename DotTile<T>::Kernel, sizeof...(Pixels)>{dot_kernel<T, Pixels + 1>...};
}
template <class T, int... Pixels>
constexpr auto strip_kernel_table(std::integer_sequence<int, Pixels...>) {
  return std::array<typename StripTile<T>::Kernel, sizeof...(Pixels)>{
      strip_kernel<T, Pixels + 1>...};
}
template <class T>
inline constexpr auto kDotKernels =
    dot_kernel_table<T>(std::make_integer_sequence<int, DotTile<T>::pixels>{});
template <class T>
inline constexpr auto kStripKernels =
    strip_kernel_table<T>(std::make_integer_sequence<int, StripTile<T>::pixels>{});

}  // namespace pyvit
