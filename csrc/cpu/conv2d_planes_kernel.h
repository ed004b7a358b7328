// c[channel][pixel] += Σ_k w[k][channel] · x[offset_k + pixel] for a few channels and vectors of
// pixels side by side: the image is read where it lies, at any offset.
#pragma once

#include <array>
#include <cstdint>
#include <utility>

#include "simd.h"

namespace pyvit {

template <class T>
struct PlaneTile {
  static constexpr int channels = 4;
#if defined(__AVX512F__)
  // Channels × vectors sums, the vectors and a weight in 32 registers, or in 16.
  static constexpr int vectors[channels] = {8, 6, 4, 4};
#else
  static constexpr int vectors[channels] = {8, 5, 3, 2};
#endif
  struct Arguments {
    const T* x;
    const int64_t* offsets;
    int64_t length;  // of the sum
    const T* w;      // [length][channels]
    T* c;
    int64_t c_pitch;  // from one channel to the next
  };
  using Kernel = void (*)(const Arguments&);
};

template <class T, int Channels, int Vectors>
void plane_kernel(const typename PlaneTile<T>::Arguments& g) {
  constexpr int L = kLanes<T>;
  Vec<T> sum[Channels][Vectors] = {};
  const T* w = g.w;
  for (int64_t k = 0; k < g.length; ++k, w += Channels) {
    const T* x = g.x + g.offsets[k];
    Vec<T> xk[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) xk[v] = load(x + v * L);
#pragma GCC unroll 4
    for (int o = 0; o < Channels; ++o) {
      const Vec<T> wk = broadcast(w[o]);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sum[o][v] = fma(xk[v], wk, sum[o][v]);
    }
  }
#pragma GCC unroll 4
  for (int o = 0; o < Channels; ++o) {
    T* c = g.c + o * g.c_pitch;
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) store(c + v * L, load(c + v * L) + sum[o][v]);
  }
}

template <class T, int Channels, int... Vectors>
constexpr auto plane_kernel_table(std::integer_sequence<int, Vectors...>) {
  return std::array<typename PlaneTile<T>::Kernel, sizeof...(Vectors)>{
      plane_kernel<T, Channels, Vectors + 1>...};
}
template <class T, int Channels>
inline constexpr auto kPlaneKernels = plane_kernel_table<T, Channels>(
    std::make_integer_sequence<int, PlaneTile<T>::vectors[Channels - 1]>{});

template <class T, int... Channels>
constexpr auto plane_kernels_by_channels(std::integer_sequence<int, Channels...>) {
  return std::array<const typename PlaneTile<T>::Kernel*, sizeof...(Channels)>{
      kPlaneKernels<T, Channels + 1>.data()...};
}
template <class T>
inline constexpr auto kPlaneKernelTable = plane_kernels_by_channels<T>(
    std::make_integer_sequence<int, PlaneTile<T>::channels>{});

// At most PlaneTile::channels channels, and as many vectors as it has for them.
template <class T>
inline void run_plane_kernel(int64_t channels, int64_t vectors,
                             const typename PlaneTile<T>::Arguments& g) {
  kPlaneKernelTable<T>[channels - 1][vectors - 1](g);
}

}  // namespace pyvit
